"""Two runs beside each other."""

import pytest
from typer.testing import CliRunner

from expressive_attention.study.cli.app import app
from expressive_attention.study.report.export import export_study
from expressive_attention.study.report.two_runs import compared_runs, differing
from tests.study.report_data import make_condition, results_of, seed_row, trained

LABELS = [f"sum, basis {basis}, delay 5, rope" for basis in (4, 8, 16)]


def run(accuracies, bases=(4, 8, 16), **changes):
    """A run in which each mechanism's eight seeds reach an accuracy per condition, more or less."""
    conditions = [make_condition(basis, 5, "rope") for basis in bases]
    rows = [
        seed_row(condition.label, mechanism, seed, accuracies[condition.task["basis"]][place] - seed / 1000, **changes)
        for condition in conditions
        for place, mechanism in enumerate(("expressive", "dot_product"))
        for seed in range(8)
    ]
    return results_of(rows, conditions)


def test_the_same_run_twice_has_the_same_bits():
    lines = compared_runs(
        run({4: (1.0, 0.5), 8: (0.9, 0.9), 16: (0.5, 0.5)}), run({4: (1.0, 0.5), 8: (0.9, 0.9), 16: (0.5, 0.5)})
    )
    assert [(line.condition, line.mechanism) for line in lines] == [
        (label, mechanism) for label in LABELS for mechanism in ("expressive", "dot_product")
    ]
    assert all(line.is_identical and line.differences == () for line in lines)
    assert differing(lines) == []


def test_what_differs_is_named():
    first = run({4: (1.0, 0.5), 8: (0.9, 0.9), 16: (0.5, 0.5)})
    second = run({4: (1.0, 0.5), 8: (0.9005, 0.9), 16: (0.8, 0.5)})
    lines = {(line.condition, line.mechanism): line for line in compared_runs(first, second)}
    assert lines[LABELS[0], "expressive"].is_identical
    assert lines[LABELS[1], "expressive"].differences == ()  # its intervals overlap
    assert not lines[LABELS[1], "expressive"].is_identical
    assert lines[LABELS[2], "expressive"].differences == ("accuracy", "no difference shown against EA ahead")
    assert lines[LABELS[2], "dot_product"].is_identical
    assert differing(list(lines.values())) == [LABELS[2]]


def test_seeds_that_are_all_equal_differ_from_others():
    conditions = [make_condition(4, 5, "rope")]
    runs = [
        results_of([seed_row(LABELS[0], "expressive", seed, value - spread * seed) for seed in range(8)], conditions)
        for value, spread in ((0.9, 0), (0.8, 0.001))
    ]
    (line,) = compared_runs(*runs)
    assert line.differences == ("accuracy",)


def test_conditions_settings_and_models_that_differ():
    values = {4: (1.0, 0.5), 8: (0.9, 0.9), 16: (0.5, 0.5)}
    first, second = run(values, (4, 8)), run(values, (8, 16), learning_rate=0.5)
    first.conditions[1].model["layers"] = 3
    lines = {(line.condition, line.mechanism): line for line in compared_runs(first, second)}
    assert lines[LABELS[0], "expressive"].differences == ("only in the first run",)
    assert lines[LABELS[2], "expressive"].differences == ("only in the second run",)
    assert lines[LABELS[1], "expressive"].differences == (
        "another model",
        "learning rate 0.01 against learning rate 0.5",
    )


def test_the_command_prints_both_and_where_they_differ(tmp_path):
    results = trained(tmp_path / "a")
    export_study(results, tmp_path / "b", ["csv"])
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["study", "compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("same bits") == 2 * len(results.conditions)
    assert done.stdout.splitlines()[-1].startswith("The runs differ on 0 of ")


@pytest.mark.parametrize("missing", [0, 1])
def test_a_folder_that_is_no_run_is_named(tmp_path, missing):
    trained(tmp_path / "a")
    folders = [tmp_path / "a"]
    folders.insert(missing, tmp_path / "none")
    done = CliRunner().invoke(app, ["study", "compare", *map(str, folders)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"ea: {tmp_path / 'none'} is not a study")
