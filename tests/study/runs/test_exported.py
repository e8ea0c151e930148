"""Tables that were exported are read as the study that they come from."""

import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from expressive_attention.study.analysis.findings import findings
from expressive_attention.study.cli.app import app
from expressive_attention.study.report.export import export_study
from expressive_attention.study.runs.exported import load_results
from expressive_attention.study.runs.store import StoreError
from tests.study.report_data import trained


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_export_is_the_study_without_its_models(study, ending, tmp_path):
    export_study(study, tmp_path, [ending])
    again = load_results(tmp_path)
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
