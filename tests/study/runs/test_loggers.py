import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from expressive_attention.study.cli.app import app
from expressive_attention.study.runs.loggers import LoggerError, Several, TensorBoard, WeightsAndBiases, make_loggers
from expressive_attention.study.runs.progress import Silent
from expressive_attention.study.runs.store import Store
from expressive_attention.study.training.loop import train_cell
from tests.study.tiny import TINY, cell, written

CELL = cell("dot_product", seeds=(3, 4, 5))


@pytest.fixture(scope="module")
def trained():
    """A cell's evaluations as they were reported, and its result."""
    told = []
    result = train_cell(CELL, lambda step, accuracy: told.append((step, accuracy)))
    return told, result


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "study")
    made.create(TINY).release()
    return made


@pytest.fixture
def means(trained):
    seeds = trained[1].seeds
    names = ("accuracy", "cross_entropy", "solved", "steps", "rollout_digits", "rollout_exact")
    return {f"test/{name}": sum(map(float, seeds[name])) / 3 for name in names}


def run_through(logger, store, trained, evaluations):
    """A run that trains one cell, whose last evaluations alone are told, while another is finished already."""
    told, result = trained
    other = cell("expressive")
    logger.begin(3, 0)
    logger.started(CELL)
    for step, accuracy in told[-evaluations:]:
        logger.advanced(CELL, step, accuracy)
    logger.note("something")
    logger.finished(other, "finished before")
    store.save(CELL, result)
    logger.finished(CELL, "done")
    logger.started(other)
    logger.advanced(other, 10, 0.5)
    logger.end()


# ---- TensorBoard ----


