"""A table of the page: columns, rows, and the number by which a reader sorts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...analysis.estimators import Interval

__all__ = ["NONE", "Cell", "Column", "Table", "ends"]


NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a smaller line below it, the number that sorts it (None: the text), and whether it is bold."""

    text: str
    small: str = ""
    value: float | None = None
    is_strong: bool = False


@dataclass(frozen=True)
class Column:
    """A column: lines of its heading, and whether its cells are numbers."""

    heading: str
    is_number: bool = True

    @property
    def label(self) -> str:
        """The heading in one line."""
        return self.heading.replace("\n", " ")


@dataclass(frozen=True)
class Table:
    """A table of the page; the first cell of each row names it.

    Attributes:
        caption: Its subject.
        note: The meaning of its numbers.
        columns: Its columns.
        rows: Its rows, of a cell for each column.
        is_sortable: Whether a reader may sort it.
    """

    caption: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    is_sortable: bool = True


def ends(interval: Interval | None, spec: str) -> str:
    """An interval in brackets."""
    return f"[{interval:{spec}}]" if interval else "no interval"
