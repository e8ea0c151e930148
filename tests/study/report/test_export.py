import re

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from expressive_attention.study.analysis.claims import verdicts
from expressive_attention.study.analysis.comparisons import comparisons
from expressive_attention.study.analysis.estimators import mean_interval, wilson_interval
from expressive_attention.study.analysis.significance import sign_flip_p
from expressive_attention.study.cli.app import app
from expressive_attention.study.config.condition import Condition
from expressive_attention.study.report.export import SUMMARY_SCHEMA, export_study, latex_table, summary_table
from expressive_attention.study.runs.store import Store
from tests.study.report_data import make_condition, make_results, results_of, seed_row
from tests.study.tiny import TINY

LABEL = "sum, basis 4, delay 5, rope"
EA, DPA = [1.0, 0.996, 0.9, 0.999, 0.75, 0.8], [0.5, 0.625, 0.75, 0.5, 0.5, 0.625]


@pytest.fixture(scope="module")
def few():
    """Six pairs of seeds, and two more that EA alone has run."""
    rows = [seed_row(LABEL, "expressive", seed, value) for seed, value in enumerate([*EA, 0.7, 0.6])]
    rows += [seed_row(LABEL, "dot_product", seed, value) for seed, value in enumerate(DPA)]
    return results_of(rows, [make_condition(4, 5, "rope"), make_condition(16, 5, "rope")])


def test_the_summary_has_the_numbers_of_the_seeds(few):
    table = summary_table(few)
    assert dict(table.schema) == SUMMARY_SCHEMA
    ours, theirs = table.rows(named=True)
    accuracies, differences = [*EA, 0.7, 0.6], [a - b for a, b in zip(EA, DPA, strict=True)]
    assert (ours["condition"], ours["mechanism"], ours["n"], ours["solved"]) == (LABEL, "expressive", 8, 3)
    assert ours["solved_share"] == 0.375
    assert (ours["solved_share_low"], ours["solved_share_high"]) == pytest.approx((0.136844, 0.694258), abs=1e-6)
    assert ours["accuracy"] == pytest.approx(sum(accuracies) / 8)
    interval = mean_interval(accuracies)
    assert (ours["accuracy_low"], ours["accuracy_high"]) == (interval.low, interval.high)
    assert (ours["pairs"], ours["difference"]) == (6, pytest.approx(sum(differences) / 6))
    interval = mean_interval(differences)
    assert (ours["difference_low"], ours["difference_high"]) == pytest.approx((interval.low, interval.high))
    assert ours["cross_entropy"] == pytest.approx(1 - sum(accuracies) / 8)  # by the making of these rows
    assert ours["cross_entropy_difference"] == pytest.approx(-sum(differences) / 6)
    interval = mean_interval([-x for x in differences])
    found = (ours["cross_entropy_difference_low"], ours["cross_entropy_difference_high"])
    assert found == pytest.approx((interval.low, interval.high))
    assert ours["p"] == sign_flip_p(differences)  # of one condition: not adjusted
    assert 0 < ours["steps_p"] <= 1
    assert (theirs["mechanism"], theirs["n"], theirs["solved"]) == ("dot_product", 6, 0)
    compared = ("pairs", "difference", "difference_low", "difference_high", "p", "steps_p")
    assert [theirs[name] for name in compared] == [None] * 6


