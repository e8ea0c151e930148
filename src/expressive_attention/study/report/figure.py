"""A figure of the report, as a file of `figures/` declares it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from ..analysis.comparisons import Comparison, comparisons
from ..analysis.summaries import summaries
from ..analysis.wording import mechanism_name
from ..runs.results import StudyResults
from ..words import listed
from .attention import AttentionMap
from .drawing.description import Drawing
from .drawing.layout import finished_conditions, ladder, narrowed
from .drawing.theme import Style, styles

__all__ = ["Material", "ReportFigure"]


@dataclass(frozen=True)
class Material:
    """Results that figures are drawn from.

    Attributes:
        results: The study.
        maps: Attention maps of some of its models.
    """

    results: StudyResults
    maps: Sequence[AttentionMap] = ()

    @cached_property
    def shown(self) -> StudyResults:
        """The study with as many conditions as a figure can show."""
        return narrowed(self.results)

    @cached_property
    def compared(self) -> list[Comparison]:
        """The comparisons of all conditions."""
        return comparisons(self.results)

    @cached_property
    def styles(self) -> dict[str, Style]:
        """The look of each mechanism."""
        return styles(self.results.mechanisms)

    @property
    def key(self) -> list[tuple[Style, str]]:
        """The look and the name of each mechanism."""
        return [(style, mechanism_name(mechanism)) for mechanism, style in self.styles.items()]

    @property
    def names(self) -> str:
        """All mechanisms in words."""
        return listed([name for _, name in self.key])

    @property
    def candidates(self) -> str:
        """The mechanisms that are compared with DPA, in words; more than two without their names."""
        names = list(dict.fromkeys(mechanism_name(found.candidate.mechanism) for found in self.compared))
        return " or ".join(names) if len(names) < 3 else "the others"

    @property
    def seeds(self) -> str:
        """``"n = 8 per condition and mechanism"``."""
        counts = [summary.seeds for summary in summaries(self.results)]
        return f"n\u00a0=\u00a0{_range(counts)} per condition and mechanism"

    @property
    def pairs(self) -> str:
        """``"n = 8 per condition"``, of pairs of seeds."""
        return f"n\u00a0=\u00a0{_range([len(found.differences) for found in self.compared])} per condition"

    @property
    def ordered(self) -> str:
        """A sentence on the order of the tasks, if there are several."""
        if len(ladder(self.shown).tasks) < 2:
            return ""
        return " Tasks are ordered by the size of their state space in bits, equally spaced."

    def shown_note(self, shown: int, name: str) -> str:
        """A sentence on the number of conditions that a figure shows, if not all; `name` is the figure's."""
        finished = len(finished_conditions(self.results))
        if shown >= finished:
            return ""
        return f" Shown: the {shown} of {finished} conditions with the largest differences; all are in {name}.csv."


@dataclass(frozen=True)
class ReportFigure:
    """One figure, drawn for the page and for files.

    Attributes:
        order: Place on the page: figures that answer most come first.
        title: Its heading.
        draw: Describes it; None where the results do not allow it.
        table: Its numbers. All conditions are in it, also where the figure shows only some.
    """

    order: int
    title: str
    draw: Callable[[Material], Drawing | None]
    table: Callable[[Material], pl.DataFrame]


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"
