import dataclasses
import json

import polars as pl
import pytest
import tomli_w
import torch
from typer.testing import CliRunner

from expressive_attention.study.cli.app import app
from expressive_attention.study.config.toml import tomllib
from expressive_attention.study.report.export import export_study
from expressive_attention.study.runs import verify
from expressive_attention.study.runs.cell_files import sealed
from expressive_attention.study.runs.environment import environment
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.selection import finished_cells
from expressive_attention.study.runs.store import Store
from expressive_attention.study.runs.verify import compare, sample_cells, verify_cell
from expressive_attention.study.training.loop import train_cell
from expressive_attention.study.training.result import SPLIT_SCHEMA
from tests.study.tiny import TINY, tiny, tiny_config


@pytest.fixture(scope="module")
def trained():
    """The tuning cells of the tiny study, with their results."""
    cells = [cell for comparison in tiny_config().arms() for cell in comparison.tuning_cells()]
    return [(cell, train_cell(cell)) for cell in cells]


@pytest.fixture
def store(tmp_path, trained):
    made = Store(tmp_path / "study")
    made.create(TINY).release()
    for cell, result in trained:
        made.save(cell, result)
    return made


def ea(store, *arguments):
    return CliRunner().invoke(app, ["study", "verify", str(store.directory), *arguments])


def change(store, cell, **environment):
    """Have the cell seem to be from another machine; None: not known."""
    path = store.path(cell) / "cell.toml"
    content = tomllib.loads(path.read_text())
    content["environment"] = {k: v for k, v in (content["environment"] | environment).items() if v is not None}
    path.write_bytes(sealed(tomli_w.dumps(content).encode()))


def test_what_is_trained_again_has_the_same_bits(store):
    done = ea(store, "--sample", "2")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(": same bits  (" in line for line in lines[:2])
    assert lines[2] == "2 of 2 cells have the same bits"


def test_what_differs_is_told_by_how_much(store, trained):
    (cell, result), (other, _) = trained[0], trained[1]
    name = next(iter(result.weights))
    weights = {**result.weights, name: result.weights[name].clone()}
    weights[name].view(-1)[3] += 0.5
    seeds = result.seeds.with_columns(validation=pl.col("validation") - 0.125)
    store.discard(cell)
    store.save(cell, dataclasses.replace(result, seeds=seeds, weights=weights))
    done = ea(store, "--sample", "99")
    assert done.exit_code == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(cell.identity)]
    assert f"{cell}: seeds: validation by up to 0.12; weights: by up to 0.5  (" in line
    assert f"{other}: same bits" in done.stdout
    assert done.stdout.endswith("\n3 of 4 cells have the same bits\n")


def test_the_smallest_difference_counts_and_nan_is_equal_to_itself(trained):
    _, result = trained[0]
    name = next(iter(result.weights))

    def with_first(value):
        weights = {**result.weights, name: result.weights[name].clone()}
        weights[name].view(-1)[0] = value
        return dataclasses.replace(result, weights=weights)

    first = float(result.weights[name].view(-1)[0])
    following = torch.nextafter(torch.tensor(first), torch.tensor(9.0))
    assert compare(result, with_first(first)) == []
    assert compare(with_first(torch.nan), with_first(torch.nan)) == []
    assert compare(result, with_first(following)) == [f"weights: by up to {following - first:.2g}"]
    assert compare(result, with_first(torch.nan)) == ["weights: by up to inf"]
    assert compare(with_first(0.0), with_first(-0.0)) == ["weights: by up to 0"]
    renamed = dataclasses.replace(result, weights={f"{k}_": x for k, x in result.weights.items()})
    assert compare(result, renamed)[0].startswith("weights: only one of the two has ")


def test_rows_and_columns_that_differ_are_told(trained):
    _, result = trained[0]
    curves = result.curves.with_columns(loss=pl.col("loss") + 1, accuracy=pl.lit(0.0))
    largest = result.curves["accuracy"].max()
    changed = dataclasses.replace(result, curves=curves)
    assert compare(result, changed) == [f"curves: loss by up to 1, accuracy by up to {largest:.2g}"]
    shorter = dataclasses.replace(result, curves=result.curves.filter(pl.col("step") < 30))
    assert compare(result, shorter) == ["curves: 1 row in one alone"]
    assert compare(shorter, result) == ["curves: 1 row in one alone"]
    rows = [(0, "rule", group, f"rule {group}", 1, 0.5, None) for group in range(2)]
    split = dataclasses.replace(result, splits=pl.DataFrame(rows, SPLIT_SCHEMA, orient="row"))
    named = dataclasses.replace(split, splits=split.splits.with_columns(name=pl.lit("other")))
    assert compare(split, named) == ["splits: name"]
    turned = dataclasses.replace(split, splits=split.splits.reverse())  # the order of rows is no result
    assert compare(split, turned) == []


def test_other_circumstances_are_named(store, trained, monkeypatch):
    cell, result = trained[0]
    monkeypatch.setattr(verify, "train_cell", lambda _, device: result)
    change(store, cell, torch="1.0", threads=None)
    found = verify_cell(cell, store)
    now = environment()["torch"]
    assert found.circumstances == (f"torch 1.0, now {now}", "threads unknown, now 1")
    change(store, cell, torch=now, threads="2")
    assert verify_cell(cell, store).circumstances == ()
    done = ea(store, "--sample", "4")
    assert "not as it was" not in done.stdout
    change(store, cell, processor="abacus", threads="1")
    assert f"\n  not as it was: processor abacus, now {environment()['processor']}\n" in ea(store, "-n", "4").stdout


