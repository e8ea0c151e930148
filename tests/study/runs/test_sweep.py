import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from expressive_attention.study.analysis.trained import cells_by_seed
from expressive_attention.study.cli.app import app
from expressive_attention.study.config.condition import Setting
from expressive_attention.study.runs import scheduler as sweep
from expressive_attention.study.runs import store as store_module
from expressive_attention.study.runs.engines import LocalEngine
from expressive_attention.study.runs.engines.base import reason
from expressive_attention.study.runs.progress import Silent
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.scheduler import SweepError, run_study
from expressive_attention.study.runs.selection import finished_cells
from expressive_attention.study.runs.store import Store
from tests.study.runs.stores import finished, same_results
from tests.study.tiny import tiny, tiny_config, written


class Record(Silent):
    """The calls of a display."""

    def __init__(self):
        self.total = self.before = self.ended = 0
        self.begun, self.done, self.notes = [], [], []

    def begin(self, total_cells, finished_cells):
        self.total, self.before = total_cells, finished_cells

    def started(self, cell):
        self.begun.append(cell.identity)

    def finished(self, cell, summary):
        self.done.append(cell)

    def note(self, message):
        self.notes.append(message)

    def end(self):
        self.ended += 1


def make_store(directory, **replaced):
    store = Store(directory)
    store.create(tiny(**replaced))
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished study, by workers as users have them."""
    store, display = make_store(tmp_path_factory.mktemp("sweep") / "study"), Record()
    run_study(tiny_config(), store, LocalEngine(2), display)
    return store, display


def test_all_cells_are_run_once_and_told(whole):
    store, display = whole
    assert (display.total, display.before, display.ended, display.notes) == (6, 0, 1, [])
    assert sorted(cell.identity for cell in display.done) == sorted(display.begun) == sorted(finished(store))
    roles = {mechanism: [c.role for c in display.done if c.mechanism == mechanism] for mechanism in
             ("expressive", "dot_product")}  # fmt: skip
    assert set(map(tuple, roles.values())) == {("tuning", "tuning", "final")}


def test_a_finished_study_is_not_run_again(whole):
    store, display = whole[0], Record()
    before = finished(store)
    run_study(tiny_config(), store, LocalEngine(2), display)
    assert (display.total, display.before, display.done, display.begun, display.ended) == (6, 6, [], [], 1)
    assert finished(store) == before


def test_fewer_seeds_are_taken_out_of_the_cells_that_have_them(whole, tmp_path):
    shutil.copytree(whole[0].directory, tmp_path / "study")
    more, before = collect(whole[0]), finished(whole[0])
    store, display = make_store(tmp_path / "study", final="1"), Record()
    run_study(tiny_config(final="1"), store, LocalEngine(2), display)
    assert (display.total, display.before, display.done) == (6, 6, [])
    assert finished(store).keys() == before.keys()
    fewer = collect(store)
    assert fewer.unfinished == []
    for name in ("seeds", "curves", "splits"):
        kept = getattr(more, name).filter((pl.col("role") == "tuning") | (pl.col("seed") == 0))
        assert_frame_equal(getattr(fewer, name), kept)
    assert [list(cells_by_seed(fewer, store, arm)) for arm in tiny_config(final="1").arms()] == [[0], [0]]


def test_another_learning_rate_adds_its_tuning_cells_and_the_count_reaches_the_total(whole, tmp_path, monkeypatch):
    chosen = {cell.mechanism: Setting(cell.learning_rate, 1.0) for cell in whole[1].done if cell.role == "final"}
    monkeypatch.setattr(sweep, "choose_setting", lambda results: chosen[next(iter(results))[0].mechanism])
    shutil.copytree(whole[0].directory, tmp_path / "study")
    rates = "[1e-2, 2e-2, 3e-2]"
    store, display = make_store(tmp_path / "study", learning_rates=rates), Record()
    before = finished(store)
    run_study(tiny_config(learning_rates=rates), store, LocalEngine(2), display)
    assert before.items() <= finished(store).items()
    assert [cell.learning_rate for cell in display.done if cell.role == "tuning"] == [3e-2] * 2
    assert finished(store).keys() - before.keys() == {c.identity for c in display.done if c.role == "tuning"}
    assert display.total == 8
    assert display.before + len(display.done) == display.total


def test_a_cell_that_cannot_be_saved_ends_the_run(whole, tmp_path):
    """The others were trained for nothing: on a full disk none of them could be saved."""
    store = make_store(tmp_path / "study")

    class Vandal(Record):
        def finished(self, cell, summary):
            super().finished(cell, summary)
            store.cells.rename(tmp_path / "cells")

    display = Vandal()
    with pytest.raises(SweepError, match=r"sum, basis 4, .*: it cannot be saved \(FileNotFoundError.*the run ends"):
        run_study(tiny_config(), store, LocalEngine(1), display)
    assert len(display.begun) == 2
    assert display.ended == 1
    (tmp_path / "cells").rename(store.cells)  # there is room again
    run_study(tiny_config(), store, LocalEngine(2), Record())
    same_results(store, whole[0])


class Advances(Record):
    """Does something at the first evaluations of cells at this step."""

    def __init__(self, step, act, cells=100):
        super().__init__()
        self.step, self.act, self.left = step, act, cells
        self.seen = {}

    def advanced(self, cell, step, accuracy):
        seen = self.seen.setdefault(cell.identity, [])
        if step == self.step and step not in seen and self.left:
            self.left -= 1
            self.act()
        seen.append(step)


def kill_workers():
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def test_a_worker_that_is_killed_is_named_and_its_cell_goes_on_from_its_checkpoint(whole, tmp_path):
    store, display = make_store(tmp_path / "study"), Advances(20, kill_workers, cells=2)
    run_study(tiny_config(), store, LocalEngine(1, checkpoint_seconds=0), display)
    assert len(display.notes) == 2
    assert all("its worker process died (killed, or out of memory); it goes on" in note for note in display.notes)
    assert {note.split(": its")[0] for note in display.notes} <= {str(cell) for cell in display.done}
    assert len(display.begun) == len(display.done) == 6
    # The evaluation at step 10 was not done again: the checkpoint after it was gone on from.
    assert len(display.seen) == 6
    assert all(seen.count(10) == 1 for seen in display.seen.values())
    same_results(store, whole[0])
    assert not list(store.cells.glob(".*"))


def test_workers_that_die_as_they_start_lose_nothing(whole, tmp_path):
    class Killer(Record):
        def started(self, cell):
            super().started(cell)
            if len(self.begun) < 3:
                kill_workers()

    store, display = make_store(tmp_path / "study"), Killer()
    run_study(tiny_config(), store, LocalEngine(2), display)
    assert 2 <= len(display.notes) <= 3  # the second time, the first cell may be at work, too
    same_results(store, whole[0])


def test_a_cell_that_kills_its_workers_is_given_up_and_the_others_go_on(tmp_path):
    store = make_store(tmp_path / "study")

    class Killer(Record):
        def advanced(self, cell, step, accuracy):
            if cell.mechanism == "expressive" and cell.learning_rate == 1e-2:
                kill_workers()

    display = Killer()
    with pytest.raises(SweepError, match=r"1 cell failed, the first: .*expressive, tuning, learning rate 0\.01: "
                       r"its worker process died \(killed, or out of memory\), 3 times"):  # fmt: skip
        run_study(tiny_config(), store, LocalEngine(1), display)
    assert len(display.notes) == 3
    assert len(finished(store)) == 4  # all but this one and the final one that waits for it


def test_a_run_that_is_stopped_goes_on_from_its_checkpoints(whole, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    store, display = make_store(tmp_path / "study"), Advances(20, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny_config(), store, LocalEngine(1, checkpoint_seconds=0), display)
    assert multiprocessing.active_children() == []
    (checkpoint,) = store.cells.iterdir()
    again = Advances(0, None)
    run_study(tiny_config(), store, LocalEngine(1), again)
    resumed = again.seen[checkpoint.name.removeprefix(".checkpoint-")]
    assert resumed[0] > 10
    assert sum(len(seen) for seen in again.seen.values()) < 18
    assert again.notes == []
    same_results(store, whole[0])
    assert not list(store.cells.glob(".*"))


def test_a_corrupt_checkpoint_is_named_and_its_cell_trained_from_the_start(whole, tmp_path):
    store, display = make_store(tmp_path / "study"), Record()
    path = store.checkpoint(whole[1].done[0])
    path.write_bytes(b"half a checkpoint")
    run_study(tiny_config(), store, LocalEngine(2), display)
    (note,) = display.notes
    assert note.startswith(f"{path} is corrupt")
    same_results(store, whole[0])


def test_checkpoints_of_finished_cells_and_half_written_ones_are_removed(whole, tmp_path):
    shutil.copytree(whole[0].directory, tmp_path / "study")
    store = Store(tmp_path / "study")
    stray, waiting = store.checkpoint(whole[1].done[0]), store.cells / ".checkpoint-0123456789abcdef"
    for path in (stray, waiting, store.cells / f".{waiting.name}-half"):
        path.touch()
    store.clean()
    assert list(store.cells.glob(".*")) == [waiting]


def test_without_ray_one_line_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, ["study", "run", "quick", "--engine", "ray", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'expressive-attention[ray]'" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "slurm"], "--engine must be 'local' or 'ray', got 'slurm'"),
        (["--address", "auto"], "--address is for --engine ray, got 'auto' with --engine local"),
        (["--engine", "ray", "--address", "auto", "--workers", "3"], "--workers does not apply to a cluster"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--engine", "ray", "--device", "cuda:0"], "--device must be 'cpu' or 'cuda' with --engine ray"),
        (["--gpus-per-cell", "0.5"], "--gpus-per-cell is for --engine ray --device cuda, got --engine local"),
        (["--engine", "ray", "--device", "cuda", "--gpus-per-cell", "2"], "above 0 and at most 1, got 2"),
    ],
)
def test_engines_that_do_not_fit_are_refused_in_one_line(tmp_path, options, words):
    result = CliRunner().invoke(app, ["study", "run", "quick", "--out", str(tmp_path / "run"), *options])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_run_changes_nothing_while_the_first_is_at_work(tmp_path):
    store = make_store(tmp_path / "study")
    lock = store.lock()
    other = written(tmp_path, final="5")
    result = CliRunner().invoke(app, ["study", "run", str(other), "--out", str(store.directory)])
    lock.release()
    assert result.exit_code == 2
    assert result.stderr == f"ea: {store.directory}: another run is writing to this study\n"
    assert store.config()[1] == f"protocol = 3\n{tiny()}"


@pytest.mark.parametrize("seconds", [0.0, 0.5])  # they are being spawned; they are importing
def test_ctrl_c_while_the_workers_start_ends_with_one_line(seconds, tmp_path):
    command = [sys.executable, "-m", "expressive_attention", "study", "run"]
    run = subprocess.Popen(
        [*command, written(tmp_path, steps="20000"), "--out", tmp_path / "run"],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "6 cells, 0 finished before\n"
        time.sleep(seconds)
        os.killpg(run.pid, signal.SIGINT)
        _, errors = run.communicate()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
    assert run.returncode == 130
    assert errors == f"stopped; finished cells are kept in {tmp_path / 'run'}: run the same command to resume\n"


def test_a_setting_is_chosen_once(whole, monkeypatch):
    """The number of cells is asked for after each of them: it read all tuning cells every time."""
    plan, read = sweep._Plan(tiny_config(), whole[0], Record()), []
    counted = whole[0].counted
    monkeypatch.setattr(whole[0], "counted", lambda cell: read.append(cell) or counted(cell))
    assert plan.total_cells() == plan.total_cells() == 6
    assert len(read) == 4


@pytest.mark.parametrize("before", range(6))
def test_a_tuning_cell_that_ends_meanwhile_does_not_hide_the_final_ones(whole, tmp_path, monkeypatch, before):
    """On disk, but its worker has not told yet: missing at the first looks, and there at the others."""
    store, config = make_store(tmp_path / "study"), tiny_config()
    first, second = config.arms()[0].tuning_cells()
    plan = sweep._Plan(config, store, Record())
    assert len(plan.ready()) == 4
    for cell in (first, second):
        shutil.copytree(whole[0].path(cell), store.path(cell))
    truth, looks = store.has, iter([False] * before)

    def has(cell):
        return truth(cell) and (cell != second or next(looks, True))

    monkeypatch.setattr(store, "has", has)
    (final,) = [*plan.after(first), *plan.after(second)]
    assert final.role == "final"


# ---- confirmation on fresh seeds ----


@pytest.mark.parametrize(("solved", "confirmed"), [((2, 0), True), ((0, 2), True), ((2, 2), False), ((1, 0), False)])
def test_a_range_that_the_final_seeds_show_gets_fresh_seeds(tmp_path, monkeypatch, solved, confirmed):
    text = tiny(learning_rates="[1e-2]").replace("[seeds]", "[seeds]\nconfirmation = 3")
    text = text.replace("mechanisms =", 'claims = ["exclusive_range"]\nmechanisms =')
    shares = dict(zip(("expressive", "dot_product"), solved, strict=True))
    truth = store_module.Store.load

    def load(store, cell, *, weights=False):
        result = truth(store, cell, weights=weights)
        if cell.role != "final":
            return result
        seeds = result.seeds.with_columns(solved=pl.int_range(pl.len()) < shares[cell.mechanism])
        return dataclasses.replace(result, seeds=seeds)

    monkeypatch.setattr(store_module.Store, "load", load)
    store = Store(tmp_path / "study")
    store.create(text)
    display = Record()
    added = []
    display.added = added.append
    run_study(store.config()[0], store, LocalEngine(1), display)
    fresh = [cell for cell in display.done if cell.role == "confirmation"]
    assert sum(added) == len(fresh) == (4 if confirmed else 0)  # two cells a side, of two seeds and one
    assert display.total == 2
    assert (
        sorted(seed for cell in fresh for seed in cell.seeds) == [2_000_000 + i // 2 for i in range(6)][: 6 * confirmed]
    )
    cells, unfinished = finished_cells(store, store.config()[0])
    assert (len(cells), unfinished) == (2 + len(fresh), [])
    again = Record()
    run_study(store.config()[0], store, LocalEngine(1), again)
    assert (again.total, again.before, again.done) == (2 + len(fresh), 2 + len(fresh), [])
    if confirmed:
        shutil.rmtree(store.path(fresh[0]))
        run_study(store.config()[0], store, LocalEngine(1), again)
        assert [cell.identity for cell in again.done] == [fresh[0].identity]


def test_the_reason_of_a_failure_is_the_first_line_of_its_message():
    error = RuntimeError("\nsizes differ\nException raised from add at a.cpp:3 (most recent call first):\nframe #0: b")
    assert reason(error) == "RuntimeError: sizes differ"
    assert reason(ValueError()) == "ValueError"
