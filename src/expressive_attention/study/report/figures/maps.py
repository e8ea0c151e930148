"""Maps: one number for each model and task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...analysis.comparisons import comparisons
from ...analysis.estimators import LEVEL
from ...analysis.summaries import summaries
from ...analysis.wording import describe_p, mechanism_name
from ...runs.results import StudyResults
from .layout import ladder, narrowed

__all__ = ["Map", "margin_maps", "solved_maps"]


@dataclass(frozen=True)
class Map:
    """One number per model and task.

    Attributes:
        title: Its subject.
        rows: Names of the models.
        columns: Lines that name each task, by ascending complexity.
        values: ``(rows, columns)``, NaN where there is no number.
        texts: Text in each cell.
        details: Text that a cell shows when pointed at.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    values: np.ndarray
    texts: tuple[tuple[str, ...], ...]
    details: tuple[tuple[str, ...], ...]


def margin_maps(results: StudyResults) -> list[Map]:
    """Mean accuracy of each mechanism minus that of DPA, by model and task; a star where one is ahead."""
    compared = comparisons(results)  # of all conditions, also those not shown: p is adjusted for their number
    return [
        _map(
            results,
            f"{mechanism_name(mechanism)} - DPA",
            {
                found.condition: (
                    found.difference,
                    f"{found.difference:+.2f}{'*' if found.leader else ''}",
                    f"{found.difference:+.4f}, "
                    + (f"{LEVEL:.0%} interval {found.interval:+.4f}" if found.interval else "no interval")
                    + f", {len(found.differences)} pairs"
                    + ("" if found.p is None else f", {describe_p(found.p)}")
                    + f": {found.verdict}",
                )
                for found in compared
                if found.candidate.mechanism == mechanism
            },
        )
        for mechanism in dict.fromkeys(found.candidate.mechanism for found in compared)
    ]


def solved_maps(results: StudyResults) -> list[Map]:
    """Share of seeds that each mechanism solved, by model and task."""
    return [
        _map(
            results,
            mechanism_name(mechanism),
            {
                found.condition: (
                    found.solved / found.seeds,
                    f"{found.solved}/{found.seeds}",
                    f"{found.solved} of {found.seeds} seeds solved, {LEVEL:.0%} interval {found.solved_interval:.3f}",
                )
                for found in summaries(results)
                if found.mechanism == mechanism
            },
        )
        for mechanism in dict.fromkeys(found.mechanism for found in summaries(results))
    ]


def _map(results: StudyResults, title: str, cells: dict[str, tuple[float, str, str]]) -> Map:
    """Value, text and detail of each condition, by label, put where the condition is."""
    layout = ladder(narrowed(results))
    shape = len(layout.panels), len(layout.tasks)
    values = np.full(shape, np.nan)
    texts, details = np.full(shape, "", dtype=object), np.full(shape, "", dtype=object)
    for row, panel in enumerate(layout.panels):
        for column, condition in panel.conditions:
            if condition.label in cells:
                values[row, column], texts[row, column], detail = cells[condition.label]
                details[row, column] = f"{condition.label}<br>{detail}"
    return Map(
        title=title,
        rows=tuple(panel.title or "the model" for panel in layout.panels),
        columns=layout.tasks,
        values=values,
        texts=tuple(map(tuple, texts)),
        details=tuple(map(tuple, details)),
    )
