import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from expressive_attention.nn import attend
from expressive_attention.study.cli.app import app
from expressive_attention.study.config import task_files as user_tasks
from expressive_attention.study.config.load import load_config
from expressive_attention.study.errors import ConfigError
from expressive_attention.study.runs.exported import load_results
from expressive_attention.study.runs.facts import KnownFacts
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.store import Store, StoreError
from expressive_attention.study.tasks import IGNORED, TASKS
from expressive_attention.study.tasks.rng import stream
from tests.processes import forking
from tests.study.own_files import (  # noqa: F401 two fixtures
    COMMANDS,
    ECHO,
    FILES,
    no_tasks_are_left,
    no_tasks_are_there,
    only_cell,
    written,
)
from tests.study.runs.workers import forked_workers
from tests.study.tiny import tiny

WITH_RULE = ECHO + '    formula = property(lambda self: f"repeat the digit {self.delay} before")\n'


@pytest.mark.pictures
def test_what_the_tutorial_shows_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(FILES) == {"echo.py", "study.toml"}
    for name, text in FILES.items():
        Path(name).write_text(text.replace("steps = 1000", "steps = 20").replace("every = 50", "every = 10"))
    assert [command.split()[2] for command in COMMANDS] == ["run", "status", "export", "verify"]
    for command in COMMANDS:
        done = CliRunner().invoke(app, command.split()[1:])
        assert done.exit_code == 0, done.output
    assert "1 of 1 cell has the same bits" in done.output
    assert Path("echo/report.html").stat().st_size > 700_000
    assert sorted(path.name for path in Path("echo/export").iterdir()) == [
        "about.json", "config.toml", "curves.csv", "record.json", "seeds.csv",
        "splits.csv", "summary.csv", "summary.tex", "verdicts.csv",
    ]  # fmt: skip


def test_a_file_with_the_import_of_the_first_tutorial_makes_the_same_task(tmp_path):
    """The file's text is part of the identity of its cells, so a study that was begun with it keeps it."""
    old = ECHO.replace("Task, stream", "Task\nfrom expressive_attention.study.streams import stream")
    assert old != ECHO
    with pytest.warns(FutureWarning, match="stream has moved to"):
        task = only_cell(written(tmp_path / "old", old)).task
    drawn = task.training_examples(stream(3, "training"), 5)
    TASKS.pop("echo")
    new = only_cell(written(tmp_path / "new")).task.training_examples(stream(3, "training"), 5)
    np.testing.assert_array_equal(drawn.inputs, new.inputs)


def test_the_tutorials_task_repeats_what_was_seen(tmp_path):
    task = only_cell(written(tmp_path)).task
    examples = task.training_examples(stream(3, "training"), 5)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        assert targets == [IGNORED] * 2 + inputs[:-2]
    assert len(np.unique(examples.inputs)) == 4


def test_a_study_with_its_own_task_can_be_moved(tmp_path):
    """The workers know the task; the copy is what is used later, wherever it is and whatever the file has become."""
    path = written(tmp_path / "mine")
    done = CliRunner().invoke(app, ["study", "run", str(path), "--out", str(tmp_path / "run"), "--quiet"])
    assert done.exit_code == 0, done.output
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere" / "run")
    assert (moved / "echo.py").read_text() == ECHO
    shutil.rmtree(tmp_path / "mine")
    (moved / "echo.py").unlink()  # reading does not run it
    TASKS.pop("echo")
    results = collect(Store(moved))
    assert results.unfinished == []
    assert results.conditions[0].label == "echo, basis 4, delay 2, rope"
    assert results.conditions[0].facts["complexity"] == 4
    assert len(results.seeds) == 8
    with pytest.raises(ConfigError, match=r"run/config.toml: task_files: .*echo\.py: cannot be read: No such file"):
        Store(moved).config(trust=True)


def test_the_text_is_part_of_the_identity_of_its_own_tasks_alone(tmp_path):
    first = only_cell(written(tmp_path / "a"))
    assert only_cell(written(tmp_path / "b", name="other_name.py")).identity == first.identity
    assert only_cell(written(tmp_path / "a", ECHO + "\n# edited\n")).identity != first.identity
    own = only_cell(written(tmp_path / "c", task="{ basis = 4, delay = 2 }"))
    path = tmp_path / "plain.toml"
    path.write_text(tiny())
    assert own.identity == only_cell(path).identity


def test_a_file_can_be_edited_within_a_process(tmp_path):
    old = only_cell(written(tmp_path)).task
    new = only_cell(written(tmp_path, ECHO.replace('f"echo, basis', 'f"ECHO, basis'))).task
    assert (old.label, new.label) == ("echo, basis 4, delay 2", "ECHO, basis 4, delay 2")
    assert pickle.loads(pickle.dumps(old)).label == old.label