def test_tables_come_back_from_their_files_as_they_were(tmp_path):
    results = make_results(claims=("at_least_as_good", "lead_grows"))
    files = export_study(results, tmp_path / "out" / "there", ["csv", "parquet", "csv"])
    assert [path.name for path in files] == ["config.toml", "about.json"] + [
        f"{name}.{ending}"
        for name in ("seeds", "curves", "splits", "summary", "verdicts")
        for ending in ("csv", "parquet")
    ]
    for name in ("seeds", "curves", "splits"):
        table = getattr(results, name)
        assert_frame_equal(pl.read_parquet(tmp_path / "out" / "there" / f"{name}.parquet"), table)
        again = pl.read_csv(tmp_path / "out" / "there" / f"{name}.csv", schema=table.schema)
        assert_frame_equal(again, table, check_exact=True)
    summary = pl.read_csv(tmp_path / "out" / "there" / "summary.csv", schema=SUMMARY_SCHEMA)
    assert summary.height == 6
    assert summary["difference"].drop_nulls().to_list() == [found.difference for found in comparisons(results)]
    told = pl.read_parquet(tmp_path / "out" / "there" / "verdicts.parquet").rows(named=True)
    assert told == [vars(verdict) for verdict in verdicts(results, results.claims)]
    assert [row["claim"] for row in told] == list(results.claims)


def test_latex_has_a_row_per_mechanism_and_rules_of_booktabs(few):
    lines = [line for line in latex_table(few).splitlines() if not line.startswith("%")]
    share, none = wilson_interval(3, 8), wilson_interval(0, 6)
    accuracy, difference = mean_interval([*EA, 0.7, 0.6]), comparisons(few)[0].interval
    baseline = mean_interval(DPA)
    ours = [
        f"{LABEL} & EA & 8 & 3/8 [{share.low:.2f}, {share.high:.2f}]",
        rf"$0.843\ [{accuracy.low:.3f}, {accuracy.high:.3f}]$",
        rf"$+0.324\ [{difference.low:+.3f}, {difference.high:+.3f}]$ \\",
    ]
    theirs = [
        f"& DPA & 6 & 0/6 [{none.low:.2f}, {none.high:.2f}]",
        rf"$0.583\ [{baseline.low:.3f}, {baseline.high:.3f}]$",
        r"\\",
    ]
    assert lines == [
        r"\begin{tabular}{llrlll}",
        r"\toprule",
        r"condition & mechanism & $n$ & solved & mean accuracy & accuracy $-$ DPA \\",
        r"\midrule",
        " & ".join(ours),
        " & ".join(theirs),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_escapes_what_it_would_take_for_a_command():
    label = r"50% of $x_{t-1}$ & a\b #1 ~^ <|>"
    condition = Condition(label, {"kind": "nt"}, {"position": "rope"}, {"chance": 0.5, "complexity": 1.0}, "a task")
    mechanisms = ["softmax_abs", "relu_squared"]
    text = latex_table(results_of([seed_row(label, name, 0, 0.5) for name in mechanisms], [condition], mechanisms))
    assert (
        r"50\% of \$x\_\{t-1\}\$ \& a\textbackslash{}b \#1 \textasciitilde{}\textasciicircum{} "
        r"\textless{}\textbar{}\textgreater{} & softmax of \textbar{}z\textbar{} & 1 & 0/1 "
    ) in text
    assert r"& ReLU\textsuperscript{2} & 1" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [5, 5]
    assert text.isascii()


def test_what_cannot_be_exported_ends_with_one_line(tmp_path, few):
    with pytest.raises(ValueError, match=r"one of \['csv', 'parquet', 'latex'\], got 'xlsx'"):
        export_study(few, tmp_path / "out", ["csv", "xlsx"])
    Store(tmp_path / "empty").create(TINY).release()
    for arguments, line in (
        ([tmp_path / "empty"], "ea: no cell is finished yet: there is nothing to export\n"),
        (
            [nothing := tmp_path / "nothing"],
            f"ea: {nothing} is not a study: the path does not exist; pass the run folder, e.g. runs/quick\n",
        ),
        ([tmp_path / "empty", "-f", "xlsx"], "ea: format must be one of ['csv', 'parquet', 'latex'], got 'xlsx'\n"),
    ):
        done = CliRunner().invoke(app, ["study", "export", *map(str, arguments)])
        assert (done.exit_code, done.stderr) == (2, line)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "empty" / "export").exists()
