"""A study's results as files for other programs: tables of all rows, and a summary that fits into a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ..analysis.claims import verdicts
from ..analysis.comparisons import BASELINE, Comparison, comparisons
from ..analysis.estimators import LEVEL, Interval
from ..analysis.summaries import Summary, summaries
from ..analysis.wording import mechanism_name
from ..config.record import RECORD
from ..files import parquet, write_atomically
from ..runs.exported import ABOUT, about
from ..runs.results import StudyResults

__all__ = [
    "FORMATS",
    "SUMMARY_SCHEMA",
    "export_study",
    "latex_table",
    "study_tables",
    "summary_table",
    "verdict_table",
]

FORMATS = ("csv", "parquet", "latex")

# All tables that an export may have.
_TABLES = ("seeds", "curves", "splits", "examples", "summary", "verdicts", "limit", "limit_heads")
_LATEX_FILE = "summary.tex"

# One row per condition and mechanism with final seeds; intervals as in `statistics`, null where there is none.
SUMMARY_SCHEMA: dict[str, Any] = {
    "condition": pl.String,
    "mechanism": pl.String,  # as in the configuration
    "learning_rate": pl.Float64,  # chosen on the tuning seeds
    "initial_gain": pl.Float64,  # likewise
    "n": pl.Int64,  # final seeds
    "solved": pl.Int64,  # number of them that solved the task
    "solved_share": pl.Float64,
    "solved_share_low": pl.Float64,
    "solved_share_high": pl.Float64,
    "accuracy": pl.Float64,  # mean over the final seeds
    "accuracy_low": pl.Float64,
    "accuracy_high": pl.Float64,
    "best_of_three": pl.Float64,  # accuracy of the best of three seeds by validation, mean over all choices of three
    "pairs": pl.Int64,  # seeds shared with DPA; null: not compared, as DPA itself
    "difference": pl.Float64,  # mean over them of the accuracy minus that of DPA
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "p": pl.Float64,  # of the sign-flip test, adjusted over the declared family
    "raw_p": pl.Float64,  # the same, not adjusted
    "examples_low": pl.Float64,  # interval of the difference for the drawing of test examples as well: fixed data alone
    "examples_high": pl.Float64,
    "validation_difference": pl.Float64,  # as difference, on validation sequences
    "validation_difference_low": pl.Float64,
    "validation_difference_high": pl.Float64,
    "cross_entropy": pl.Float64,  # mean over the final seeds, on test sequences, in nats
    "cross_entropy_difference": pl.Float64,  # as difference; null where a seed diverged
    "cross_entropy_difference_low": pl.Float64,
    "cross_entropy_difference_high": pl.Float64,
    "steps": pl.Float64,  # mean over all final seeds of the steps before the task was solved
    "steps_difference": pl.Float64,  # mean over the pairs of that of the mechanism minus that of DPA
    "steps_difference_low": pl.Float64,
    "steps_difference_high": pl.Float64,
    "steps_p": pl.Float64,  # of the log-rank test of the steps to solve, adjusted likewise
    "untested": pl.String,  # why there is no test
}

# Characters that LaTeX takes for commands, or lacks in some fonts.
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "²": r"\textsuperscript{2}",
    "⁴": r"\textsuperscript{4}",
})  # fmt: skip


def export_study(
    results: StudyResults,
    directory: Path | str,
    formats: Sequence[str],
    more: Mapping[str, pl.DataFrame] | None = None,
) -> list[Path]:
    """Write the results as files: tables as CSV or parquet, the summary as LaTeX.

    The tables are ``seeds``, ``curves``, ``splits`` and, where data are fixed, ``examples``, all rows of
    `StudyResults`; ``summary``; and, where the study asks for claims, ``verdicts``. ``config.toml``, ``about.json`` and
    (where tasks or mechanisms are from files) ``record.json`` beside them let `load_results` read them. Files that an
    earlier export has left there are removed, so that all in the folder are of one study; LaTeX alone leaves them.

    Args:
        results: Results of the study.
        directory: Folder to write to; it is made if it does not exist.
        formats: Some of `FORMATS`.
        more: Further tables by name, to be written beside the others.

    Returns:
        The files.

    Raises:
        ValueError: A format is not known, or there are no results yet.
    """
    for wanted in formats:
        if wanted not in FORMATS:
            raise ValueError(f"format must be one of {list(FORMATS)}, got {wanted!r}")
    if results.seeds.is_empty():
        raise ValueError("no cell is finished yet: there is nothing to export")
    directory = Path(directory)
    tables = {**study_tables(results), **(more or {})}
    files: dict[str, bytes] = {}
    old: list[Path] = []
    if {"csv", "parquet"} & set(formats):  # with these, the tables can be read as a study
        old = _exported_before(directory)
        files |= {"config.toml": results.config.encode(), ABOUT: about(results).encode()}
        if results.record is not None:
            files[RECORD] = results.record.to_json().encode()
    for name, table in tables.items():
        if "csv" in formats:
            files[f"{name}.csv"] = table.write_csv().encode()
        if "parquet" in formats:
            files[f"{name}.parquet"] = parquet(table, dense=True)
    if "latex" in formats:
        files[_LATEX_FILE] = latex_table(results).encode()
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(directory / name, content)
    for path in old:
        if path.name not in files:
            path.unlink()
    return [directory / name for name in files]


def _exported_before(directory: Path) -> list[Path]:
    """The files of an earlier export; none where the folder does not look like one."""
    names = [f"{name}.{end}" for name in _TABLES for end in ("csv", "parquet")]
    found = [path for name in (*names, _LATEX_FILE) if (path := directory / name).is_file()]
    is_export = (directory / "config.toml").is_file() and any(path.stem == "seeds" for path in found)
    return found if is_export else []


def study_tables(results: StudyResults) -> dict[str, pl.DataFrame]:
    """All rows of `StudyResults`, the summary and the verdicts, by the names of their files."""
    tables = {name: getattr(results, name) for name in ("seeds", "curves", "splits", "examples")}
    if results.examples.is_empty():
        del tables["examples"]
    tables["summary"] = summary_table(results)
    if results.claims:
        tables["verdicts"] = verdict_table(results)
    return tables


def verdict_table(results: StudyResults) -> pl.DataFrame:
    """A row for each claim of the study; columns are the attributes of `Verdict`."""
    return pl.DataFrame([vars(verdict) for verdict in verdicts(results, results.claims)])


def summary_table(results: StudyResults) -> pl.DataFrame:
    """A row for each condition and mechanism with final seeds, in the study's order; columns `SUMMARY_SCHEMA`."""
    rows = [
        {
            "condition": summary.condition,
            "mechanism": summary.mechanism,
            **summary.setting._asdict(),
            "n": summary.seeds,
            "solved": summary.solved,
            "solved_share": summary.solved / summary.seeds,
            "accuracy": summary.accuracy,
            "best_of_three": summary.best_of_three,
            "pairs": comparison and len(comparison.seeds),
            "difference": comparison and comparison.difference,
            "p": comparison and comparison.p,
            "raw_p": comparison and comparison.raw_p,
            "validation_difference": comparison and comparison.validation_difference,
            "cross_entropy": summary.cross_entropy,
            "cross_entropy_difference": comparison and comparison.cross_entropy_difference,
            "steps": summary.restricted_steps,
            "steps_difference": comparison and comparison.steps_difference,
            "steps_p": comparison and comparison.steps_p,
            "untested": comparison and comparison.untested,
            **_ends("solved_share", summary.solved_interval),
            **_ends("accuracy", summary.accuracy_interval),
            **_ends("difference", comparison and comparison.interval),
            **_ends("examples", comparison and comparison.example_interval),
            **_ends("validation_difference", comparison and comparison.validation_interval),
            **_ends("cross_entropy_difference", comparison and comparison.cross_entropy_interval),
            **_ends("steps_difference", comparison and comparison.steps_interval),
        }
        for summary, comparison in _lines(results)
    ]
    return pl.DataFrame(rows, schema=SUMMARY_SCHEMA)