def _in_a_new_process(connection):
    try:
        received = connection.recv()
        connection.send((received.task.label, received.identity, received.task.solve(np.arange(5)[None]).tolist()))
    except BaseException as error:
        connection.send(repr(error))


def test_a_task_travels_to_a_process_that_has_never_seen_its_file(tmp_path):
    sent = only_cell(written(tmp_path))
    shutil.rmtree(tmp_path / "tasks")
    context = forking()
    mine, theirs = context.Pipe()
    process = context.Process(target=_in_a_new_process, args=(theirs,))
    process.start()
    mine.send(sent)
    assert mine.poll(60)
    assert mine.recv() == (sent.task.label, sent.identity, [[3, 4, 0, 1, 2]])
    process.join()
    assert copy.deepcopy(sent.task) == sent.task
    assert "echo" in TASKS


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import math\nx = 1 +\n", ["line 2", "SyntaxError: invalid syntax"]),
        ("import math\n\nmath.nothing()\n", ["line 3", "AttributeError", "nothing"]),
        ("import no_such_module\n", ["line 1", "ModuleNotFoundError", "no_such_module"]),
        ("raise SystemExit(3)\n", ["line 1", "SystemExit: 3"]),
        ("x = 1\n", ["defines no task"]),
        (ECHO.replace('"echo"', '"nt"'), ["'nt'", "NTTask in expressive_attention.study.tasks.recurrences.nt"]),
        (ECHO + "\nclass Again(EchoTask):\n    pass\n", ["'echo' of Again", "already that of EchoTask in echo.py"]),
        (ECHO.replace("def chance", "def luck"), ["EchoTask lacks chance"]),
        (ECHO.replace("uint64(self.basis)", "uint64(self.basis + 1)"),
         ["EchoTask: training_examples must give targets from 0 to vocab_size - 1 = 3, got 0 to 4"]),
        (ECHO.replace("(count, self.context)", "(count, self.context + 1)"), ["shape (8, 16), int64, got (8, 17)"]),
        (ECHO.replace("numbers.astype(np.int64)", "numbers.astype(np.int32)"), ["int64, got (8, 16), int32"]),
        (ECHO.replace("bits.random_raw((count", "np.random.Philox().random_raw((count"),
         ["the same examples when asked for the same"]),
        (ECHO.replace("targets[:, : self.delay]", "targets[:, :]"), ["no position that is scored"]),
        (ECHO.replace("examples(bits, count)\n\n    def held", "examples(bits, count + 1)\n\n    def held"),
         ["training_examples(bits, 8) must give 8 examples, got 9"]),
        (ECHO.replace("1 / self.basis", "np.nan"), ["chance must be a finite number, got nan"]),
        (ECHO.replace("np.roll(inputs", "np.rol(inputs"), ["echo.py, line", "AttributeError", "'rol'"]),
        (ECHO.replace('return f"echo, ', 'return none + f"echo, '), ["echo.py, line", "NameError", "'none'"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_in_one_line_before_any_work(tmp_path, source, words):
    assert source != ECHO
    path = written(tmp_path, source)
    before = dict(TASKS)
    done = CliRunner().invoke(app, ["study", "run", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("ea: ")
    assert all(word in done.stderr for word in [*words, "echo.py"]), done.stderr
    assert not (tmp_path / "run").exists()
    assert {kind for kind in before if TASKS[kind] is not before[kind]} == set()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["missing.py"], ["task_files: ", "missing.py: cannot be read: No such file"]),
        (["tasks/echo.txt"], ["task_files: names must end with .py, got 'tasks/echo.txt'"]),
        (["tasks/echo.py", "again.py"], ["'echo'", "EchoTask in echo.py"]),
        (["tasks/echo.py", "other/echo.py"], ["task_files"]),
        ([3], ["task_files.0", "got 3"]),
        (["tasks/ec\0ho.py"], [r"task_files: names must end with .py, without NUL, got 'tasks/ec\x00ho.py'"]),
    ],
)
def test_wrong_names_of_files_are_named(tmp_path, files, words):
    path = written(tmp_path, files=files)
    (tmp_path / "again.py").write_text(ECHO + "\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "echo.py").write_text(ECHO.replace("echo", "other"))
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_kind_of_another_file_is_not_there_without_it(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("task_files", "# task_files"))
    with pytest.raises(ConfigError, match=r"grid\.task\.kind must be one of .*got 'echo'"):
        load_config(str(path))


def test_an_error_is_laid_to_the_file_it_came_from_alone(tmp_path):
    task = only_cell(written(tmp_path, ECHO.replace("return np.roll", "self.basis // 0\n        return np.roll"),
                             task="{ basis = 4, delay = 2 }")).task  # fmt: skip
    assert user_tasks.file_of(task) is None
    echo = TASKS["echo"](basis=4, delay=2)
    with pytest.raises(ZeroDivisionError) as caught:
        echo.solve(np.zeros((1, 16), int))
    line = ECHO[: ECHO.index("return np.roll")].count("\n") + 1
    assert user_tasks.blame(caught.value) == f"{tmp_path}/tasks/echo.py, line {line}: {caught.exconly()}"
    assert user_tasks.blame(ValueError("mine")) is None


def test_a_study_keeps_files_only_in_a_folder_of_its_own(tmp_path):
    config, text = load_config(str(written(tmp_path)))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "echo.py").write_text("half written by a run that was killed")
    Store(folder).create(text, config.sources, config.record()).release()
    assert (folder / "echo.py").read_text() == ECHO
    assert Store(folder).config(trust=True)[0].sources == config.sources
    assert Store(folder).config()[0].sources == ()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.py").write_text("mine")
    with pytest.raises(StoreError, match="not empty and not a study"):
        Store(tmp_path / "full").create(text, config.sources)


# ---- reading runs no code ----


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """A study of a task of its own, run."""
    directory = tmp_path_factory.mktemp("own")
    path = written(directory, WITH_RULE)
    with forked_workers():
        done = CliRunner().invoke(app, ["study", "run", str(path), "--out", str(directory / "run"), "--quiet"])
    assert done.exit_code == 0, done.output
    return directory / "run"


@pytest.fixture
def hostile(run_once, tmp_path):
    """The study, with a file of tasks that tells when it is run."""
    shutil.copytree(run_once, tmp_path / "run")
    (tmp_path / "run" / "echo.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'was run')!r}).touch()\n{ECHO}"
    )
    return tmp_path / "run"


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["report"], ["export"]])
def test_reading_a_study_does_not_run_its_files(hostile, command):
    done = CliRunner().invoke(app, ["study", command[0], str(hostile), *command[1:]])
    assert done.exit_code == 0, done.output
    assert "echo" in done.output or command[0] == "export"
    assert not (hostile.parent / "was run").exists()


