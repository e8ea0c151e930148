"""Parts that several commands share: arguments, and errors of one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ..errors import StudyError

if TYPE_CHECKING:
    from ..runs.results import StudyResults

__all__ = ["Directory", "Trust", "fail", "of_the_system", "one_line_errors", "print_table", "write_page"]

_NO_LIMIT = 1_000_000


Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study, e.g. runs/quick.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the Python files in the folder, with your rights: its own tasks and mechanisms."),
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End with one line and exit code 2 on an error that a user can put right."""
    try:
        yield
    except StudyError as error:
        fail(str(error))
    except OSError as error:
        fail(of_the_system(error))
    except (Exception, SystemExit) as error:
        from ..config.task_files import blame

        if (where := blame(error)) is None:
            raise
        fail(where)  # in a file of tasks


def fail(message: str) -> NoReturn:
    """End with one line and exit code 2."""
    typer.echo(f"ea: {message}", err=True)
    sys.exit(2)


def of_the_system(error: OSError) -> str:
    """An error of the system, such as that of a full disk, in one line."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def write_page(results: StudyResults, directory: Path, *, trust: bool = False) -> Path:
    """Write the report, whose packages take a while to import."""
    from ..report.page import write_report

    return write_report(results, directory, trust=trust)


def print_table(table: Table) -> None:
    """Print a table as it is: what stands in its cells is no markup. A pipe or file gets whole lines."""
    for column in table.columns:
        column.overflow = "fold"  # nothing is cut
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _NO_LIMIT
    console.print(table)
