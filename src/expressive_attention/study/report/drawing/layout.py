"""The conditions that a figure shows, and their places."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import polars as pl

from ...analysis.comparisons import comparisons
from ...config.condition import Condition
from ...runs.results import StudyResults

__all__ = [
    "MOST_CONDITIONS",
    "MOST_PANELS",
    "Ladder",
    "Panel",
    "finished_conditions",
    "ladder",
    "most_different",
    "narrowed",
    "split_conditions",
    "splits_of",
]


# A figure shows so many; the files of numbers beside the figures hold all.
MOST_CONDITIONS = 40  # rows, columns
MOST_PANELS = 12  # panels in sight at once
_MOST_SPLITS = 3
# Fields that the name of a task in a figure leaves out, where the others tell it from the rest.
_SAY_LITTLE = ("kind", "operation", "operations", "context")
_MOST_SPLIT_CONDITIONS = 8


@dataclass(frozen=True)
class Panel:
    """The conditions of one model.

    Attributes:
        title: The difference of this model from the study's others, empty if there is only one.
        conditions: Pairs of a column of the `Ladder` and the condition there, by ascending column.
    """

    title: str
    conditions: tuple[tuple[int, Condition], ...]


@dataclass(frozen=True)
class Ladder:
    """A study's conditions laid out by task and model.

    Attributes:
        tasks: Lines that name each task, by ascending complexity: one column per task, so that tasks of
            equal complexity stay apart.
        panels: One per model, in the study's order.
    """

    tasks: tuple[tuple[str, ...], ...]
    panels: tuple[Panel, ...]


def ladder(results: StudyResults) -> Ladder:
    """Lays the conditions out by task and model."""
    by_complexity = sorted(results.conditions, key=lambda condition: condition.facts["complexity"])
    tasks = {_key(condition.task): condition for condition in by_complexity}
    models = {_key(condition.model): condition.model for condition in results.conditions}
    columns = {key: column for column, key in enumerate(tasks)}
    task_names = _distinguish([condition.task for condition in tasks.values()])
    model_names = _distinguish(list(models.values()))
    return Ladder(
        tasks=tuple(
            (*_lines(names or [condition.task_label]), f"{round(condition.facts['complexity'], 1):g} bits")
            for names, condition in zip(task_names, tasks.values(), strict=True)
        ),
        panels=tuple(
            Panel(
                title=", ".join(names),
                conditions=tuple(
                    (columns[_key(condition.task)], condition)
                    for condition in by_complexity
                    if _key(condition.model) == key
                ),
            )
            for names, key in zip(model_names, models, strict=True)
        ),
    )


def finished_conditions(results: StudyResults) -> list[Condition]:
    """Conditions that have final seeds, in the study's order."""
    labels = set(results.seeds.filter(pl.col("role") == "final")["condition"])
    return [condition for condition in results.conditions if condition.label in labels]


def most_different(results: StudyResults, count: int) -> list[Condition]:
    """Up to `count` finished conditions on which the mechanisms differ most, in the study's order."""
    gaps: dict[str, float] = {}
    for comparison in comparisons(results):
        gaps[comparison.condition] = max(gaps.get(comparison.condition, 0.0), abs(comparison.difference))
    finished = finished_conditions(results)
    chosen = sorted(finished, key=lambda condition: -gaps.get(condition.label, 0.0))[:count]
    labels = {condition.label for condition in chosen}
    return [condition for condition in finished if condition.label in labels]


@lru_cache(maxsize=4)
def narrowed(results: StudyResults, count: int = MOST_CONDITIONS) -> StudyResults:
    """The study itself if it has at most `count` conditions, else the part with its most different conditions."""
    if len(results.conditions) <= count:
        return results
    return replace(results, conditions=most_different(results, count))


@lru_cache(maxsize=4)
def splits_of(results: StudyResults) -> dict[str, list[str]]:
    """Names of the splits of each finished condition, by its label: position first, three at most."""
    final = results.splits.filter(pl.col("role") == "final").select("condition", "split").unique(maintain_order=True)
    found: dict[str, list[str]] = {condition.label: [] for condition in finished_conditions(results)}
    for label, split in final.iter_rows():
        if label in found and len(found[label]) < _MOST_SPLITS:
            found[label].append(split)
    return {label: splits for label, splits in found.items() if splits}


def split_conditions(results: StudyResults) -> list[Condition]:
    """The conditions, as many as can be shown, that are split by something else than position."""
    splits = splits_of(results)
    ranked = most_different(results, len(results.conditions))
    others = [found for found in ranked if set(splits.get(found.label, ())) - {"position"}]
    return others[:_MOST_SPLIT_CONDITIONS]


def _key(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, default=str)


def _distinguish(settings: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each of the settings, the fields that tell it from the others, as ``"basis 16"``."""
    keys = dict.fromkeys(key for fields in settings for key in fields)
    varying = [key for key in keys if len({_key({key: fields.get(key)}) for fields in settings}) > 1]
    for key in _SAY_LITTLE:
        others = [name for name in varying if name != key]
        told_apart = {_key({name: fields.get(name) for name in others}) for fields in settings}
        if len(told_apart) == len({_key(fields) for fields in settings}):
            varying = others
    return [
        [f"{key.replace('_', ' ')} {_value(fields[key])}" for key in varying if key in fields] for fields in settings
    ]


def _value(value: Any) -> str:
    return " ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)


def _lines(names: Sequence[str]) -> list[str]:
    """Lines that fit a column: ``"delays 2 3 4 5"`` takes two."""
    return [line for name in names for line in (textwrap.wrap(name, 10) if "," not in name else [name])]
