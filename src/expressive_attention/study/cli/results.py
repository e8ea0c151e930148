"""Commands that read the results of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..words import plural
from .common import Directory, Trust, fail, one_line_errors, print_table, write_page
from .run import print_findings

if TYPE_CHECKING:
    from ..runs.results import StudyResults

__all__ = ["compare", "export", "report", "status"]


def report(directory: Directory, trust: Trust = False) -> None:
    """Write the report of a study from its finished cells: DIR/report.html and DIR/figures.

    DIR may also be a folder of exported tables, which has no trained models and so no attention maps.

    Example: ea study report runs/quick
    """
    from ..runs.exported import load_results

    with one_line_errors():
        results = load_results(directory, trust=trust)
        page = write_page(results, directory, trust=trust)
    print_findings(results)
    typer.echo(f"\n{page}")


def status(
    directory: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    trust: Trust = False,
) -> None:
    """Print the results of a study so far, a row per condition and mechanism.

    DIR may also be a folder of exported tables.

    Example: ea study status runs/quick
    """
    from ..runs.exported import load_results
    from ..runs.store import Store

    with one_line_errors():
        results = load_results(directory, trust=trust)
        config, _ = Store(directory).config(trust=trust)
    rows = _status_rows(results, config.seeds.final)
    if as_json:
        typer.echo(json.dumps({"cells": rows}, indent=2))
        return
    has_gains = len(config.training.initial_gains) > 1
    chosen = ["learning rate", *(["gain"] if has_gains else [])]
    table = Table("condition", "mechanism", *chosen, "seeds", "solved", "mean accuracy", box=None)
    for row in rows:
        accuracy = "" if row["accuracy_mean"] is None else f"{row['accuracy_mean']:.4f}"
        names = ("learning_rate", "initial_gain") if has_gains else ("learning_rate",)
        setting = ["" if row[name] is None else f"{row[name]:g}" for name in names]
        seeds = f"{row['seeds']} of {config.seeds.final}"
        table.add_row(row["condition"], row["mechanism"], *setting, seeds, str(row["solved"]), accuracy)
    print_table(table)
    typer.echo(_unfinished(results) or "all cells are finished")


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a study, e.g. runs/quick, or of its export.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another one.")],
    trust: Trust = False,
) -> None:
    """Print two runs beside each other, and on which conditions they differ.

    Accuracies and shares solved differ where their 95% intervals do not overlap.

    Example: ea study compare runs/quick runs/quick-again
    """
    from ..analysis.wording import mechanism_name
    from ..report.two_runs import compared_runs, differing
    from ..runs.exported import load_results

    with one_line_errors():
        lines = compared_runs(load_results(first, trust=trust), load_results(second, trust=trust))
    if not lines:
        fail(f"neither {first} nor {second} has a finished final seed; `ea study run` makes them")
    table = Table("condition", "", "A: solved, accuracy", "B: solved, accuracy", "differs in", box=None)
    for line in lines:
        reached = [
            "" if found is None else f"{found.solved}/{found.seeds}, {found.accuracy:.3f}"
            for found in (line.first, line.second)
        ]
        said = "; ".join(line.differences) or ("same bits" if line.is_identical else "nothing shown")
        table.add_row(line.condition, mechanism_name(line.mechanism), *reached, said)
    typer.echo(f"A: {first}\nB: {second}")
    print_table(table)
    found, conditions = differing(lines), {line.condition for line in lines}
    typer.echo(f"The runs differ on {len(found)} of {plural(len(conditions), 'condition')}" + (":" if found else "."))
    for label in found:
        typer.echo(f"  {label}")


def export(
    directory: Directory,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write to.", show_default="DIR/export"),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", "-f", metavar="csv|parquet|latex", help="May be given several times.", show_default="csv"
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Write a study's results as files: tables of all rows, a summary, the verdicts; LaTeX has the summary alone.

    DIR may also be a folder of exported tables, to have them in another format. Tables of an earlier export to the same
    folder are replaced, or removed.

    Example: ea study export runs/quick --format parquet --format latex
    """
    from ..analysis.limit import limit_tables, not_measured
    from ..report.export import export_study
    from ..runs.exported import load_results
    from ..runs.store import Store

    with one_line_errors():
        store, folder = Store(directory), out or directory / "export"
        results = load_results(directory, trust=trust)
        try:
            tables = limit_tables(results, store, trust=trust)
            files = export_study(results, folder, formats or ["csv"], tables)
        except ValueError as error:
            fail(str(error))
    for file in files:
        typer.echo(file)
    if results.unfinished:
        typer.echo(f"{_unfinished(results)}, and not in it", err=True)
    if missing := not_measured(results, tables):
        typer.echo(f"its z² limit lacks {plural(len(missing), 'condition')}: {'; '.join(missing)}", err=True)


def _unfinished(results: StudyResults) -> str:
    """How many cells are not finished; empty: all are."""
    count = len(results.unfinished)
    return f"{plural(count, 'cell')} {'is' if count == 1 else 'are'} not finished" if count else ""


def _status_rows(results: StudyResults, wanted: int) -> list[dict[str, Any]]:
    import polars as pl

    rows = []
    for condition in results.conditions:
        for mechanism in results.mechanisms:
            final = results.seeds.filter(
                (pl.col("condition") == condition.label)
                & (pl.col("mechanism") == mechanism)
                & (pl.col("role") == "final")
            )
            rows.append({
                "condition": condition.label,
                "task": condition.task,
                "mechanism": mechanism,
                "position": condition.model["position"],
                "model": condition.model,
                "learning_rate": final["learning_rate"][0] if len(final) else None,
                "initial_gain": final["initial_gain"][0] if len(final) else None,
                "seeds": len(final),
                "solved": int(final["solved"].sum()),
                "accuracy_mean": final["accuracy"].mean(),
                "done": len(final) == wanted,
            })  # fmt: skip
    return rows