@pytest.mark.parametrize("command", [["study", "verify"], ["study", "limit"], ["study", "twins"], ["geometry"]])
def test_what_needs_the_tasks_says_so_and_asks(hostile, command):
    done = CliRunner().invoke(app, [*command, str(hostile)])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "--trust" in done.stderr
    assert not (hostile.parent / "was run").exists()
    (hostile / "record.json").unlink()
    CliRunner().invoke(app, [*command, str(hostile), "--trust"])
    assert (hostile.parent / "was run").exists()


def test_what_the_limit_of_own_tasks_is_can_be_exported_without_trust(run_once, hostile):
    shutil.copy(run_once / "echo.py", hostile)
    done = CliRunner().invoke(app, ["study", "limit", str(hostile), "--trust"])
    assert done.exit_code == 0, done.output
    (hostile / "echo.py").write_text("raise RuntimeError('was run')")
    assert CliRunner().invoke(app, ["study", "export", str(hostile)]).exit_code == 0
    assert len((hostile / "export" / "limit.csv").read_text().splitlines()) == 1 + 2  # a head and two seeds


READING = [["status"], ["export"], ["compare"], ["report"], ["verify"], ["limit"], ["twins"]]


@pytest.mark.parametrize("command", READING, ids=[command[0] for command in READING])
def test_without_a_record_every_command_takes_the_option_that_it_asks_for(run_once, tmp_path, command):
    shutil.copytree(run_once, tmp_path / "run")
    (tmp_path / "run" / "record.json").unlink()
    folders = [str(tmp_path / "run")] * (2 if command == ["compare"] else 1)
    done = CliRunner().invoke(app, ["study", *command, *folders])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "record.json is missing: only --trust" in done.stderr
    done = CliRunner().invoke(app, ["study", *command, *folders, "--trust"])
    assert done.exit_code == 0, done.output


