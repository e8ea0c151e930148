"""Commands that read the results of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .common import Directory, Trust, fail, one_line_errors, write_page
from .run import print_findings

if TYPE_CHECKING:
    from ..runs.results import StudyResults

__all__ = ["export", "report", "status"]


def report(directory: Directory, trust: Trust = False) -> None:
    """Write the report of a study from its finished cells: DIR/report.html and DIR/figures."""
    from ..runs.results import collect
    from ..runs.store import Store

    with one_line_errors():
        results = collect(Store(directory))
        page = write_page(results, directory, trust=trust)
    print_findings(results)
    typer.echo(f"\n{page}")


def status(
    directory: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Print the results of a study so far, a row per condition and mechanism."""
    from ..runs.results import collect
    from ..runs.store import Store

    with one_line_errors():
        results = collect(Store(directory))
        config, _ = Store(directory).config()
    rows = _status_rows(results, config.seeds.final)
    if as_json:
        typer.echo(json.dumps({"cells": rows}, indent=2))
        return
    table = Table("condition", "mechanism", "learning rate", "seeds", "solved", "mean accuracy", box=None)
    for condition, row in zip(_conditions_by_mechanism(results), rows, strict=True):
        accuracy = "" if row["accuracy_mean"] is None else f"{row['accuracy_mean']:.4f}"
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        seeds = f"{row['seeds']} of {config.seeds.final}"
        table.add_row(condition, row["mechanism"], rate, seeds, str(row["solved"]), accuracy)
    Console(highlight=False).print(table)
    typer.echo(f"{len(results.unfinished)} cells are not finished" if results.unfinished else "all cells are finished")


def export(
    directory: Directory,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write to.  [default: DIR/export]")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", metavar="csv|parquet|latex", help="May be given several times.  [default: csv]"),
    ] = None,
) -> None:
    """Write a study's results as files: tables of all rows, a summary, the verdicts; LaTeX has the summary alone.

    The study's configuration is written beside them.
    """
    from ..analysis.limit import limit_tables
    from ..files import write_atomically
    from ..report.export import export_study
    from ..runs.results import collect
    from ..runs.store import Store

    with one_line_errors():
        store, folder = Store(directory), out or directory / "export"
        results = collect(store)
        try:
            tables = limit_tables(results, store)
            files = export_study(results, folder, formats or ["csv"], tables)
        except ValueError as error:
            fail(str(error))
        write_atomically(folder / "config.toml", store.config()[1].encode())
    for file in [*files, folder / "config.toml"]:
        typer.echo(file)
    if results.unfinished:
        typer.echo(f"{len(results.unfinished)} cells are not finished, and not in it", err=True)


def _conditions_by_mechanism(results: StudyResults) -> list[str]:
    return [condition.label for condition in results.conditions for _ in results.mechanisms]


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
                "task": condition.task,
                "mechanism": mechanism,
                "position": condition.model["position"],
                "model": condition.model,
                "learning_rate": final["learning_rate"][0] if len(final) else None,
                "seeds": len(final),
                "solved": int(final["solved"].sum()),
                "accuracy_mean": final["accuracy"].mean(),
                "done": len(final) == wanted,
            })  # fmt: skip
    return rows
