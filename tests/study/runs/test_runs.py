"""The command line from outside: whole runs, killed runs, runs with something wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from expressive_attention.study.cli.app import app
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.store import Store
from tests.study.tiny import TINY
from tests.waiting import is_alive, wait_until

COMMAND = [sys.executable, "-m", "expressive_attention"]


def ea_outside(*arguments, check):
    """The command in a process of its own, which imports torch for itself."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], check=False, capture_output=True, text=True)
    assert done.returncode == check, done.stderr
    return done


def ea(*arguments, check):
    """The command in this process."""
    done = CliRunner().invoke(app, [str(x) for x in arguments])
    assert done.exit_code == check, done.output
    return done


def config(directory, **replaced):
    text = TINY
    for key, value in replaced.items():
        assert f"{key} = " in text
        text = text.replace(f"{key} = ", f"{key} = {value}  # ")
    path = directory / "tiny.toml"
    path.write_text(text)
    return path


def finished(directory):
    return {p.name: p.stat().st_ino for p in (directory / "cells").glob("[!.]*")} if directory.exists() else {}


def start_and_wait_for_cells(path, out, count):
    """A run in a process group of its own, once it has finished `count` cells."""
    run = subprocess.Popen(
        [*COMMAND, "study", "run", path, "--out", out], start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: len(finished(out)) >= count or run.poll() is not None)
    assert run.poll() is None, run.communicate()
    return run


def wait_for_the_end_of(processes):
    wait_until(lambda: not any(map(is_alive, processes)))


def same_results(one, other):
    for table in ("seeds", "curves"):
        frames = [getattr(collect(Store(d)), table) for d in (one, other)]
        assert_frame_equal(*frames)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    done = ea_outside("study", "run", config(directory, steps="400"), "--out", directory / "run", check=0)
    return directory / "run", done


def test_a_run_writes_its_report_and_says_what_it_found(undisturbed):
    directory, done = undisturbed
    assert (directory / "report.html").stat().st_size > 700_000
    assert (directory / "figures" / "accuracy.png").exists()
    assert "[6/6]" in done.stdout
    assert "sum, basis 4, delay 2, rope: " in done.stdout
    assert str(directory / "report.html") in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_status_in_the_form_that_scripts_rely_on(undisturbed):
    directory, _ = undisturbed
    cells = json.loads(ea("study", "status", directory, "--json", check=0).stdout)["cells"]
    assert [c["mechanism"] for c in cells] == ["expressive", "dot_product"]
    seeds = collect(Store(directory)).seeds
    for c in cells:
        own = seeds.filter((seeds["mechanism"] == c["mechanism"]) & (seeds["role"] == "final"))
        assert (c["position"], c["seeds"], c["done"], c["solved"]) == ("rope", 2, True, own["solved"].sum())
        assert c["accuracy_mean"] == pytest.approx(own["accuracy"].mean())
        assert (c["task"]["basis"], c["task"]["delay"]) == (4, 2)
        assert (c["condition"], c["initial_gain"]) == ("sum, basis 4, delay 2, rope", 1.0)
    assert "all cells are finished" in ea("study", "status", directory, check=0).stdout


def test_a_run_that_is_killed_twice_goes_on_where_it_was(undisturbed, tmp_path):
    path, out, before = config(tmp_path, steps="400"), tmp_path / "run", {}
    for kill in (os.kill, os.killpg):
        run = start_and_wait_for_cells(path, out, len(before) + 1)
        found = subprocess.run(["pgrep", "-g", str(run.pid)], check=True, capture_output=True, text=True)
        kill(run.pid, signal.SIGKILL)
        run.communicate()
        wait_for_the_end_of(found.stdout.split())  # workers end with their parent
        assert before.items() < finished(out).items()
        before = finished(out)
    assert 2 <= len(before) < 6
    done = ea("study", "run", path, "--out", out, "--quiet", check=0)
    assert done.stdout == done.stderr == ""
    assert before.items() <= finished(out).items()
    assert not list((out / "cells").glob(".partial-*"))
    same_results(out, undisturbed[0])


