"""Studies on Ray: the same results as on worker processes, whatever is killed in the middle."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from expressive_attention.study.runs.engines import EngineError, LocalEngine, RayEngine
from expressive_attention.study.runs.progress import Silent
from expressive_attention.study.runs.scheduler import SweepError, run_study
from expressive_attention.study.runs.store import Store
from tests.study.runs.stores import finished, same_results
from tests.study.runs.workers import forked_workers
from tests.study.tiny import tiny, tiny_config, written
from tests.waiting import wait_until

pytest.importorskip("ray", reason="needs the extra 'ray'")

# Ray leaves sockets and processes to their ends, and announces what it will change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Record(Silent):
    """The calls of a display; `act` is done once, when a cell reaches this step."""

    def __init__(self, step=None, act=None):
        self.step, self.act = step, act
        self.begun, self.done, self.notes, self.steps = [], [], [], {}

    def started(self, cell):
        self.begun.append(cell.identity)

    def advanced(self, cell, step, accuracy):
        self.steps.setdefault(cell.identity, []).append(step)
        if self.act is not None and step >= self.step:
            self.act()
            self.act = None

    def finished(self, cell, summary):
        self.done.append(cell.identity)

    def note(self, message):
        self.notes.append(message)


def make_store(directory):
    store = Store(directory)
    store.create(tiny(steps="400")).release()
    return store


@pytest.fixture
def mark(monkeypatch):
    """A variable in the environment of all processes that the test starts, to find them by."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("EA_TEST_MARK", value)
    return value


def processes(mark, words=""):
    """Processes with the mark whose command line has these words."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if int(path.name) != os.getpid()
            and mark in contents(path / "environ") and words in contents(path / "cmdline")]  # fmt: skip


def contents(path):
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # the process has ended, or is another user's
        return ""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("local") / "study")
    with forked_workers():
        run_study(tiny_config(steps="400"), store, LocalEngine(2), Silent())
    return store


def test_a_study_has_the_same_results_as_on_local_workers_though_workers_are_killed(local, tmp_path, mark):
    store = make_store(tmp_path / "study")
    killed, far = [], []

    def kill():
        far.extend(cell for cell, steps in display.steps.items() if len(steps) > 1)  # with a checkpoint
        killed.extend(processes(mark, "ray::_run"))
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    display = Record(100, kill)
    run_study(tiny_config(steps="400"), store, RayEngine(2, checkpoint_seconds=0), display)
    assert 1 <= len(killed) <= 2
    assert 1 <= len(display.notes) <= len(killed)
    assert all("its Ray worker was lost" in note for note in display.notes)
    assert sorted(display.begun) == sorted(display.done) == sorted(finished(store))
    # The first evaluations were not done again: checkpoints were gone on from.
    assert far
    assert all(display.steps[cell].count(10) == 1 for cell in far)
    same_results(store, local)
    assert not list(store.cells.glob(".*"))
    wait_until(lambda: not processes(mark))


COMMAND = [sys.executable, "-m", "expressive_attention", "study", "run"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_a_driver_that_ends_in_the_middle_loses_no_finished_cell(local, tmp_path, mark, how):
    store = Store(tmp_path / "run")
    command = [*COMMAND, written(tmp_path, steps="400"), "--out", store.directory, "--workers", "2"]
    run = subprocess.Popen(
        [*command, "--engine", "ray"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_until(lambda: run.poll() is not None or len(finished(store)) >= 2)
    assert run.poll() is None, run.communicate()
    if how == "kill -9":
        run.kill()
    else:
        os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate()
    if how == "Ctrl-C":
        assert run.returncode == 130
        assert errors == f"stopped; finished cells are kept in {store.directory}: run the same command to resume\n"
    wait_until(lambda: not processes(mark))
    before = finished(store)
    assert 2 <= len(before) < 6
    subprocess.run([*command, "--quiet"], check=True, capture_output=True)
    assert all((store.cells / name).stat().st_ino == inode for name, inode in before.items())
    same_results(store, local)


@pytest.mark.slow
def test_a_node_of_a_cluster_that_is_lost_costs_no_cell(local, tmp_path):
    from ray.cluster_utils import Cluster

    store = make_store(tmp_path / "study")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        node = cluster.add_node(num_cpus=1)

        def lose():
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)

        display = Record(100, lose)
        run_study(tiny_config(steps="400"), store, RayEngine(1, cluster.address, checkpoint_seconds=0), display)
        assert len(display.notes) == 1
        assert "its Ray worker was lost" in display.notes[0]
    finally:
        cluster.shutdown()
    same_results(store, local)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", r"^no Ray cluster at 127\.0\.0\.1:1: Connection refused$"),
        ("here", r"^the address of a Ray cluster must be HOST:PORT or 'auto', got 'here'$"),
    ],
)
def test_a_cluster_that_is_not_there_is_named_in_one_line(tmp_path, address, words):
    with pytest.raises(EngineError, match=words):
        run_study(tiny_config(), make_store(tmp_path / "study"), RayEngine(1, address), Silent())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_named_in_one_line(tmp_path):
    with pytest.raises(EngineError, match=r"^this machine has no GPU, and each cell was to have 0\.25 of one$"):
        run_study(tiny_config(), make_store(tmp_path / "study"), RayEngine(1, gpus_per_cell=0.25), Silent())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_cell_is_sent_to_the_gpu_that_a_node_claims_to_have(tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    try:
        engine = RayEngine(2, cluster.address, gpus_per_cell=0.25)
        with pytest.raises(SweepError, match=r"expressive, tuning.*(CUDA|NVIDIA)"):
            run_study(tiny_config(), make_store(tmp_path / "study"), engine, Silent())
    finally:
        cluster.shutdown()