def test_an_export_is_read_without_running_code(hostile):
    assert CliRunner().invoke(app, ["study", "export", str(hostile), "-f", "parquet"]).exit_code == 0
    export = hostile / "export"
    assert not list(export.glob("*.py"))
    assert load_results(export).seeds.height == 8
    assert load_results(export).conditions == collect(Store(hostile)).conditions
    assert [condition.formula for condition in load_results(export).conditions] == ["repeat the digit 2 before"]
    done = CliRunner().invoke(app, ["study", "compare", str(hostile), str(export)])
    assert done.exit_code == 0, done.output
    assert "differ on 0 of 1 condition" in done.output
    assert not (hostile.parent / "was run").exists()
    (export / "record.json").unlink()
    with pytest.raises(
        StoreError, match=r"record.json is missing, and echo.py is not there, .* export the study again"
    ):
        load_results(export)


@pytest.mark.parametrize("command", [["study", "limit"], ["study", "verify"], ["study", "report"], ["geometry"]])
def test_a_file_that_was_edited_is_named_and_not_run(hostile, command):
    """Its cells have another identity: the finished ones would seem not to be there."""
    done = CliRunner().invoke(app, [*command, str(hostile), "--trust"])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "echo.py has changed since the study ran, and its finished cells are not of this file" in done.stderr
    assert not (hostile.parent / "was run").exists()


def test_facts_are_those_of_the_file_that_counted_them(tmp_path):
    facts = KnownFacts(tmp_path / "facts.json")
    first = facts.of(only_cell(written(tmp_path)).task, 16)
    other = facts.of(only_cell(written(tmp_path, ECHO.replace("return 1 / self.basis", "return 0.125"))).task, 16)
    assert (first["chance"], other["chance"]) == (0.25, 0.125)


def test_a_run_folder_is_run_with_its_own_copies(run_once, tmp_path):
    """Its configuration names the file where it once was."""
    shutil.copytree(run_once, tmp_path / "run")
    config, text = load_config(str(tmp_path / "run" / "config.toml"))
    assert 'task_files = ["tasks/echo.py"]' in text
    assert [file.text for file in config.sources] == [WITH_RULE]
    (tmp_path / "run" / "tasks").mkdir()
    (tmp_path / "run" / "tasks" / "echo.py").write_text("raise RuntimeError('of something else')")
    assert load_config(str(tmp_path / "run" / "config.toml"))[0].sources == config.sources


@pytest.mark.parametrize(("content", "words"), [(None, "is missing"), ("{}", "is not what was written")])
def test_without_a_record_of_its_tasks_a_study_asks(hostile, content, words):
    (hostile / "record.json").unlink()
    if content:
        (hostile / "record.json").write_text(content)
    done = CliRunner().invoke(app, ["study", "status", str(hostile)])
    assert done.exit_code == 2
    assert f"record.json {words}: only --trust" in done.stderr
    assert not (hostile.parent / "was run").exists()


