"""How figures lay a study out, and what those of the page and those in files have in common."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import polars as pl

from ..analysis.summaries import (
    LEVEL,
    MINIMUM_FOR_INTERVAL,
    SIGNIFICANCE,
    SMALLEST_EFFECT,
    comparisons,
    describe_p,
    mechanism_name,
    summaries,
)
from ..runs.results import Condition, StudyResults

__all__ = [
    "AHEAD",
    "BEHIND",
    "EMPTY",
    "GRID",
    "INK",
    "MOST_CONDITIONS",
    "MOST_PANELS",
    "MUTED",
    "PREDICTORS",
    "SHARE",
    "Ladder",
    "Map",
    "Panel",
    "Style",
    "candidate_names",
    "crowding",
    "difference_reach",
    "dodge",
    "finished_conditions",
    "ladder",
    "margin_maps",
    "most_different",
    "narrowed",
    "notes",
    "predictors_of",
    "readable_on",
    "shown_note",
    "solved_maps",
    "split_conditions",
    "splits_of",
    "spread",
    "steps_reach",
    "steps_tests",
    "styles",
    "wrap",
]

INK = "#222222"
MUTED = "#666666"
GRID = "#dddddd"
EMPTY = "#e6e6e6"  # of a map where there is no number
SHARE = "#1a6e52"  # of shares and weights, on white
AHEAD, BEHIND = "#0072B2", "#D55E00"  # of the margin: the colors of EA and DPA

# What a figure can show and a reader take in; the files of numbers beside the figures hold all.
MOST_CONDITIONS = 40  # rows, columns
MOST_PANELS = 12  # panels in sight at once
_MOST_SPLITS = 3
# Fields of a task that its name in a figure goes without, where the others tell it from the rest.
_SAY_LITTLE = ("kind", "operation", "operations", "context")
_MOST_SPLIT_CONDITIONS = 8

# Predictors in `Condition.facts`: name for people, marker in image files, symbol in the report, and shift in the
# column, since the accuracies of the trivial ones nearly coincide.
PREDICTORS = {
    "chance": ("chance", "_", "line-ew-open", 0.0),
    "majority": ("majority digit", "x", "x-thin-open", -0.05),
    "copy_last": ("copy last digit", "+", "cross-thin-open", 0.05),
    "ceiling": ("best possible", "2", "y-down-open", 0.0),
}


@dataclass(frozen=True)
class Style:
    """How a mechanism is drawn: told apart by color, marker and dash, so that grey is enough.

    Attributes:
        color: Of lines and markers (Okabe and Ito's palette, safe for color-blind readers).
        fill: Inside of markers.
        marker: Marker in image files.
        line: Line style in image files.
        symbol: Marker in the report.
        dash: Line style in the report.
    """

    color: str
    fill: str
    marker: str
    line: Literal["-", "--", "-.", ":"]
    symbol: str
    dash: str


_EXPRESSIVE = Style("#0072B2", "#0072B2", "o", "-", "circle", "solid")
_DOT_PRODUCT = Style("#D55E00", "#FFFFFF", "s", "--", "square", "dash")
_OTHERS = (
    Style("#009E73", "#009E73", "^", ":", "triangle-up", "dot"),
    Style("#CC79A7", "#FFFFFF", "D", "-.", "diamond", "dashdot"),
    Style("#56B4E9", "#56B4E9", "v", "-.", "triangle-down", "dashdot"),
    Style("#E69F00", "#FFFFFF", "^", ":", "triangle-up", "dot"),
    Style("#000000", "#FFFFFF", "P", "--", "cross", "dash"),
    Style("#009E73", "#FFFFFF", "v", "--", "triangle-down", "dash"),
    Style("#CC79A7", "#CC79A7", "^", "--", "triangle-up", "dash"),
    Style("#56B4E9", "#FFFFFF", "D", ":", "diamond", "dot"),
    Style("#E69F00", "#E69F00", "D", "-.", "diamond", "dashdot"),
    Style("#000000", "#000000", "v", ":", "triangle-down", "dot"),
)


@dataclass(frozen=True)
class Panel:
    """The conditions of one model.

    Attributes:
        title: What tells this model from the study's others, empty if there is only one.
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


@dataclass(frozen=True)
class Map:
    """One number per model and task.

    Attributes:
        title: What it is a map of.
        rows: Names of the models.
        columns: Lines that name each task, by ascending complexity.
        values: ``(rows, columns)``, NaN where there is no number.
        texts: What stands in each cell.
        details: What a cell says when pointed at.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    values: np.ndarray
    texts: tuple[tuple[str, ...], ...]
    details: tuple[tuple[str, ...], ...]


def styles(mechanisms: Sequence[str]) -> dict[str, Style]:
    """How each of the mechanisms is drawn."""
    others = [mechanism for mechanism in mechanisms if mechanism not in ("expressive", "dot_product")]
    found = {"expressive": _EXPRESSIVE, "dot_product": _DOT_PRODUCT}
    found |= {mechanism: _OTHERS[index % len(_OTHERS)] for index, mechanism in enumerate(others)}
    return {mechanism: found[mechanism] for mechanism in mechanisms}


def dodge(mechanisms: Sequence[str]) -> dict[str, float]:
    """Positions beside each other, around 0, within a slot of width 1."""
    count = len(mechanisms)
    return {mechanism: (index - (count - 1) / 2) * 0.7 / count for index, mechanism in enumerate(mechanisms)}


def crowding(mechanisms: Sequence[str]) -> float:
    """Factor on distances inside a mechanism's slot of `dodge`, so that its seeds stay out of the next one's."""
    return min(1.0, 3.5 / len(mechanisms))


def spread(count: int, width: float) -> list[float]:
    """Positions of `count` seeds around 0, so that equal values do not hide each other."""
    return [0.0] if count == 1 else np.linspace(-width / 2, width / 2, count).tolist()


def wrap(label: str, width: int = 20) -> list[str]:
    """Lines of about `width` characters, broken after commas only: ``"basis 16"`` stays on one line."""
    unbroken = re.sub("(?<!,) ", "\u00a0", label)
    return textwrap.wrap(unbroken, width, break_long_words=False, break_on_hyphens=False)


def readable_on(color: str) -> str:
    """Ink or white, whichever contrasts more with the color (relative luminance as in WCAG 2)."""
    shares = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.2 else "#ffffff"


# ---- which conditions, and where ----


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
            (*_lines(names or [condition.label]), f"{round(condition.facts['complexity'], 1):g} bits")
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
    """The study itself if it has at most `count` conditions, else what its most different conditions are in it."""
    if len(results.conditions) <= count:
        return results
    return replace(results, conditions=most_different(results, count))


@lru_cache(maxsize=4)
def splits_of(results: StudyResults) -> dict[str, list[str]]:
    """By what the accuracy of each finished condition is split, by its label: by position first, three at most."""
    final = results.splits.filter(pl.col("role") == "final").select("condition", "split").unique(maintain_order=True)
    found: dict[str, list[str]] = {condition.label: [] for condition in finished_conditions(results)}
    for label, split in final.iter_rows():
        if label in found and len(found[label]) < _MOST_SPLITS:
            found[label].append(split)
    return {label: splits for label, splits in found.items() if splits}


def split_conditions(results: StudyResults) -> list[Condition]:
    """The conditions, as many as can be shown, that are split by more than position."""
    splits = splits_of(results)
    ranked = most_different(results, len(results.conditions))
    return [found for found in ranked if len(splits.get(found.label, ())) > 1][:_MOST_SPLIT_CONDITIONS]


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


# ---- reaches and words ----


def predictors_of(condition: Condition) -> dict[str, float]:
    """Accuracies of the predictors that the condition tells of; a ceiling of 1 goes without saying."""
    facts = {fact: condition.facts[fact] for fact in PREDICTORS if fact in condition.facts}
    if facts.get("ceiling", 0.0) > 1 - 1e-9:
        del facts["ceiling"]
    return facts


def candidate_names(results: StudyResults) -> str:
    """Names of the mechanisms that are compared with DPA."""
    names = dict.fromkeys(mechanism_name(found.candidate.mechanism) for found in comparisons(results))
    return " or ".join(names)


def difference_reach(results: StudyResults) -> float:
    """Largest distance from 0 that the figure of paired differences shows."""
    largest = max(abs(value) for comparison in comparisons(results) for value in comparison.differences)
    return min(1.05, max(0.05, 1.1 * largest))


def steps_reach(results: StudyResults) -> float:
    """Training steps that figures against steps show: the same in each, so that they can be compared."""
    return 1.04 * float(results.seeds.filter(pl.col("role") == "final")["steps"].to_numpy().max())


def shown_note(shown: int, finished: int, name: str) -> str:
    """Which of the finished conditions a figure shows, if not all."""
    if shown >= finished:
        return ""
    return f" Shown: the {shown} of {finished} conditions with the largest differences; all are in {name}.csv."


def steps_tests(results: StudyResults, condition: Condition) -> str:
    """What the log-rank tests of steps to solve say of a condition, e.g. ``"p = 0.031"``; one line each."""
    found = [each for each in comparisons(results) if each.condition == condition.label and each.steps_p is not None]
    several = len(results.mechanisms) > 2
    return "\n".join(
        (f"{mechanism_name(each.candidate.mechanism)}: " if several else "") + describe_p(each.steps_p or 0.0)
        for each in found
        if each.candidate.solved + each.baseline.solved
    )


@lru_cache(maxsize=4)
def notes(results: StudyResults) -> dict[str, str]:
    """What the marks of each figure stand for, by the figure's name."""
    compared = comparisons(results)
    n = f"n\u00a0=\u00a0{_range([summary.seeds for summary in summaries(results)])} per condition and mechanism"
    bootstrap = f"{LEVEL:.0%} bootstrap interval (none below {MINIMUM_FOR_INTERVAL} seeds or where all are equal)"
    ordered = "Tasks are ordered by the size of their state space in bits, equally spaced."
    found = {
        "accuracy": f"Small marks: one seed each ({n}). Large marks: mean over seeds with {bootstrap}. {ordered}",
        "solved_map": (
            f"Seeds that solved the task, of all ({n}); dark: all. Intervals: {LEVEL:.0%} Wilson, in table 1. {ordered}"
        ),
        "solved": f"Share of seeds that solved the task, with {LEVEL:.0%} Wilson interval ({n}).",
        "learning_curves": (
            f"Thick: median over seeds; thin: one seed each ({n}); dotted grey: chance. "
            "Accuracy on validation sequences. A seed ends when it has solved the task."
        ),
        "steps_to_solve": (
            "Share of seeds that have solved the task by a step (Kaplan-Meier estimate, unsolved seeds censored "
            f"at the end of training; {n}; no interval). p: log-rank test against DPA, adjusted over the "
            "family of comparisons (Holm)."
        ),
        "splits": (
            f"Mean over seeds, bars from the lowest to the highest seed ({n}; no interval); grey: what the best "
            "possible predictor reaches. All positions with a target count, not only those whose answer is certain."
        ),
        "attention_maps": (
            "Attention weights of trained models: rows are queries, columns keys, each row sums to 1; mean over "
            "heads and test examples. Of each mechanism, the seed with the lowest and the one with the highest "
            "accuracy (n\u00a0=\u00a01 each; no interval)."
        ),
    }
    if compared:
        pairs = f"n\u00a0=\u00a0{_range([len(comparison.differences) for comparison in compared])} per condition"
        names = candidate_names(results)
        found["margin_map"] = (
            f"Mean accuracy of {names} minus that of DPA over pairs of seeds ({pairs}). Blue: {names} better; "
            f"orange: DPA better. Star: p < {SIGNIFICANCE:g} in the sign-flip test of the paired differences, adjusted "
            f"over the family of comparisons (Holm), and {SMALLEST_EFFECT:g} or more. {ordered}"
        )
        found["difference"] = (
            f"Small marks: accuracy of {names} minus that of DPA for one seed, from the same "
            f"initial parameters and batches ({pairs}). Large marks: mean over pairs with {bootstrap}."
        )
    return found


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


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"