def events(folder):
    """Tag to steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def float32(pairs):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]


@pytest.mark.parametrize("evaluations", [3, 2])
def test_tensorboard_has_every_evaluation_and_the_final_measures(store, trained, means, evaluations):
    pytest.importorskip("tensorboard")
    told = trained[0]
    assert [step for step, _ in told] == [10, 20, 30]
    run_through(TensorBoard(store), store, trained, evaluations)
    names = {path.name: path for path in (store.directory / "tensorboard" / "a condition").iterdir()}
    assert sorted(names) == [
        "dot_product, final, learning rate 0.01, seeds 3 to 5",
        "expressive, final, learning rate 0.01, seeds 0 to 1",
    ]
    found = events(names["dot_product, final, learning rate 0.01, seeds 3 to 5"])
    assert sorted(found.pop("validation/accuracy")) == float32(told)
    assert found == {name: float32([(30, value)]) for name, value in means.items()}
    stopped = events(names["expressive, final, learning rate 0.01, seeds 0 to 1"])
    assert stopped == {"validation/accuracy": [(10, 0.5)]}


def test_a_cell_that_is_run_again_has_one_log(store, trained):
    pytest.importorskip("tensorboard")
    first = TensorBoard(store)
    first.started(CELL)
    first.advanced(CELL, 10, 0.9)
    first.end()
    run_through(TensorBoard(store), store, trained, 3)
    (folder,) = (store.directory / "tensorboard" / "a condition").glob("dot_product*")
    assert events(folder)["validation/accuracy"] == float32(trained[0])


def test_a_run_logs_all_of_its_cells(tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    path = written(tmp_path, tuning="1", learning_rates="[1e-2]")
    arguments = ["study", "run", str(path), "--out", str(out), "--quiet", "--log", "tensorboard"]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.output) == (0, "")
    (condition,) = (out / "tensorboard").iterdir()
    assert condition.name == "sum, basis 4, delay 2, rope"
    cells = {folder.name: events(folder) for folder in condition.iterdir()}
    assert sorted(cells) == [f"{m}, final, learning rate 0.01, seeds 0 to 1" for m in ("dot_product", "expressive")]
    assert all([step for step, _ in found["validation/accuracy"]] == [10, 20, 30] for found in cells.values())


# ---- Weights & Biases ----


class FakeRun:
    def __init__(self, arguments):
        self.arguments, self.logged, self.summary, self.metrics, self.ended = arguments, [], {}, [], []

    def define_metric(self, name, **arguments):
        self.metrics.append((name, arguments))

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code=0):
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    """A module in the place of wandb that records calls."""
    module = SimpleNamespace(runs=[], logins=0, account=True)

    def login():
        module.logins += 1
        if isinstance(module.account, Exception):
            raise module.account
        return module.account

    def init(**arguments):
        module.runs.append(FakeRun(arguments))
        return module.runs[-1]

    module.login, module.init = login, init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_has_a_run_per_cell(store, trained, means, wandb):
    told = trained[0]
    run_through(WeightsAndBiases(store), store, trained, 2)
    ours, other = wandb.runs
    arguments = ours.arguments
    assert wandb.logins == 1
    assert (arguments["project"], arguments["group"], arguments["job_type"]) == (
        "expressive-attention",
        "study",
        "final",
    )
    assert arguments["name"] == "a condition, dot_product, final, learning rate 0.01, seeds 3 to 5"
    assert (arguments["dir"], arguments["reinit"]) == (str(store.directory), "create_new")
    assert arguments["config"]["task"]["basis"] == 4
    assert arguments["config"]["mechanism"] == "dot_product"
    assert arguments["config"]["training"]["steps"] == 30
    assert ours.metrics == [("validation/accuracy", {"step_metric": "step"})]
    logged = [(values["step"], values["validation/accuracy"]) for values in ours.logged]
    assert logged == [*told[1:], (told[0][0], pytest.approx(told[0][1]))]
    assert ours.summary == pytest.approx(means)
    assert ours.ended == [0]
    assert (other.logged, other.summary, other.ended) == ([{"step": 10, "validation/accuracy": 0.5}], {}, [1])


def test_without_an_account_wandb_ends_before_any_work(tmp_path, wandb):
    arguments = ["study", "run", str(written(tmp_path)), "--out", str(tmp_path / "run"), "--log", "wandb"]
    for account, line in (
        (False, "ea: wandb: no account is known: run wandb login, or set WANDB_MODE=offline\n"),
        (RuntimeError("No API key\nconfigured."), "ea: wandb: No API key configured.\n"),
    ):
        wandb.account = account
        done = CliRunner().invoke(app, arguments)
        assert (done.exit_code, done.stderr) == (2, line)
    assert not (tmp_path / "run").exists()


def test_offline_wandb_needs_no_account(store, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    WeightsAndBiases(store)
    assert wandb.logins == 0


def test_wandb_itself_writes_a_run(store, trained, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_through(WeightsAndBiases(store), store, trained, 3)
    assert len(list((store.directory / "wandb").glob("offline-run-*/*.wandb"))) == 2


# ---- all of them ----


@pytest.mark.parametrize(
    ("name", "hidden", "words"),
    [
        ("tensorboard", ("tensorboard", "torch.utils.tensorboard", "torch.utils.tensorboard.writer"),
         ["the package 'tensorboard' is missing", "expressive-attention[tensorboard]"]),
        ("wandb", ("wandb",), ["the package 'wandb' is missing", "expressive-attention[wandb]"]),
        ("mlflow", (), ["--log must be one of ['tensorboard', 'wandb'], got 'mlflow'"]),
    ],
)  # fmt: skip
def test_a_missing_package_ends_with_one_line_before_any_work(tmp_path, monkeypatch, name, hidden, words):
    for module in hidden:
        monkeypatch.setitem(sys.modules, module, None)
    arguments = ["study", "run", str(written(tmp_path)), "--out", str(tmp_path / "run"), "--log", name]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)
    assert not (tmp_path / "run").exists()


def test_a_logger_is_made_once_and_none_if_one_of_them_is_wrong(store, wandb):
    (logger,) = make_loggers(["wandb", "wandb"], store)
    assert isinstance(logger, WeightsAndBiases)
    with pytest.raises(LoggerError, match="got 'x'"):
        make_loggers(["wandb", "x"], store)
    assert wandb.logins == 1


def test_all_are_told_and_a_logger_that_fails_is_left_out():
    class Record(Silent):
        def __init__(self):
            self.heard = []

        def begin(self, total_cells, finished_cells):
            self.heard.append((total_cells, finished_cells))

        def advanced(self, cell, step, accuracy):
            self.heard.append((step, accuracy))

        def note(self, message):
            self.heard.append(message)

        def end(self):
            self.heard.append("end")

    class Broken(Record):
        def advanced(self, cell, step, accuracy):
            raise OSError("disk full")

    first, broken, last = Record(), Broken(), Record()
    several = Several(first, [broken, last])
    several.begin(5, 3)
    several.started(CELL)
    several.advanced(CELL, 10, 0.25)
    several.advanced(CELL, 20, 0.5)
    several.finished(CELL, "done")
    several.end()
    note = "Broken: disk full; the run goes on without it"
    assert first.heard == [(5, 3), (10, 0.25), note, (20, 0.5), "end"]
    assert last.heard == [(5, 3), (10, 0.25), (20, 0.5), "end"]
    assert broken.heard == [(5, 3)]
