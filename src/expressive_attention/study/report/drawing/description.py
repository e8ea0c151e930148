"""The content of a figure, independent of the library that draws it. Sizes are in points, as on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .theme import Style

__all__ = ["Axis", "Cells", "Curves", "Drawing", "Group", "Note", "Panel", "Part", "Points", "Reference", "Rule"]


@dataclass(frozen=True)
class Points:
    """Marks of a mechanism, each with a bar where it has an interval.

    Attributes:
        x: Their positions.
        y: Their positions.
        style: The look of the mechanism.
        texts: Text that each shows when pointed at; ``<br>`` breaks lines.
        size: Diameter of a mark.
        value: Format of a number that follows the text; empty: there is none.
        along: Axis of the numbers and of the bars.
        low: Lower end of each bar; None: there is no bar.
        high: Upper end.
        joined: Whether a line joins the marks.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: Style
    texts: Sequence[str]
    size: float
    value: str = ""
    along: Literal["x", "y"] = "y"
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    joined: bool = False


@dataclass(frozen=True)
class Reference:
    """Marks of a predictor that needs no training.

    Attributes:
        name: Its name.
        x: Positions of the marks.
        y: Positions of the marks.
        marker: Name of the mark in image files.
        symbol: Name of the mark on the page.
        size: Diameter of a mark.
        along: Axis of the numbers.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str
    symbol: str
    size: float
    along: Literal["x", "y"] = "y"


@dataclass(frozen=True)
class Curves:
    """Lines of a mechanism.

    Attributes:
        lines: Pairs of positions along x and along y, one for each line.
        style: The look of the mechanism.
        width: Width of a line.
        opacity: Opacity, from 0 to 1.
        name: Text shown beside x and y of the point at the pointer; None: lines have no text.
        stepped: Whether a line keeps its value up to the next point.
    """

    lines: Sequence[tuple[Sequence[float], Sequence[float]]]
    style: Style
    width: float
    opacity: float = 1.0
    name: str | None = None
    stepped: bool = False


@dataclass(frozen=True)
class Rule:
    """A straight line through the panel, at a position of the axis that it crosses."""

    at: float
    across: Literal["x", "y"]
    color: str
    width: float = 0.7
    dotted: bool = False


@dataclass(frozen=True)
class Note:
    """A text: above the left or right end of a panel, in its upper left corner, or right of it at `y`."""

    text: str
    place: Literal["above left", "above right", "inside", "beside"]
    y: float = 0.0


@dataclass(frozen=True)
class Cells:
    """A map of colored cells, at whole numbers of both axes.

    Attributes:
        values: Rows of values; NaN: there is none, and the cell is gray.
        colors: Colors from the first limit to the last, equally spaced.
        limits: Values of the first and the last color.
        texts: Text in each cell; empty: cells have no texts and no gaps between them.
        details: Text that each cell shows when pointed at; empty: its place and value.
    """

    values: Sequence[Sequence[float]]
    colors: Sequence[str]
    limits: tuple[float, float]
    texts: Sequence[Sequence[str]] = ()
    details: Sequence[Sequence[str]] = ()


Part: TypeAlias = Points | Reference | Curves | Rule | Note | Cells


@dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Attributes:
        label: Its title; lines are separated by line feeds.
        limits: Its ends, from left to right and from bottom to top; None: those of the cells.
        ticks: Lines of the names at 0, 1, 2, ...; None: numbers.
        step: Distance of numbers; None: any.
    """

    label: str = ""
    limits: tuple[float, float] | None = None
    ticks: Sequence[Sequence[str]] | None = None
    step: float | None = None


@dataclass(frozen=True)
class Panel:
    """Axes with the parts that are drawn on them.

    Attributes:
        title: Its subject.
        x: The axis below.
        y: The axis on the left.
        parts: Parts that are drawn, from the back to the front.
        height: Height of the axes, in inches.
        square: Whether x and y have the same scale.
    """

    title: str
    x: Axis
    y: Axis
    parts: Sequence[Part]
    height: float
    square: bool = False


@dataclass(frozen=True)
class Group:
    """Panels that belong together; in image files, their titles begin with that of the group."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Drawing:
    """A whole figure.

    Attributes:
        alternative: Its content in words, for readers who cannot see it.
        note: The meaning of its marks.
        groups: Its panels.
        selected: A sentence on the number of conditions that it shows, if not all.
        stacked: Whether the panels are above each other on one axis; else they are beside each other, each for itself.
        columns: Panels beside each other in image files.
        slots: Positions along x that need some width each.
        folded: A heading and further panels, which a reader of the page can unfold.
        key: Style and name of each mechanism in the key.
        marks: Whether the key shows marks beside lines.
        references: Predictors in the key, as in `theme.PREDICTORS`.
        swatches: Colors in the key, and their meaning.
    """

    alternative: str
    note: str
    groups: Sequence[Group]
    selected: str = ""
    stacked: bool = False
    columns: int = 1
    slots: int = 1
    folded: tuple[str, Sequence[Group]] = ("", ())
    key: Sequence[tuple[Style, str]] = ()
    marks: bool = True
    references: Sequence[str] = ()
    swatches: Mapping[str, str] = field(default_factory=dict)

    @property
    def panels(self) -> list[Panel]:
        """All panels that are in sight."""
        return [panel for group in self.groups for panel in group.panels]