def test_a_cell_is_trained_with_the_threads_it_had(store, trained, monkeypatch):
    cell, result = trained[0]
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(verify, "train_cell", lambda _, device: seen.append(torch.get_num_threads()) or result)
    for threads in ("3", "1", None):
        change(store, cell, threads=threads)
        verify_cell(cell, store)
    assert seen == [3, 1, 1]
    assert torch.get_num_threads() == before


def test_a_sample_depends_on_its_seed_alone(store):
    cells, unfinished = finished_cells(store, store.config()[0])
    assert (len(cells), len(unfinished)) == (4, 2)
    drawn = [[cell.identity for cell in sample_cells(store.directory, 2, seed)[1]] for seed in (0, 0, *range(1, 9))]
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn))) > 2
    assert {identity for pair in drawn for identity in pair} == {cell.identity for cell in cells}


def test_wrong_use_ends_with_one_line(store, tmp_path):
    done = ea(store, "--sample", "0")
    assert (done.exit_code, done.stderr) == (2, "ea: --sample must be at least 1, got 0\n")
    empty = Store(tmp_path / "empty")
    empty.create(TINY).release()
    done = ea(empty)
    assert (done.exit_code, done.stderr) == (2, f"ea: {tmp_path / 'empty'}: no cell is finished yet\n")
    cells, _ = finished_cells(store, store.config()[0])
    (store.path(cells[0]) / "weights.safetensors").unlink()
    done = ea(store, "--sample", "4")
    assert done.exit_code == 2
    assert done.stderr == f"ea: {store.path(cells[0]) / 'weights.safetensors'} is missing\n"


def test_exported_tables_are_compared_without_weights(store, trained, tmp_path):
    folder = tmp_path / "tables"
    for ending in ("parquet", "csv"):
        export_study(collect(store), folder, [ending])
        kept, cells = sample_cells(folder, 99, 0)
        assert {cell.identity for cell in cells} == {cell.identity for cell, _ in trained}
        assert [verify_cell(cell, kept).differences for cell in cells] == [()] * 4
    first = (pl.int_range(pl.len()) == 0).cast(pl.Float64)
    pl.read_csv(folder / "seeds.csv").with_columns(loss=pl.col("loss") + first).write_csv(folder / "seeds.csv")
    done = ea(Store(folder), "--sample", "99")
    assert done.exit_code == 1
    assert done.stdout.count(": seeds: loss by up to 1  (") == 1
    assert done.stdout.endswith("\n3 of 4 cells have the same bits in their tables; an export has no weights\n")


def test_an_export_without_some_of_its_rows_is_not_verified(store, tmp_path):
    folder = tmp_path / "tables"
    export_study(collect(store), folder, ["csv"])
    seeds = pl.read_csv(folder / "seeds.csv")
    seeds.filter(pl.int_range(pl.len()) > 0).write_csv(folder / "seeds.csv")
    assert len(sample_cells(folder, 99, 0)[1]) == 3  # not all were finished when it was exported
    about = folder / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"unfinished": []}))
    done = ea(Store(folder))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "expressive: no final seed is there" in done.stderr


def test_seeds_that_trained_in_other_groups_are_not_verified_from_tables(tmp_path):
    """They have other bits than those that train alone, and the tables do not say which trained together."""
    study = Store(tmp_path / "study")
    for final in ("1", "2"):  # extended by a seed
        text = tiny(learning_rates="[1e-2]", mechanisms='["expressive"]', final=final)
        study.create(text).release()
        (arm,) = study.config()[0].arms()
        for cell in arm.final_cells(arm.training.settings[0], study):
            if not study.has(cell):
                study.save(cell, train_cell(cell))
        export_study(collect(study), tmp_path / final, ["parquet"])
    assert len(sample_cells(tmp_path / "1", 9, 0)[1]) == 1
    assert len(sample_cells(tmp_path / "study", 9, 0)[1]) == 2
    done = ea(Store(tmp_path / "2"))
    assert done.stderr == (
        f"ea: {tmp_path / '2'}: the study was extended or cut, and its tables do not say which seeds trained together: "
        "pass the run folder\n"
    )


@pytest.mark.parametrize(("together", "told"), [(2, True), (1, False)])
def test_final_seeds_of_an_export_are_those_of_the_setting_it_says(together, told, tmp_path):
    """Examples of several cells lie in one table without the names of cells, and are not compared."""
    text = tiny(learning_rates="[1e-2]", mechanisms='["expressive"]', together=str(together))
    study = Store(tmp_path / "study")
    study.create(text.replace("{ basis = 4, delay = 2 }", '{ kind = "digits", patch = 4 }')).release()
    (arm,) = study.config()[0].arms()
    for cell in arm.final_cells(arm.training.settings[0]):
        study.save(cell, train_cell(cell))
    results, folder = collect(study), tmp_path / "tables"
    confirming = results.seeds.with_columns(pl.col("seed") + 2_000_000, role=pl.lit("confirmation"))
    export_study(dataclasses.replace(results, seeds=pl.concat([results.seeds, confirming])), folder, ["parquet"])
    kept, cells = sample_cells(folder, 99, 0)
    for role, start in (("final", 0), ("confirmation", 2_000_000)):
        groups = [tuple(range(first, first + together)) for first in range(start, start + 2, together)]
        assert sorted(cell.seeds for cell in cells if cell.role == role) == groups
    final = next(cell for cell in cells if cell.role == "final")
    assert ("examples" not in kept.lacks(final)) is told
    assert verify_cell(final, kept).differences == ()
