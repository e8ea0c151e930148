"""The limit of small scores: quantiles and measures of trained models, and what z^2 does to them."""

import errno
import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from expressive_attention.nn import SelfAttention
from expressive_attention.study.analysis import limit
from expressive_attention.study.analysis.limit import (
    HEAD_SCHEMA,
    LIMIT_SCHEMA,
    limit_of,
    limit_sentences,
    limit_tables,
)
from expressive_attention.study.cli.app import app
from expressive_attention.study.config.load import load_config
from expressive_attention.study.runs.engines import LocalEngine
from expressive_attention.study.runs.progress import make_display
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.scheduler import run_study
from expressive_attention.study.runs.store import Store
from expressive_attention.study.tasks.recurrences.nt import NTTask
from expressive_attention.study.training.loop import train_cell
from expressive_attention.study.training.model import build_model, trained_model

from ..report_data import make_condition, results_of
from ..runs.workers import forked_workers
from ..tiny import cell, tiny

MODEL = {"embed_dim": 8, "heads": 2, "layers": 2, "position": "rope+learned_alibi"}


@pytest.fixture(scope="module")
def trained():
    chosen = cell(model=MODEL, task=NTTask(basis=8, delay=3), seeds=(0, 3), steps=60)
    return chosen, train_cell(chosen)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A study of EA, DPA and z^2."""
    folder = tmp_path_factory.mktemp("run")
    text = tiny(mechanisms='["expressive", "dot_product", "squared"]')
    (folder / "tiny.toml").write_text(text)
    config, _ = load_config(str(folder / "tiny.toml"))
    store = Store(folder / "out")
    lock = store.create(text)
    try:
        with forked_workers():
            run_study(config, store, LocalEngine(1), make_display(quiet=True))
    finally:
        lock.release()
    return store


def test_the_model_is_measured_as_it_was_trained(trained):
    chosen, result = trained
    seeds, _ = limit_of(chosen, result.weights, 1)
    assert dict(seeds.schema) == LIMIT_SCHEMA
    assert seeds["seed"].to_list() == [0, 3]
    assert seeds["expressive_accuracy"].to_list() == result.seeds["validation"].to_list()
    losses = result.seeds["validation_cross_entropy"].to_list()
    assert seeds["expressive_cross_entropy"].to_list() == pytest.approx(losses, rel=1e-6)


def test_z_squared_is_put_in_the_place_of_f_and_nothing_else_changes(trained):
    chosen, result = trained
    seeds, _ = limit_of(chosen, result.weights, 1)
    examples = chosen.task.held_out_examples(chosen.training.validation_sequences, "validation")
    for index in range(2):
        model = build_model(chosen.task, chosen.model, "squared", 99)
        model.load_state_dict({name: x[index] for name, x in result.weights.items()})
        with torch.no_grad():
            logits = model(torch.from_numpy(examples.inputs))
        scored = torch.from_numpy(chosen.task.scored(examples))
        targets = torch.from_numpy(examples.targets)
        loss = torch.nn.functional.cross_entropy(logits[scored], targets[scored])
        assert seeds["squared_cross_entropy"][index] == pytest.approx(float(loss), rel=1e-5)
    assert (seeds["squared_cross_entropy"] != seeds["expressive_cross_entropy"]).all()


def test_models_in_the_limit_do_not_feel_it(trained):
    chosen, result = trained
    small = {name: x * 1e-3 if "gain" in name else x for name, x in result.weights.items()}
    seeds, heads = limit_of(chosen, small, 1)
    assert heads["z_max"].max() < 0.01
    with_f, with_square = (seeds[f"{name}_cross_entropy"].to_list() for name in ("expressive", "squared"))
    assert with_square == pytest.approx(with_f, rel=1e-4)


def test_both_are_trained_on_and_batches_are_fresh(trained):
    chosen, result = trained
    short, long = (limit_of(chosen, result.weights, steps)[0] for steps in (1, 60))
    for name in ("expressive", "squared"):
        assert (long[f"{name}_trained_cross_entropy"] < long[f"{name}_cross_entropy"]).all()
        assert (long[f"{name}_trained_cross_entropy"] < short[f"{name}_trained_cross_entropy"]).all()
        assert long[f"{name}_cross_entropy"].to_list() == short[f"{name}_cross_entropy"].to_list()
    again = limit_of(chosen, result.weights, 60)[0]
    assert again.equals(long)


def attended(model, inputs):
    """Each attention of the model with what it reads."""
    seen = []
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
    model(inputs)
    return seen


def test_quantiles_are_of_each_head_over_what_it_sees(trained):
    chosen, result = trained
    _, heads = limit_of(chosen, result.weights, 1)
    assert dict(heads.schema) == HEAD_SCHEMA
    assert heads.height == 2 * 2 * 2
    inputs = torch.from_numpy(chosen.task.held_out_examples(32, "validation").inputs)
    for index, seed in enumerate(chosen.seeds):
        model = trained_model(chosen, result.weights, index)
        with torch.no_grad():
            for layer, (module, x) in enumerate(attended(model, inputs)):
                q, k, _ = module.heads(x)
                for head in range(2):
                    z = (q[:, head] @ k[:, head].mT).abs() / 2.0
                    visible = [float(x) for example in z for i, row in enumerate(example) for x in row[: i + 1]]
                    row = heads.row(
                        by_predicate=(pl.col("seed") == seed) & (pl.col("layer") == layer) & (pl.col("head") == head),
                        named=True,
                    )
                    expected = np.quantile(visible, [0.1, 0.5, 0.9, 0.99, 1.0])
                    found = [row[name] for name in ("z_10", "z_50", "z_90", "z_99", "z_max")]
                    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_command_measures_all_ea_models_and_export_writes_them(run):
    done = CliRunner().invoke(app, ["study", "limit", str(run.directory)])
    assert done.exit_code == 0, done.output
    assert "with z² in its place" in done.output
    assert "after 2 further steps" in done.output
    assert "z² from the start" in done.output
    results = collect(run)
    tables = limit_tables(results, run)
    assert tables["limit"]["seed"].to_list() == [0, 1]
    assert tables["limit"]["condition"].unique().to_list() == [results.conditions[0].label]
    start = results.seeds.filter(mechanism="squared", role="final").sort("seed")
    assert tables["limit"]["squared_from_start_accuracy"].to_list() == start["validation"].to_list()
    kept = {path: path.stat().st_mtime_ns for path in (run.directory / "limit").iterdir()}
    assert CliRunner().invoke(app, ["study", "limit", str(run.directory)]).exit_code == 0
    assert kept == {path: path.stat().st_mtime_ns for path in (run.directory / "limit").iterdir()}  # read, not measured
    done = CliRunner().invoke(app, ["study", "export", str(run.directory), "-f", "parquet"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert pl.read_parquet(run.directory / "export" / "limit.parquet").equals(tables["limit"])
    assert pl.read_parquet(run.directory / "export" / "limit_heads.parquet").equals(tables["limit_heads"])
    assert (run.directory / "export" / "config.toml").read_bytes() == (run.directory / "config.toml").read_bytes()


def test_the_measures_take_as_many_threads_as_the_training(run, monkeypatch):
    chosen = limit.limit_cells(collect(run), run)[0]
    trained_with, seen = int(run.about(chosen)["environment"]["threads"]), []
    monkeypatch.setattr(limit, "limit_of", lambda *_: seen.append(torch.get_num_threads()) or 1 / 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(trained_with + 1)
        with pytest.raises(ZeroDivisionError):
            limit.write_limit(chosen, run, share=1.0)  # a share that no other test has kept
        assert torch.get_num_threads() == trained_with + 1
    finally:
        torch.set_num_threads(before)
    assert seen == [trained_with]


def test_a_damaged_file_is_measured_again_and_another_share_as_well(run):
    arguments = ["study", "limit", str(run.directory), "--share", "0.1"]
    first = CliRunner().invoke(app, arguments)
    assert "after 3 further steps" in first.output
    before = limit_tables(collect(run), run)
    (heads,) = (run.directory / "limit").glob("*.heads.parquet")
    (seeds,) = (run.directory / "limit").glob("*.seeds.parquet")
    for path, content, said in (
        (seeds, b"damaged", f"{seeds} is damaged: "),
        (heads, b"", f"{heads} is damaged: "),
        (heads, seeds.read_bytes(), f"{heads} has other columns than this version writes"),
        (heads, None, f"{heads} is missing"),
    ):
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        done = CliRunner().invoke(app, ["study", "export", str(run.directory)])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr
        assert f"; `ea study limit {run.directory}` measures it again" in done.stderr
        path.write_bytes(whole)
    seeds.write_bytes(b"damaged")
    again = CliRunner().invoke(app, arguments)
    assert again.stdout == first.stdout
    assert f"{seeds} is damaged: " in again.stderr
    assert "; it is measured again\n" in again.stderr
    after = limit_tables(collect(run), run)
    assert all(after[name].equals(table) for name, table in before.items())
    seeds.unlink()  # as where the command was killed before it was written
    assert limit_tables(collect(run), run) == {}
    assert CliRunner().invoke(app, arguments).stdout == first.stdout


def test_a_folder_that_cannot_be_written_is_named_before_any_work(run, tmp_path, monkeypatch):
    def fails(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    folder = tmp_path / "run"
    shutil.copytree(run.directory, folder, ignore=shutil.ignore_patterns("limit"))
    monkeypatch.setattr(limit.tempfile, "TemporaryFile", fails)
    monkeypatch.setattr(limit, "limit_of", lambda *_: pytest.fail("a cell is measured"))
    done = CliRunner().invoke(app, ["study", "limit", str(folder)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"ea: {folder / 'limit'} cannot be written: Read-only file system"


def test_sentences_say_how_many_seeds_diverged(trained):
    """Means of them were nan."""
    seeds, heads = limit_of(trained[0], trained[1].weights, 1)
    label = "the condition"
    results = results_of([], [replace(make_condition(4, 5, "rope"), label=label)])
    lost = {"squared_trained_accuracy": 0.0, "squared_trained_cross_entropy": math.nan}
    first, second = seeds.rows(named=True)
    start = {"squared_from_start_accuracy": 0.0, "squared_from_start_cross_entropy": math.nan}
    rows = [first | dict.fromkeys(start), second | lost | start]
    tables = {"limit": pl.DataFrame(rows, infer_schema_length=None), "limit_heads": heads}

    def told():
        (sentence,) = limit_sentences(
            results, {name: table.with_columns(condition=pl.lit(label)) for name, table in tables.items()}
        )
        return sentence

    assert f" and {first['squared_trained_accuracy'] / 2:.4f} (1 of 2 seeds diverged)" in told()
    assert "; z² from the start 0.0000 (1 of 1 seed diverged)." in told()
    assert f"place {seeds['squared_accuracy'].mean():.4f} ({seeds['squared_cross_entropy'].mean():.4f} nats)" in told()
    for seed, said in (
        (3, f"is {heads.filter(seed=0)['z_max'].max():.2g}, without 4 of 8 heads, whose scores are not finite. Acc"),
        (0, f"{label}: no score is finite. Acc"),
    ):
        tables["limit_heads"] = tables["limit_heads"].with_columns(
            pl.when(pl.col("seed") == seed).then(math.nan).otherwise(name).alias(name)
            for name in HEAD_SCHEMA
            if name.startswith("z_")
        )
        assert said in told()


def test_wrong_use_ends_with_one_line(run, tmp_path):
    done = CliRunner().invoke(app, ["study", "limit", str(run.directory), "--share", "0"])
    assert done.exit_code == 2
    assert "--share must be above 0 and at most 1, got 0" in done.output
    empty = Store(tmp_path / "out")
    empty.create(tiny()).release()
    done = CliRunner().invoke(app, ["study", "limit", str(empty.directory)])
    assert done.exit_code == 2
    assert "has no finished cell with final seeds of EA" in done.output


def test_facts_are_counted_once(run, monkeypatch):
    path = run.directory / "facts.json"
    first = collect(run).conditions
    assert json.loads(path.read_text())["facts"]
    calls = []
    own = type(run.config()[0].expanded()[0][1]).facts
    monkeypatch.setattr(
        "expressive_attention.study.tasks.recurrences.nt.NTTask.facts", lambda self: calls.append(1) or own(self)
    )
    assert collect(run).conditions == first
    assert calls == []
    path.write_text(path.read_text().replace('"chance": 0.25', '"chance": 0.75'))
    assert collect(run).conditions == first  # not what was written: counted again, and written
    assert calls == [1]
    assert collect(run).conditions == first
    assert calls == [1]
    monkeypatch.setattr("expressive_attention.study.runs.facts._code", lambda: "of another version")
    assert collect(run).conditions == first
    assert calls == [1, 1]
