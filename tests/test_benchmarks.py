"""The benchmark of the operator, as `ea bench` runs it."""

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tests.processes import run_code, run_script

cli = import_module("expressive_attention.study.cli.app")

FOLDER = Path(__file__).parents[1] / "benchmarks"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def bench(*arguments):
    """The command, and what the script printed that it ran."""
    scripts = []

    def run(command, check):
        scripts.append(run_script(*command[1:]))
        return scripts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "subprocess", SimpleNamespace(run=run))
        code = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)]).exit_code
    (script,) = scripts
    assert code == script.returncode
    return script


def test_what_is_printed_is_checked_and_written(tmp_path):
    file = tmp_path / "table.json"
    done = bench("--only", "tiny, forward, (32", "--pairs", 2, "--threads", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    (section,) = json.loads(file.read_text())["sections"]
    rows = {row["implementation"]: row for row in section["rows"]}
    own = next(row for row in section["rows"] if row["is_ours"])
    assert own["seconds"] > 0
    assert own["error"] <= 1
    assert {"sdpa", "flex", "formula"} < rows.keys()
    ratio = rows["sdpa"]["ratio"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert rows["sdpa"]["verdict"] == ("met" if ratio["median"] >= rows["sdpa"]["goal"] else "missed")
    assert f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--only", "nothing"], "--only must be part of a problem's name"),
        (["--json", "/there/is/none.json"], "--json must be a file in a folder that exists"),
        (["--backend", "cuda"], "invalid choice: 'cuda'"),
        pytest.param(["--device", "cuda"], "--device cuda needs a GPU, and torch finds none", marks=NO_GPU),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    done = bench(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert not done.stdout


# Lines that import the benchmark as a module `bench`; its name is that of a module of the standard library.
LOAD = f"""
import importlib.util, sys
sys.path.append({str(FOLDER)!r})
spec = importlib.util.spec_from_file_location("bench", {str(FOLDER / "operator.py")!r})
bench = importlib.util.module_from_spec(spec)
sys.argv, sys.path = [spec.origin], [{str(FOLDER)!r}, *sys.path]
spec.loader.exec_module(bench)
"""


def test_a_wrong_result_gets_no_speed_up():
    code = f"""
{LOAD}
from implementations import SDPA, Implementation, ours
from problems import Problem
import torch
problem = Problem("any", (1, 2, 8, 8))
for off in (1.0, 1.001, float("nan")):
    own = Implementation("own", lambda p: lambda q, k, v: ours(None, torch.float32).make(p)(q, k, v) * off)
    rows = bench.measure(problem, own, [SDPA], 1, bench.peak.Peaks(None, None, "none"))
    print([(row.seconds is None, row.ratio is None, row.note) for row in rows])
"""
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    right, wrong, nothing = done.stdout.splitlines()
    assert right == "[(False, True, ''), (False, False, '')]"
    assert wrong == "[(True, True, 'error over budget: no speed-up'), (True, True, 'ours was not timed')]"
    assert nothing == wrong


def test_dropout_biases_and_groups_are_checked():
    """An implementation that leaves them out gets no speed-up; ONNX Runtime is checked against softmax."""
    code = f"""
{LOAD}
from dataclasses import replace
from implementations import RIVALS, Implementation, ours
from problems import Problem
import torch
rivals = [rival for rival in RIVALS if rival.name in ("plain", "onnx")]
causal, dropout = {{"causal": True}}, {{"dropout_p": 0.2, "backward": True}}
nothing = bench.peak.Peaks(None, None, "none")
for more in (dropout, {{"bias": "alibi", **causal}}, {{"bias": "mask"}}, causal):
    problem = Problem("any", (1, 4, 20, 16), **more)
    careless = Implementation("careless", lambda p: ours(None, p.dtype).make(p.plain()))
    rows = bench.measure(problem, ours(None, problem.dtype), [*rivals, careless], 1, nothing)
    print({{row.implementation: row.error is not None and row.error <= 1 for row in rows}})
grouped = Problem("any", (2, 8, 1, 16), keys=30, kv_heads=2)
(row,) = bench.measure(grouped, ours(None, grouped.dtype), [], 1, nothing)
print(row.error <= 1, grouped.bytes_read == 2 * 2 * 2 * 30 * 16 * 4)
"""
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    *extras, causal, grouped = done.stdout.splitlines()
    assert extras == ["{'cpu': True, 'plain': True, 'careless': False}"] * 3
    assert causal == "{'cpu': True, 'onnx': True, 'careless': True}"
    assert grouped == "True True"


def script(name, *arguments):
    return run_script(FOLDER / name, *arguments)


def test_errors_of_long_problems():
    done = script("large.py", "--device", "cpu", "--backend", "blockwise", "--lengths", 301)
    assert done.returncode == 0, done.stdout + done.stderr
    shares = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(shares) == 12
    assert all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("large.py", ["--lengths", "1"], "--lengths must be at least 2, got 1"),
        ("large.py", ["--device", "cpu"], "--backend triton does not run here: it runs on GPUs, not on cpu"),
        (
            "gpu.py",
            ["tests", "speed"],
            "STEP must be one of smoke, tuning, timing, linear, tests, blocks, cold, large, sanitizer, got",
        ),
        ("gpu.py", ["--minutes", "0"], "--minutes must be above 0, got 0"),
        ("tune.py", ["--dry-run", "--write"], "--write needs what was measured, and --dry-run measures nothing"),
        ("tune.py", ["--budget", "0"], "--budget must be above 0, got 0"),
        pytest.param("tune.py", [], "a GPU is needed, and torch finds none", marks=NO_GPU),
        pytest.param("gpu_steps.py", ["smoke"], "a GPU is needed, and torch finds none", marks=NO_GPU),
        pytest.param("gpu.py", [], "a GPU is needed, and torch finds none", marks=NO_GPU),
        pytest.param("cold_start.py", [], "a GPU is needed, and torch finds none", marks=NO_GPU),
    ],
)
def test_wrong_arguments_of_the_scripts_are_named(name, arguments, words):
    done = script(name, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert not done.stdout


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_dry_run_goes_through_all_steps_for_a_gpu(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    done = script("gpu.py", "--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {row["step"]: row["result"] for row in lines(tmp_path / "steps.jsonl")}
    needs_gpu = {"cold": "needs a GPU", "sanitizer": "needs a GPU"}
    passed = ("smoke", "tuning", "timing", "linear", "tests", "blocks", "large")
    assert results == dict.fromkeys(passed, "passed") | needs_gpu
    smoke = lines(tmp_path / "smoke.jsonl")
    assert len(smoke) == 6
    assert all(0 < row["error"] <= 1 for row in smoke)
    tuning = lines(tmp_path / "tuning.jsonl")
    assert {row["kernel"] for row in tuning} == {"forward", "row", "query", "key_value"}
    assert all(row["seconds"] > 0 for row in tuning)
    assert json.loads((tmp_path / "tuned.json").read_text()).keys() == {"0"}
    linear = lines(tmp_path / "linear.jsonl")
    assert all(0 < row["error"] <= 1 for row in linear if row["implementation"] == "linear")
    assert [row["implementation"] for row in linear] == ["linear", *["all pairs"] * 2, *["softmax"] * 2]
    twins = [row for row in lines(tmp_path / "timing.jsonl") if row["implementation"] == "twin"]
    assert len(twins) == 8
    assert all(row["seconds"] / row["own_seconds"] == pytest.approx(row["ratio"]) for row in twins)
    blocks = lines(tmp_path / "blocks.jsonl")
    assert [row.get("implementation", "error") for row in blocks] == 2 * ["error", "all pairs"]
    assert all(0 < row["error"] <= 1 for row in blocks[::2])
    assert all(0.1 < row["seen"] < 0.2 for row in blocks[1::2])


def test_a_step_that_takes_too_long_is_stopped_and_the_next_ones_are_left_out(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    done = script("gpu.py", "smoke", "tests", "--dry-run", "--minutes", 0.01, "--out", tmp_path)
    assert done.returncode == 1
    first, second = (row["result"] for row in lines(tmp_path / "steps.jsonl"))
    assert (first, second) == ("stopped: over its budget", "no time left")


def test_the_fastest_tile_gets_into_the_table_where_it_is_faster_than_the_default():
    code = f"""
import sys
sys.path.append({str(FOLDER)!r})
import tune
def row(tile, seconds, kernel="forward"):
    return {{"kernel": kernel, "dtype": "bfloat16", "width": 64, "tile": tile, "seconds": seconds}}
rows = [row("default", 2.0), row((16, 16, 4, 1), 3.0), row((32, 16, 4, 1), 1.0), row((64, 16, 4, 1), None)]
rows += [row("default", 2.0, "query"), row((16, 16, 4, 1), 3.0, "query")]
print(tune.table(rows, 90))
"""
    done = run_code(code)
    assert done.stdout.strip() == "{'90': {'forward': {'bfloat16': {'64': [32, 16, 4, 1]}}}}"