def test_ctrl_c_ends_with_one_line(tmp_path):
    run = start_and_wait_for_cells(config(tmp_path, steps="800"), tmp_path / "run", 1)  # others are in training
    assert run.stdout is not None
    assert run.stdout.readline() == "6 cells, 0 finished before\n"
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate()
    assert run.returncode == 130
    assert errors.startswith("stopped; finished cells are kept")
    assert errors.count("\n") == 1


def test_a_corrupt_cell_is_named_and_computed_again_and_seeds_can_be_added(undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    damaged = sorted((out / "cells").glob("[!.]*"))[0] / "seeds.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    done = ea("study", "report", out, check=2)
    assert done.stderr.count("\n") == 1
    assert str(damaged) in done.stderr
    others = {name: inode for name, inode in finished(out).items() if name != damaged.parent.name}
    done = ea("study", "run", config(tmp_path, steps="400", final="4"), "--out", out, check=0)
    assert f"{damaged} is corrupt" in done.stdout
    assert others.items() <= finished(out).items()
    assert len(finished(out)) == 8
    assert damaged.read_bytes() == (undisturbed[0] / "cells" / damaged.parent.name / "seeds.parquet").read_bytes()


def test_a_folder_that_cannot_be_cleaned_ends_with_one_line_and_code_2(undisturbed, tmp_path, monkeypatch):
    out, path, cleaned = tmp_path / "run", config(tmp_path, steps="400"), []
    shutil.copytree(undisturbed[0], out)

    def fails(store, at):
        cleaned.append(store)
        if len(cleaned) == at:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "some/file")

    monkeypatch.setattr(Store, "clean", lambda store: fails(store, 1))
    done = ea("study", "run", path, "--out", out, check=2)
    assert done.stderr == "ea: some/file: Read-only file system\n"
    cleaned.clear()
    monkeypatch.setattr(Store, "clean", lambda store: fails(store, 2))  # in the end: the results are there
    assert ea("study", "run", path, "--out", out, "--quiet", check=0).output == ""
    assert len(cleaned) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nobody_takes_ends_with_one_line():
    with Path("/dev/full").open("w") as full:
        command = [*COMMAND, "study", "show", "quick"]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("ea: [Errno 28]")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "run", "quik"], ["no preset or file 'quik'", "quick"]),
        (["study", "show", "nothing"], ["no preset 'nothing'", "ladder"]),
        (["study", "report", "/nowhere"], ["/nowhere", "not a study"]),
        (["study", "status", "/nowhere", "--json"], ["/nowhere", "not a study"]),
    ],
)
def test_wrong_use_ends_with_one_line_and_code_2(arguments, words):
    done = ea(*arguments, check=2)
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)
    assert done.stdout == ""
    if arguments[1] == "run":
        outside = ea_outside(*arguments, check=2)
        assert (outside.stdout, outside.stderr) == ("", done.stderr)


def test_wrong_keys_end_with_one_line_and_code_2(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(TINY.replace("[seeds]", "[seeds]\nextra = 3"))
    done = ea("study", "run", path, "--out", tmp_path / "run", check=2)
    known = "tuning, final, confirmation, start, together"
    assert done.stderr == f"ea: {path}: seeds.extra: unknown key; known keys are {known}\n"
    assert not (tmp_path / "run").exists()


def test_the_small_commands():
    from importlib.metadata import version

    from expressive_attention.study.config.presets import preset_text

    assert ea_outside("--version", check=0).stdout == f"ea {version('expressive-attention')}\n"
    assert ea_outside("study", "show", "quick", check=0).stdout == preset_text("quick")
    info = ea("info", check=0).stdout
    assert all(word in info for word in ("torch", "processor", "reference", "blockwise", "available"))
    assert "Train EA against DPA" in ea_outside("study", "--help", check=0).stdout


@pytest.mark.parametrize(("package", "command"), [("typer", "--version"), ("polars", "study status /nowhere")])
def test_without_the_extra_one_line_names_it(package, command):
    code = f"import sys; sys.modules[{package!r}] = None; from expressive_attention.study.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command.split()], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert repr(package) in done.stderr
    assert "expressive-attention[study]" in done.stderr
    assert done.stderr.count("\n") == 1
