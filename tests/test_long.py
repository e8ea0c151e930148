"""The examples and the benchmark of long sequences, in small."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.processes import run_script

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_example(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_generation_has_the_same_tokens_and_a_constant_size(run_example):
    *said, same = run_example("long_generation.py", "--tokens", 80)
    assert same == "the same tokens: 100.0%"
    sizes = {name: [] for name in ("state", "keys and values")}
    for line in said:
        name, size = re.fullmatch(r"(.*): \d+ tokens, [\d.]+ ms each since the line before, ([\d.]+) MB", line).groups()
        sizes[name].append(float(size))
    assert len(set(sizes["state"])) == 1
    assert len(sizes["state"]) == 4
    assert sizes["keys and values"] == sorted(set(sizes["keys and values"]))


@pytest.mark.parametrize(("gain", "switched"), [("0.001", 2), ("1", 0)])
def test_a_trained_model_is_switched(run_example, gain, switched):
    said = run_example("linearize.py", "--steps", 2, "--gain", gain)
    before, after = (float(re.search(r": (\d\.\d{4})", line)[1]) for line in said if line.startswith("loss"))
    assert abs(before - after) < 1e-3
    assert f"{switched} of 2 layers switched to z², tolerance 0.001" in said
    assert (f"EA of the form 'squared' ran in {switched}/2 layers" in said) == (switched > 0)
    assert said[-1] == f"for a million tokens, {switched} of 2 layers keep a state of constant size"


def test_a_state_runs_out_of_room(run_example):
    *_, few, many = run_example("recall.py", "--dims", 16, "--pairs", 8, 512)
    (*_, squared, expressive, softmax), (*sizes, lost, _, kept) = few.split(), many.split()
    assert squared == expressive == softmax == kept == "100.0%"
    assert float(lost.rstrip("%")) < 20
    assert sizes == ["16", str(16 * 17 // 2 * 16), "512"]


def benchmark(*arguments):
    return run_script(ROOT / "benchmarks" / "long.py", *arguments)


def test_the_benchmark_checks_and_writes(tmp_path):
    file = tmp_path / "long.json"
    done = benchmark("--lengths", 300, 700, "--heads", 1, "--dim", 16, "--rivals-up-to", 300, "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    rows = {(row["kind"], row["length"]): row for row in found["rows"]}
    assert len(rows) == 6
    for (kind, length), row in rows.items():
        assert row["ours"] > 0
        assert 0 < row["error"] <= 1
        if length == 300:
            assert all(seconds > 0 for seconds in row["rivals"].values())
            assert row["rivals"].keys() == ({"cache", "softmax"} if kind == "one token" else {"all pairs", "softmax"})
        else:
            assert not any(row["rivals"].values())
    assert "memory beyond inputs and output at L = 700" in done.stdout


def test_near_and_far_are_timed_and_measured(tmp_path):
    file = tmp_path / "near_far.json"
    script = ROOT / "benchmarks" / "near_far.py"
    done = run_script(script, "--lengths", 300, "--heads", 1, "--dim", 16, "--window", 32, "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert [row["kind"] for row in found["rows"]] == ["forward", "forward + backward", "one token"]
    rivals = ["EA", "EA in a window", "squared", "softmax"]
    for row in found["rows"]:
        assert 0 < row["error"] <= 1
        assert list(row["ratios"]) == rivals
        assert all(0 < ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in row["ratios"].values())
    assert list(found["memory"]) == ["near and far", *rivals]


def test_models_are_trained_to_recall(tmp_path):
    file = tmp_path / "recall.json"
    sizes = ["--pairs", 8, "--vocab", 32, "--window", 4, "--steps", 200, "--tokens", 512, "--embed-dim", 32]
    kinds = ["--kinds", "near and far", "EA in a window"]
    done = run_script(ROOT / "benchmarks" / "recall.py", *sizes, *kinds, "--seeds", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["recalled"]
    assert list(found) == ["near and far", "EA in a window"]
    assert found["near and far"][0] > 0.9
    assert found["EA in a window"][0] < 0.6  # it does not see most of the pairs


def test_models_are_trained_on_text(tmp_path):
    file = tmp_path / "text.json"
    sizes = ["--context", 32, "--window", 4, "--steps", 60, "--batch", 8, "--embed-dim", 32]
    kinds = ["--kinds", "near and far", "EA in a window"]
    done = run_script(ROOT / "benchmarks" / "text.py", *sizes, *kinds, "--seeds", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["bits"]
    assert list(found) == ["near and far", "EA in a window"]
    for ((whole, last),) in found.values():
        assert 2 < whole < 6  # of 8 without training
        assert 2 < last < 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--heads", 0], "--heads must be at least 1, got 0"), (["--lengths", 1], "--lengths must be at least 2, got 1")],
)
def test_wrong_arguments_are_named(arguments, words):
    done = benchmark(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
