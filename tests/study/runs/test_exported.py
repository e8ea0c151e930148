"""Tables that were exported are read as the study that they come from."""

import json
from dataclasses import replace

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from expressive_attention.study.analysis.findings import findings
from expressive_attention.study.analysis.limit import LIMIT_SCHEMA
from expressive_attention.study.cli.app import app
from expressive_attention.study.report.export import export_study
from expressive_attention.study.runs.exported import load_results
from expressive_attention.study.runs.store import Store, StoreError
from tests.study.report_data import trained

FROM_START = dict.fromkeys(("squared_from_start_accuracy", "squared_from_start_cross_entropy"), pl.Float64)
LIMIT = pl.DataFrame(
    {"condition": ["a"], "seed": [0], "steps": [1]}
    | {name: [0.5] for name in LIMIT_SCHEMA if name not in ("seed", "steps")}
    | {name: [None] for name in FROM_START},
    schema_overrides=FROM_START,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_export_is_the_study_without_its_models(study, ending, tmp_path):
    export_study(study, str(tmp_path), [ending])
    again = load_results(str(tmp_path))
    for name in ("seeds", "curves", "splits", "examples"):
        table = getattr(study, name)
        assert_frame_equal(getattr(again, name), table.cast(getattr(again, name).schema), check_column_order=False)
    for name in (
        "name",
        "config",
        "conditions",
        "mechanisms",
        "unfinished",
        "claims",
        "environment",
        "seconds",
        "protocol",
    ):
        assert getattr(again, name) == getattr(study, name), name
    assert findings(again) == findings(study)


def test_a_report_is_written_from_an_export(study, tmp_path):
    export_study(study, tmp_path, ["csv"])
    done = CliRunner().invoke(app, ["study", "report", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[:-2] == findings(study)
    assert (tmp_path / "report.html").stat().st_size > 500_000


def test_an_export_without_its_configuration_says_what_it_needs(study, tmp_path):
    export_study(study, tmp_path, ["csv"])
    (tmp_path / "config.toml").unlink()
    with pytest.raises(
        StoreError, match=r"no config.toml, which says what was run: pass the run folder, e.g. runs/quick"
    ):
        load_results(tmp_path)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_name_of_a_folder_is_no_pattern(study, ending, tmp_path):
    """``e[1]`` matched no file, and ``e*`` those of other studies as well."""
    for name in ("e[1]", "e*", "e1"):
        export_study(study, tmp_path / name, [ending])
        assert load_results(tmp_path / name).seeds.height == study.seeds.height


def test_facts_are_those_that_were_exported(study, tmp_path):
    """The text of another Python has other facts."""
    export_study(study, tmp_path, ["parquet"])
    about = tmp_path / "about.json"
    content = json.loads(about.read_text())
    label = study.conditions[0].label
    content["facts"][label]["majority"] = 0.125
    about.write_text(json.dumps(content))
    assert load_results(tmp_path).conditions[0].facts["majority"] == 0.125
    del content["facts"][label]  # as an older export
    about.write_text(json.dumps(content))
    assert load_results(tmp_path).conditions == study.conditions


def test_rows_that_are_there_twice_are_named(study, tmp_path):
    export_study(study, tmp_path, ["csv"])
    pl.concat([study.curves, study.curves.head(1)]).write_csv(tmp_path / "curves.csv")
    with pytest.raises(StoreError, match="the table of curves has a row twice"):
        load_results(tmp_path)


def test_a_table_that_is_none_is_named(study, tmp_path):
    export_study(study, tmp_path, ["parquet"])
    (tmp_path / "seeds.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"seeds.parquet is not a table of a study"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "about.json is not JSON: "),
        ("[1]", "about.json is not what `ea study export` writes"),
        ('{"seconds": "long"}', "about.json is not what `ea study export` writes"),
        ('{"unfinished": 3}', "about.json is not what `ea study export` writes"),
        ('{"unfinished": [3]}', "about.json is not what `ea study export` writes"),
        ('{"environment": {"torch": 2}}', "about.json is not what `ea study export` writes"),
        ('{"seconds": NaN}', "about.json is not what `ea study export` writes"),
        ('{"environment": {"threads": "999999"}}', "about.json is not what `ea study export` writes"),
        ('{"facts": {"a": {"complexity": "high"}}}', "about.json is not what `ea study export` writes"),
    ],
)
def test_a_damaged_account_of_the_study_is_named(study, content, said, tmp_path):
    export_study(study, tmp_path, ["parquet"])
    (tmp_path / "about.json").write_text(content)
    with pytest.raises(StoreError, match=said):
        load_results(tmp_path)
    done = CliRunner().invoke(app, ["study", "compare", str(tmp_path), str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)


def test_the_folder_that_was_meant_is_named(study, tmp_path):
    (tmp_path / "run" / "figures").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(study.config)
    for wrong in (tmp_path / "run" / "figures", tmp_path):
        done = CliRunner().invoke(app, ["study", "status", str(wrong)])
        assert (
            done.stderr
            == f"ea: {wrong} is not a study: it has no config.toml; pass the run folder, e.g. {tmp_path / 'run'}\n"
        )


def test_an_export_leaves_no_file_of_an_earlier_one(study, tmp_path):
    """A table of parquet won over a newer one of CSV, and a summary in LaTeX stayed beside tables of another study."""
    export_study(study, tmp_path, ["parquet"], {"limit": pl.DataFrame({"seed": [0]})})
    export_study(study, tmp_path, ["latex"])  # which alone removes nothing
    (tmp_path / "mine.parquet").write_text("")
    assert {"seeds.parquet", "limit.parquet", "summary.tex"} < {path.name for path in tmp_path.iterdir()}
    changed = replace(study, seeds=study.seeds.with_columns(accuracy=pl.lit(0.5)))
    files = export_study(changed, tmp_path, ["csv"])
    assert set(tmp_path.iterdir()) == {*files, tmp_path / "mine.parquet"}
    assert (load_results(tmp_path).seeds["accuracy"] == 0.5).all()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "seeds.parquet").write_text("somebody's own")
    export_study(study, tmp_path / "other", ["csv"])
    assert (tmp_path / "other" / "seeds.parquet").exists()


def test_two_formats_of_a_table_are_read_if_they_agree(study, tmp_path):
    lost = study.seeds.with_columns(cross_entropy=pl.lit(float("nan")), loss=pl.lit(float("inf")))
    export_study(replace(study, seeds=lost), tmp_path, ["csv", "parquet"])
    assert load_results(tmp_path).seeds["cross_entropy"].is_nan().all()
    study.seeds.with_columns(steps=pl.lit(7)).write_csv(tmp_path / "seeds.csv")
    done = CliRunner().invoke(app, ["study", "status", str(tmp_path)])
    said = (
        f"ea: {tmp_path / 'seeds.parquet'} and seeds.csv differ: remove the older of the two, or export the study again"
    )
    assert (done.exit_code, done.stderr) == (2, f"{said}\n")


def test_commands_that_need_cells_say_what_an_export_is(study, tmp_path):
    export_study(study, tmp_path, ["csv"])
    for command in (["study", "limit"], ["study", "twins"], ["geometry"]):
        done = CliRunner().invoke(app, [*command, str(tmp_path)])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert (
            "has exported tables and no trained models: `ea study report`, `status`, `compare`, `export` and"
            in done.stderr
        )
    with pytest.raises(StoreError, match="has exported tables and no cells, so there is no study to go on with"):
        Store(tmp_path).create(study.config)
    assert not (tmp_path / "cells").exists()


def test_status_and_export_read_an_export(study, tmp_path):
    export_study(study, tmp_path, ["csv"], {"limit": LIMIT})
    cells = json.loads(CliRunner().invoke(app, ["study", "status", str(tmp_path), "--json"]).stdout)["cells"]
    assert [(each["seeds"], each["done"]) for each in cells] == [(2, True)] * 2
    assert [each["accuracy_mean"] for each in cells] == [
        study.seeds.filter(mechanism=name, role="final")["accuracy"].mean() for name in study.mechanisms
    ]
    done = CliRunner().invoke(app, ["study", "export", str(tmp_path), "-f", "parquet", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.stderr == f"its z² limit lacks 1 condition: {study.conditions[0].label}\n"
    assert not list(tmp_path.glob("*.csv"))
    assert_frame_equal(pl.read_parquet(tmp_path / "limit.parquet"), LIMIT)
    assert findings(load_results(tmp_path)) == findings(study)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (pl.col("accuracy") * float("nan"), "an accuracy is no number"),
        (pl.lit(None, pl.Float64).alias("accuracy"), "an accuracy is no number"),
        (pl.lit(None, pl.Int64).alias("steps"), "a row has no steps"),
        (pl.lit(0).alias("seed"), "a seed is there twice"),
        (pl.col("learning_rate") + pl.col("seed"), "final seeds ran at several learning rates"),
        (pl.lit("other").alias("condition"), "config.toml has no other, expressive, "),
        (pl.lit("checked").alias("role"), "config.toml has no .*, checked"),
        (pl.col("seed") + 100, "config.toml has no seed \\d+ of "),
        (pl.lit(9.0).alias("initial_gain"), "config.toml has no learning rate .*, gain 9"),
    ],
)
def test_seeds_that_a_hand_has_changed_are_named(study, changed, said, tmp_path):
    export_study(study, tmp_path, ["csv"])
    study.seeds.with_columns(changed).write_csv(tmp_path / "seeds.csv")
    with pytest.raises(StoreError, match=f"the table of seeds is not what `ea study export` writes: {said}"):
        load_results(tmp_path)
