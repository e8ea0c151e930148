"""Commands that need the trained models of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..words import plural
from .common import Directory, Trust, fail, one_line_errors, write_page

__all__ = ["geometry", "limit", "twins", "verify"]


def geometry(
    directory: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder of a study with its trained models.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="PATH_OR_CONFIG", help="A model of Hugging Face transformers, in place of a study."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text that the model of --model reads.")
    ] = None,
    condition: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Condition of the study.", show_default="where the mechanisms differ most"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="S", help="Final seed of the study.", show_default="that of DPA's lowest accuracy"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder to write to.", show_default="RUN/geometry, or geometry"
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Show attention space: an interactive page, pictures, and a table of all heads.

    Example: ea geometry runs/quick
    """
    from ...geometry.folder import write_folder

    if (directory is None) == (model is None):
        fail("geometry takes either the run folder of a study, e.g. runs/quick, or --model with --text")
    if (model is None) != (text is None):
        fail("--model and --text belong together")
    if model is not None and (condition is not None or seed is not None):
        fail("--condition and --seed are of a study, and do not go with --model")
    with one_line_errors():
        if directory is not None:
            from ..report.attention_space import look_into

            look = look_into(directory, condition, seed, trust=trust)
            records, title, tokens = look.records, look.title, look.tokens
            unseen, diverged = look.unseen, look.diverged
        else:
            assert model is not None
            assert text is not None
            from ...geometry.text import record_text

            content = text.read_text(encoding="utf-8", errors="replace")
            try:
                record, words = record_text(model, content)
            except (ValueError, ImportError) as error:
                fail(str(error))
            records, title, tokens = {"model": record}, f"{model} reads {text.name}", [words]
            unseen = diverged = []
        written = write_folder(records, out or (directory or Path()) / "geometry", title=title, tokens=tokens)
        if directory is not None and out is None and (directory / "report.html").exists():
            from ..runs.results import collect
            from ..runs.store import Store

            write_page(collect(Store(directory), trust=trust), directory, trust=trust)  # the report links the page now
    if unseen:
        typer.echo(f"not shown, since their weights cannot be captured: {', '.join(unseen)}\n")
    if diverged:
        typer.echo(f"not shown, since their training diverged: {', '.join(diverged)}\n")
    for name, record in records.items():
        typer.echo(f"{name}\n{record}\n")
    typer.echo("\n".join(str(path) for path in written))


def verify(
    directory: Directory,
    sample: Annotated[int, typer.Option("--sample", "-n", metavar="N", help="Number of cells.")] = 3,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Random seed of the choice of cells.")] = 0,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda|cuda:N", help="Device to train on.")] = "cpu",
    trust: Trust = False,
) -> None:
    """Train some finished cells again, here and with this code, and compare all tables and weights to the bit.

    DIR may also be a folder of exported tables, such as results/ladder of the repository; they have no weights to
    compare. Exit code 0: all are the same. 1: some differ, as may be expected with other versions, another processor or
    another number of threads or device, which are named.

    Example: ea study verify runs/quick --sample 5
    """
    from ..runs.exported import ExportedCells
    from ..runs.verify import sample_cells, verify_cell
    from ..training.devices import devices

    if sample < 1:
        fail(f"--sample must be at least 1, got {sample}")
    differ = 0
    with one_line_errors():
        place = devices(device)[0]
        kept, cells = sample_cells(directory, sample, seed, trust=trust)
        for cell in cells:
            found = verify_cell(cell, kept, place)
            outcome = "; ".join(found.differences) or "same bits"
            typer.echo(f"{cell.identity}  {cell}: {outcome}  ({found.seconds:.0f} s)")
            if found.circumstances:
                typer.echo(f"  not as it was: {'; '.join(found.circumstances)}")
            differ += bool(found.differences)
    have = "has" if len(cells) == 1 else "have"
    where = " in their tables; an export has no weights" if isinstance(kept, ExportedCells) else ""
    typer.echo(f"{len(cells) - differ} of {plural(len(cells), 'cell')} {have} the same bits{where}")
    if differ:
        raise typer.Exit(1)


def limit(
    directory: Directory,
    share: Annotated[
        float,
        typer.Option("--share", metavar="SHARE", help="Steps of the further training, as a share of the first one."),
    ] = 0.05,
    trust: Trust = False,
) -> None:
    """Replace EA's function by z^2, which runs in linear time, in all trained models, and measure the difference.

    Validation sequences are used, before and after a short further training. EA gets the same training as a control.
    Results are kept in DIR/limit; `export` writes them with the other tables.

    Example: ea study limit runs/quick
    """
    from ..analysis.limit import limit_cells, limit_sentences, limit_tables, write_limit
    from ..runs.results import collect
    from ..runs.store import Store

    if not 0 < share <= 1:
        fail(f"--share must be above 0 and at most 1, got {share:g}")
    with one_line_errors():
        store = Store(directory)
        results = collect(store, trust=trust)
        cells = limit_cells(results, store, trust=trust)
        for index, cell in enumerate(cells):
            typer.echo(f"cell {index + 1} of {len(cells)}: {cell.condition}", err=True)
            write_limit(cell, store, share, lambda line: typer.echo(line, err=True))
        tables = limit_tables(results, store, trust=trust)
    for sentence in limit_sentences(results, tables):
        typer.echo(sentence)


def twins(
    directory: Directory,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write to.", show_default="DIR/twins")
    ] = None,
    condition: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Condition of the study.", show_default="where the mechanisms differ most"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="S", help="A final seed.", show_default="the middle one by accuracy")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Parameters in float16: files of half the size.")] = False,
    trust: Trust = False,
) -> None:
    """Write trained models that differ in the mechanism alone, one file each, for `load_twins` to read.

    Example: ea study twins runs/quick --half
    """
    from ..report.twins import write_twins
    from ..runs.store import Store

    with one_line_errors():
        files = write_twins(directory, out or directory / "twins", condition, seed, half=half, trust=trust)
        config, _ = Store(directory).config(trust=trust)
    for file in files:
        typer.echo(f"{file}  ({file.stat().st_size / 1000:.0f} kB)")
    written = {file.stem for file in files}
    if left_out := [mechanism for mechanism in config.mechanisms if mechanism not in written]:
        typer.echo(f"not written: {', '.join(left_out)}, not trained yet, or defined in a Python file", err=True)