def test_a_task_that_exits_is_a_failure_of_the_task(tmp_path):
    source = ECHO.replace("return np.roll", "raise SystemExit('gone')\n        return np.roll")
    done = CliRunner().invoke(app, ["study", "run", str(written(tmp_path, source)), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "echo.py, line" in done.stderr
    assert "SystemExit: gone" in done.stderr


def test_a_task_that_exits_in_training_is_not_run_again(tmp_path):
    """Training alone asks for 1024 examples at once."""
    source = ECHO.replace(
        "targets[:, : self.delay]", "exit(7) if count == 1024 else None\n        targets[:, : self.delay]"
    )
    assert source != ECHO
    done = CliRunner().invoke(app, ["study", "run", str(written(tmp_path, source)), "--out", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert "SystemExit: 7" in done.output
    assert "out of memory" not in done.output


# ---- mechanisms ----

CUBIC = """
import torch

def cubic(z):
    return z.abs() ** 3

WEIGHTS = {"cubic": cubic}
LOG_WEIGHTS = {"tempered": lambda z: 0.5 * z}
"""


def own_mechanism(directory, source=CUBIC, mechanisms=("cubic", "dot_product", "tempered")):
    directory.mkdir(exist_ok=True)
    (directory / "cubic.py").write_text(source)
    path = directory / "study.toml"
    path.write_text('mechanism_files = ["cubic.py"]\n' + tiny(mechanisms=json.dumps(mechanisms)))
    return path


def test_a_study_of_mechanisms_of_ones_own(tmp_path):
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["study", "run", str(own_mechanism(tmp_path)), "--out", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    (out / "cubic.py").write_text("raise RuntimeError('was run')")
    results = collect(Store(out))
    assert results.mechanisms == ["cubic", "dot_product", "tempered"]
    assert results.unfinished == []
    assert results.seeds.group_by("mechanism").len().sort("mechanism")["len"].to_list() == [4, 4, 4]
    (out / "cubic.py").write_text(CUBIC)
    done = CliRunner().invoke(app, ["study", "verify", str(out), "--trust"])
    assert done.exit_code == 0, done.output


def test_own_mechanisms_weigh_as_they_say(tmp_path):
    cells = {c.mechanism: c.tuning_cells()[0] for c in load_config(str(own_mechanism(tmp_path)))[0].arms()}
    z = torch.randn(2, 3, 5, dtype=torch.float64)
    eye, q = torch.eye(5, dtype=torch.float64).expand(2, 5, 5), torch.randn(2, 3, 5, dtype=torch.float64)
    found = attend(cells["cubic"].function, q, 5**0.5 * eye, eye)
    torch.testing.assert_close(found, q.abs() ** 3 / (q.abs() ** 3).sum(-1, keepdim=True))
    found = attend(cells["tempered"].function, z, 5**0.5 * eye, eye)
    torch.testing.assert_close(found, (0.5 * z).softmax(-1))


def test_the_text_of_its_file_is_part_of_what_a_mechanism_is(tmp_path):
    def identities(source):
        config, _ = load_config(str(own_mechanism(tmp_path, source)))
        return {c.mechanism: c.tuning_cells()[0].identity for c in config.arms()}

    first, other = identities(CUBIC), identities(CUBIC.replace("** 3", "** 5"))
    assert first["cubic"] != other["cubic"]
    assert first["dot_product"] == other["dot_product"]
    cell = load_config(str(own_mechanism(tmp_path, CUBIC)))[0].arms()[0].tuning_cells()[0]
    assert pickle.loads(pickle.dumps(cell)).identity == cell.identity == first["cubic"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", "defines no mechanism: no dictionary WEIGHTS or LOG_WEIGHTS"),
        ("WEIGHTS = [3]", "WEIGHTS must be a dictionary of names and functions, got list"),
        ("import torch\nWEIGHTS = torch.ones(3)", "WEIGHTS must be a dictionary of names and functions, got Tensor"),
        ("LOG_WEIGHTS = None", "LOG_WEIGHTS must be a dictionary of names and functions, got NoneType"),
        ("WEIGHTS = {'abs_again': abs}", "abs_again: a name must not end with _again"),
        ("import torch\nWEIGHTS = {'mine': torch.rand_like}", "mine must give the same weights for the same z"),
        ("WEIGHTS = {'mine': lambda z: z.softmax(-1)}", "mine must act element by element: z = -3 gives 0.024"),
        ("LOG_WEIGHTS = {'mine': lambda z: z - z.max()}", "among other scores, and 0 alone"),
        ("import torch\nWEIGHTS = {'mine': lambda z: z.abs() * torch.arange(7)[:z.shape[-1]]}", "must act element by"),
        ("WEIGHTS = {'mine': lambda z: z.abs() ** (1 + 1 / z.shape[-1])}", "mine must act element by element"),
        ("WEIGHTS = {'mine': lambda z: z.numpy()}", "mine: RuntimeError: Can't call numpy() on Tensor"),
        ("WEIGHTS = {'mine': lambda z: exit(3)}", "mine: SystemExit: 3"),
        (
            "WEIGHTS = {'mine': lambda z: [z]}",
            "mine must give a tensor of the shape and dtype of z, (2, 7), torch.float32",
        ),
        ("raise RuntimeError('first\\nframe #0: second')", "line 1: RuntimeError: first"),
        ("WEIGHTS = {'mine': abs}\n\0", "cubic.py: SyntaxError: source code string cannot contain null bytes"),
        ("WEIGHTS = {'a b': abs}", "must map names to functions, got 'a b'"),
        ("WEIGHTS = {'mine': 3}", "must map names to functions, got 'mine': 3"),
        ("WEIGHTS = {'sigmoid': abs}", "there is a mechanism 'sigmoid' already, in the package"),
        ("WEIGHTS = {'mine': lambda z: z}", "mine must give finite weights of at least 0, got -3 to 3"),
        ("WEIGHTS = {'mine': lambda z: z.sum()}", "mine must give a tensor of the shape and dtype of z, (2, 7)"),
        ("WEIGHTS = {'mine': lambda z: z.nothing()}", "mine: AttributeError"),
        ("x = ", "line 1: SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_file_of_mechanisms_is_said(tmp_path, source, words):
    with pytest.raises(ConfigError) as caught:
        load_config(str(own_mechanism(tmp_path, source, ["dot_product"])))
    assert words in str(caught.value)
    assert "study.toml: mechanism_files: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "#0" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"mechanisms must be of .*'cubic'.* got 'quintic'"):
        load_config(str(own_mechanism(tmp_path, CUBIC, ["quintic"])))
