"""The command ``ea`` starts with what its help and completion need, whichever way it is called."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table
from typer.main import get_command
from typer.testing import CliRunner

from expressive_attention.study.cli.app import app
from expressive_attention.study.cli.common import print_table
from expressive_attention.study.config.presets import preset_names, preset_text
from expressive_attention.study.report.export import FORMATS, export_study
from expressive_attention.study.runs.loggers import LOGGERS
from tests.study.report_data import make_condition, results_of, seed_row
from tests.study.tiny import tiny

HEAVY = {"torch", "numpy", "scipy", "polars", "matplotlib"}

# Runs `python -m expressive_attention`, then says on stderr which of the heavy packages were imported.
PROBE = f"""
import atexit, runpy, sys
atexit.register(lambda: sys.stderr.write(repr(sorted({HEAVY} & set(sys.modules)))))
runpy.run_module("expressive_attention", run_name="__main__")
"""


def light(*arguments, **environment):
    """The text that a command prints, if it ends well and without the heavy packages."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], check=True, capture_output=True, text=True,
        env={**os.environ, "TERMINAL_WIDTH": "300", "COLUMNS": "300", **environment},
    )  # fmt: skip
    assert done.stderr == "[]"
    return done.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["Usage: ea [OPTIONS] COMMAND", "study", "geometry", "bench", "info"]),
        ("study", ["Usage: ea study", "list", "run", "report", "status", "compare", "export", "verify", "show"]),
        ("bench", ["Usage: ea bench", "--backend", "[default: (1, 2)]"]),
        ("info", ["Usage: ea info"]),
        ("geometry", ["Usage: ea geometry", "[RUN]"]),
        ("study run", ["Usage: ea study run", ", ".join(preset_names()), "|".join(LOGGERS), "[default: (runs/NAME)]"]),
        ("study report", ["Usage: ea study report", "DIR"]),
        ("study compare", ["Usage: ea study compare", "A", "B"]),
        ("study status", ["Usage: ea study status", "DIR"]),
        ("study export", ["Usage: ea study export", "|".join(FORMATS)]),
        ("study verify", ["Usage: ea study verify", "DIR"]),
        ("study show", ["Usage: ea study show", "PRESET"]),
    ],
)
def test_help_needs_nothing_heavy(command, words):
    text = light(*command.split(), "--help")
    assert [word for word in words if word not in text] == []


def test_other_commands_that_need_nothing_heavy():
    assert light("--version").startswith("ea ")
    assert light("study", "show", "quick") == preset_text("quick")
    listed = light("study", "list").splitlines()
    for name in preset_names():
        (place,) = [place for place, line in enumerate(listed) if line.startswith(f"{name} ")]
        question = preset_text(name).splitlines()[0].removeprefix("# ")
        assert listed[place].split(maxsplit=1) == [name, question]
        assert "?" in question
        assert preset_text(name).splitlines()[1] == f"# Time: {listed[place + 1].strip()}."
    assert "_EA_COMPLETE=complete_bash" in light(
        "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )


def test_completion_needs_nothing_heavy():
    completed = light(_EA_COMPLETE="complete_bash", COMP_WORDS="ea study show l", COMP_CWORD="3")
    assert completed.split() == [name for name in preset_names() if name.startswith("l")]


def commands(group, path="ea"):
    """Every command below a group, by what one types."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.mark.parametrize(("typed", "command"), list(commands(get_command(app))))
def test_every_command_says_what_it_does_with_an_example_that_it_takes(typed, command):
    first, *_, last = [part for part in command.help.split("\n\n") if part.strip()]
    assert first.strip().endswith(".")
    (example,) = re.findall(r"Example: (.*)", last)
    assert example.startswith(typed)
    arguments = shlex.split(example.removeprefix(typed).partition(">")[0])
    assert command.make_context(typed, arguments)  # an argument that is not known would be an error
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.is_flag and parameter.name != "help":
            assert parameter.default is not None or parameter.show_default, parameter.name


def test_the_command_that_is_installed_is_the_module():
    from importlib.metadata import entry_points

    from expressive_attention.__main__ import main

    (command,) = entry_points(group="console_scripts", name="ea")
    assert command.load() is main


@pytest.mark.parametrize("width", ["20", "80"])
def test_a_pipe_gets_whole_lines_and_labels_are_no_markup(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", width)
    label = "a rule [bold] of its own :x: " + "with a long name, " * 20 + "[end]"
    table = Table("condition", "n", box=None)
    table.add_row(label, "1")
    print_table(table)
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["condition", "n"]
    assert row.strip() == f"{label}  1"


def test_a_terminal_gets_all_of_a_label_too(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(Console, "is_terminal", True)
    table = Table("condition", box=None)
    table.add_row("x" * 50)
    print_table(table)
    assert sum(line.count("x") for line in capsys.readouterr().out.splitlines()) == 50


@pytest.mark.parametrize("gains", [(0.0625,), (0.0625, 1.0)])
def test_status_has_the_gain_that_was_chosen_where_several_were_tried(gains, tmp_path):
    condition = make_condition(4, 2, "rope")
    rows = [seed_row(condition.label, "expressive", seed, 0.5, initial_gain=0.0625) for seed in range(2)]
    text = tiny(warmup=f"5\ninitial_gains = {list(gains)}")
    export_study(results_of(rows, [condition], config=text), tmp_path, ["csv"])
    heading, first, second, _ = CliRunner().invoke(app, ["study", "status", str(tmp_path)]).stdout.splitlines()
    shown = ["gain"] if len(gains) > 1 else []
    assert re.split(" {2,}", heading.strip()) == [
        *("condition", "mechanism", "learning rate"), *shown, *("seeds", "solved", "mean accuracy")
    ]  # fmt: skip
    chosen = ["0.01", *(["0.0625"] if shown else [])]
    assert re.split(" {2,}", first.strip()) == [condition.label, "expressive", *chosen, "2 of 2", "0", "0.5000"]
    assert re.split(" {2,}", second.strip()) == [condition.label, "dot_product", "0 of 2", "0"]
    cells = json.loads(CliRunner().invoke(app, ["study", "status", str(tmp_path), "--json"]).stdout)["cells"]
    assert [(cell["condition"], cell["initial_gain"]) for cell in cells] == [
        (condition.label, 0.0625), (condition.label, None)
    ]  # fmt: skip