def latex_table(results: StudyResults) -> str:
    r"""The summary as a LaTeX ``tabular`` with booktabs' rules, for a paper to ``\input``."""
    level = f"{LEVEL:.0%}".replace("%", r"\%")
    lines = [
        r"% Needs \usepackage{booktabs}. In brackets: intervals of the share of seeds solved (Wilson), and of the mean",
        f"% accuracy and the mean paired difference (bootstrap), all at {level}; none for few seeds, or equal values.",
        r"\begin{tabular}{llrlll}",
        r"\toprule",
        rf"condition & mechanism & $n$ & solved & mean accuracy & accuracy $-$ {mechanism_name(BASELINE)} \\",
        r"\midrule",
    ]
    before = None
    for summary, comparison in _lines(results):
        if before not in (None, summary.condition):
            lines.append(r"\addlinespace")
        share = f"[{summary.solved_interval.low:.2f}, {summary.solved_interval.high:.2f}]"
        cells = [
            "" if summary.condition == before else summary.condition.translate(_LATEX),
            mechanism_name(summary.mechanism).translate(_LATEX),
            str(summary.seeds),
            f"{summary.solved}/{summary.seeds} {share}",
            _number(summary.accuracy, summary.accuracy_interval, ".3f"),
            "" if comparison is None else _number(comparison.difference, comparison.interval, "+.3f"),
        ]
        lines.append(" & ".join(cells).strip() + r" \\")
        before = summary.condition
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _lines(results: StudyResults) -> list[tuple[Summary, Comparison | None]]:
    """Each summary, and its comparison with the baseline, if there is one."""
    compared = {(found.condition, found.candidate.mechanism): found for found in comparisons(results)}
    return [(summary, compared.get((summary.condition, summary.mechanism))) for summary in summaries(results)]


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    return {f"{name}_low": interval and interval.low, f"{name}_high": interval and interval.high}


def _number(value: float, interval: Interval | None, spec: str) -> str:
    """A number and its interval in math mode, where a minus sign is one."""
    ends = "" if interval is None else f"\\ [{interval.low:{spec}}, {interval.high:{spec}}]"
    return f"${value:{spec}}{ends}$"
