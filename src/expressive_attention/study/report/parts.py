"""Parts that several figures share: rows of conditions, panels against steps, maps, and columns of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from ..analysis.estimators import LEVEL, MINIMUM_FOR_INTERVAL, Interval
from ..analysis.summaries import Summary
from ..analysis.wording import divided
from ..config.condition import Condition
from ..runs.results import StudyResults
from ..words import plural
from .drawing.description import Axis, Cells, Drawing, Group, Panel, Part, Rule
from .drawing.layout import MOST_CONDITIONS, MOST_PANELS, ladder, most_different, narrowed
from .drawing.theme import GRID, slot_height, steps_reach, wrap
from .figure import Material

__all__ = [
    "BOOTSTRAP",
    "ENDS",
    "PLACE",
    "SHARE_RANGE",
    "SOLVED",
    "condition_rows",
    "drawing_against_steps",
    "ends",
    "map_panel",
    "place_in_map",
    "solved_of",
    "tasks_axis",
]


SHARE_RANGE = (-0.03, 1.03)  # a share, with room for marks at both ends
BOOTSTRAP = f"{LEVEL:.0%} bootstrap interval (none below {MINIMUM_FOR_INTERVAL} seeds or where all are equal)"
_LETTERS = 15  # of the title of a vertical axis in an inch of it
ENDS = {"low": pl.Float64, "high": pl.Float64}
SOLVED = {"mechanism": pl.String, "solved": pl.Int64, "seeds": pl.Int64, "share": pl.Float64}
PLACE = {"condition": pl.String, "model": pl.String, "task": pl.String, "bits": pl.Float64}


def condition_rows(labels: Sequence[str], along: Axis, parts: Iterable[Part], mechanisms: Sequence[str]) -> Panel:
    """A panel with one named row per condition, from the top; its axis is named by what these have in common.

    The `mechanisms` are those that a row shows below each other.
    """
    shared, own = divided(labels)
    names = [wrap(label) for label in own]
    rules = [Rule(boundary - 0.5, "y", GRID) for boundary in range(1, len(labels))]
    height = max(0.5, 0.1 + 0.14 * max(map(len, names)), slot_height(mechanisms)) * len(labels)
    title = "\n".join(wrap(shared, max(20, int(_LETTERS * height))))  # a longer one would be cut off
    return Panel("", along, Axis(title, (len(labels) - 0.5, -0.5), names), [*rules, *parts], height)


def tasks_axis(tasks: Sequence[Sequence[str]]) -> Axis:
    """A column for each task of a ladder."""
    return Axis("task, state space in bits", (-0.5, len(tasks) - 0.5), tasks)


def drawing_against_steps(
    material: Material,
    name: str,
    label: str,
    parts: Callable[[Condition], Sequence[Part]],
    *,
    alternative: str,
    note: str,
) -> Drawing:
    """A share against training steps, one panel per condition: some in sight, some to unfold.

    Args:
        material: Results that it is drawn from.
        name: The figure's name.
        label: The share.
        parts: Draws a condition.
        alternative: As `Drawing.alternative`.
        note: As `Drawing.note`.
    """
    results = material.results
    first = most_different(results, MOST_PANELS)
    labels = {condition.label for condition in first}
    others = [found for found in most_different(results, MOST_CONDITIONS) if found.label not in labels]
    along, up = Axis("training steps", (0, steps_reach(results))), Axis(label, SHARE_RANGE, step=0.25)

    def panels(conditions: Sequence[Condition]) -> list[Panel]:
        return [Panel(found.label, along, up, parts(found), height=1.75) for found in conditions]

    return Drawing(
        alternative=alternative,
        note=note,
        groups=[Group("", panels(first))],
        selected=material.shown_note(len(first) + len(others), name),
        columns=2,
        folded=(
            f"{plural(len(others), 'condition')} with smaller differences",
            [Group("", panels(others))] if others else [],
        ),
        key=material.key,
        marks=False,
    )


def map_panel(
    results: StudyResults,
    title: str,
    cells: Mapping[str, tuple[float, str, str]],
    colors: Sequence[str],
    limits: tuple[float, float],
) -> Panel:
    """A map of one number per model and task: value, text and detail of each condition, by its label."""
    layout = ladder(narrowed(results))
    shape = len(layout.panels), len(layout.tasks)
    values = np.full(shape, np.nan)
    texts, details = np.full(shape, "", dtype=object), np.full(shape, "", dtype=object)
    for row, panel in enumerate(layout.panels):
        for column, condition in panel.conditions:
            if condition.label in cells:
                values[row, column], texts[row, column], detail = cells[condition.label]
                details[row, column] = f"{condition.label}<br>{detail}"
    models = [wrap(panel.title or "the model", 18) for panel in layout.panels]
    return Panel(
        title,
        tasks_axis(layout.tasks),
        Axis("", (len(models) - 0.5, -0.5), models),
        [Cells(values.tolist(), colors, limits, texts.tolist(), details.tolist())],
        height=0.42 * len(models),
    )


def solved_of(summary: Summary) -> dict[str, Any]:
    """The columns `SOLVED` of a mechanism on a condition."""
    share = summary.solved / summary.seeds
    return dict(zip(SOLVED, (summary.mechanism, summary.solved, summary.seeds, share), strict=True))


def ends(interval: Interval | None) -> dict[str, float | None]:
    """The columns `ENDS` of an interval."""
    return {"low": interval.low if interval else None, "high": interval.high if interval else None}


def place_in_map(label: str, conditions: Iterable[Condition]) -> dict[str, Any]:
    """The columns `PLACE` of a condition."""
    condition = next(found for found in conditions if found.label == label)
    named = (" ".join(f"{key}={value}" for key, value in part.items()) for part in (condition.model, condition.task))
    return dict(zip(PLACE, (label, *named, condition.facts["complexity"]), strict=True))
