"""Figures of a study as image files, and what they share with the report's interactive ones."""

from __future__ import annotations

import functools
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .files import write_atomically
from .results import Condition, StudyResults
from .statistics import (
    LEVEL,
    MINIMUM_FOR_INTERVAL,
    Summary,
    comparisons,
    evidence,
    mechanism_name,
    median_curve,
    solve_curve,
    summaries,
)

__all__ = [
    "PREDICTORS",
    "Ladder",
    "Panel",
    "Style",
    "accuracy_figure",
    "accuracy_note",
    "candidate_names",
    "difference_figure",
    "difference_note",
    "difference_reach",
    "dodge",
    "finished_conditions",
    "ladder",
    "learning_figure",
    "learning_note",
    "png",
    "save_figures",
    "solved_figure",
    "solved_note",
    "spread",
    "steps_figure",
    "steps_note",
    "steps_reach",
    "styles",
    "wrap",
]

INK = "#222222"
MUTED = "#666666"
GRID = "#dddddd"

# Trivial predictors in `Condition.facts`: name for people, marker in image files, symbol in the report, and
# shift in the column, since their accuracies nearly coincide.
PREDICTORS = {
    "chance": ("chance", "_", "line-ew-open", 0.0),
    "majority": ("majority digit", "x", "x-thin-open", -0.05),
    "copy_last": ("copy last digit", "+", "cross-thin-open", 0.05),
}

_SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.dpi": 200,
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
_WIDTH = 7.0  # inches: the text width of a page
_RANGE = (-0.03, 1.03)  # a share, with room for markers at both ends


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


def spread(count: int, width: float) -> list[float]:
    """Positions of `count` seeds around 0, so that equal values do not hide each other."""
    return [0.0] if count == 1 else np.linspace(-width / 2, width / 2, count).tolist()


def wrap(label: str, width: int = 20) -> list[str]:
    """Lines of about `width` characters, broken after commas only: ``"basis 16"`` stays on one line."""
    unbroken = re.sub("(?<!,) ", "\u00a0", label)
    return textwrap.wrap(unbroken, width, break_long_words=False, break_on_hyphens=False)


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
            (*(names or [condition.label]), f"{round(condition.facts['complexity'], 1):g} bits")
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


def candidate_names(results: StudyResults) -> str:
    """Names of the mechanisms that are compared with DPA."""
    names = dict.fromkeys(mechanism_name(found.candidate.mechanism) for found in comparisons(results))
    return " or ".join(names)


def accuracy_note(results: StudyResults) -> str:
    """What the marks of the accuracy figure stand for."""
    return (
        f"Small marks: one seed each ({_seed_counts(results)}). Large marks: mean over seeds with "
        f"{_bootstrap_kind()}. Tasks are ordered by the size of their state space in bits, equally spaced."
    )


def solved_note(results: StudyResults) -> str:
    """What the marks of the figure of solved seeds stand for."""
    return f"Share of seeds that solved the task, with {LEVEL:.0%} Wilson interval ({_seed_counts(results)})."


def difference_note(results: StudyResults) -> str:
    """What the marks of the figure of paired differences stand for."""
    counts = _range([len(comparison.differences) for comparison in comparisons(results)])
    return (
        f"Small marks: accuracy of {candidate_names(results)} minus that of DPA for one seed, from the same "
        f"initial parameters and batches (n\u00a0=\u00a0{counts} per condition). "
        f"Large marks: mean over pairs with {_bootstrap_kind()}."
    )


def learning_note(results: StudyResults) -> str:
    """What the lines of the learning curves stand for."""
    return (
        f"Thick: median over seeds; thin: one seed each ({_seed_counts(results)}); dotted grey: chance. "
        "Accuracy on validation sequences. A seed ends when it has solved the task."
    )


def steps_note(results: StudyResults) -> str:
    """What the lines of the figure of steps to solve stand for."""
    return (
        "Share of seeds that have solved the task by a step (Kaplan-Meier estimate, unsolved seeds censored "
        f"at the end of training; {_seed_counts(results)}; no interval)."
    )


_Draw = TypeVar("_Draw", bound=Callable[..., Figure])


def _styled(draw: _Draw) -> _Draw:
    """Runs `draw` under this module's matplotlib settings, whatever the caller's are."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(_SETTINGS)
            return draw(*args, **kwargs)

    return styled  # pyright: ignore[reportReturnType]


@_styled
def accuracy_figure(results: StudyResults) -> Figure:
    """Accuracy against complexity: one panel per model, one column per task."""
    layout = ladder(results)
    width = max(_WIDTH, 1.5 + 0.75 * len(layout.tasks))
    figure = Figure(figsize=(width, 1.5 + 2.1 * len(layout.panels)), layout="constrained")
    axes = figure.subplots(len(layout.panels), 1, sharex=True, squeeze=False)[:, 0]
    found = {(summary.condition, summary.mechanism): summary for summary in summaries(results)}
    for ax, panel in zip(axes, layout.panels, strict=True):
        ax.set(title=panel.title, ylim=_RANGE, ylabel="held-out accuracy")
        ax.grid(visible=False, axis="x")
        for boundary in range(1, len(layout.tasks)):
            ax.axvline(boundary - 0.5, color=GRID, linewidth=0.6)
        for column, condition in panel.conditions:
            _draw_predictors(ax, column, condition)
        for mechanism, style in styles(results.mechanisms).items():
            columns = [(at, found.get((condition.label, mechanism))) for at, condition in panel.conditions]
            present = [(at, summary) for at, summary in columns if summary]
            _draw_accuracy(ax, results, present, style, dodge(results.mechanisms)[mechanism])
    axes[-1].set_xticks(range(len(layout.tasks)), ["\n".join(lines) for lines in layout.tasks])
    axes[-1].set(xlim=(-0.5, len(layout.tasks) - 0.5), xlabel="task, state space in bits")
    predictors = [
        Line2D([], [], color=MUTED, marker=marker, linestyle="none", label=name)
        for name, marker, _, _ in PREDICTORS.values()
    ]
    return _finish(figure, accuracy_note(results), results, predictors)


@_styled
def solved_figure(results: StudyResults) -> Figure:
    """Share of seeds solved on each condition."""
    conditions = finished_conditions(results)
    figure, ax = _rows([condition.label for condition in conditions])
    row = {condition.label: index for index, condition in enumerate(conditions)}
    drawn, shift = styles(results.mechanisms), dodge(results.mechanisms)
    for summary in summaries(results):
        share, at = summary.solved / summary.seeds, row[summary.condition] + shift[summary.mechanism]
        interval = summary.solved_interval
        _draw_interval(ax, [interval.low, interval.high], [at, at], drawn[summary.mechanism])
        _draw_mean(ax, share, at, drawn[summary.mechanism])
        ax.text(1.05, at, f"{summary.solved}/{summary.seeds}", va="center", clip_on=False)
    ax.set(xlim=_RANGE, xlabel="share of seeds solved")
    return _finish(figure, solved_note(results), results)


@_styled
def difference_figure(results: StudyResults) -> Figure:
    """Paired difference in accuracy on each condition.

    Raises:
        ValueError: If there is nothing to compare.
    """
    compared = comparisons(results)
    if not compared:
        raise ValueError("no condition has finished seeds of two mechanisms")
    labels = list(dict.fromkeys(comparison.condition for comparison in compared))
    candidates = list(dict.fromkeys(comparison.candidate.mechanism for comparison in compared))
    figure, ax = _rows(labels)
    drawn, shift = styles(results.mechanisms), dodge(candidates)
    ax.axvline(0, color=INK, linewidth=0.8)
    for comparison in compared:
        mechanism = comparison.candidate.mechanism
        style, at = drawn[mechanism], labels.index(comparison.condition) + shift[mechanism]
        seeds_at = [at + 0.24 + offset for offset in spread(len(comparison.differences), 0.14)]
        _draw_seeds(ax, comparison.differences, seeds_at, style)
        if comparison.interval:
            _draw_interval(ax, [comparison.interval.low, comparison.interval.high], [at, at], style)
        _draw_mean(ax, comparison.difference, at, style)
    reach = difference_reach(results)
    names = candidate_names(results)
    ax.set(xlim=(-reach, reach), xlabel=f"accuracy of {names} - accuracy of DPA")
    ax.set_title("DPA better", loc="left", color=MUTED, fontsize="medium")
    ax.set_title(f"{names} better", loc="right", color=MUTED, fontsize="medium")
    key = {mechanism: f"{mechanism_name(mechanism)} - DPA" for mechanism in candidates}
    return _finish(figure, difference_note(results), results, key=key)


@_styled
def learning_figure(results: StudyResults, conditions: Sequence[Condition]) -> Figure:
    """Learning curves, one panel per condition."""
    figure, axes = _grid(results, conditions, "accuracy")
    for ax, condition in zip(axes, conditions, strict=True):
        ax.axhline(condition.facts["chance"], color=MUTED, linestyle=":", linewidth=1)
        for mechanism, style in styles(results.mechanisms).items():
            curves = evidence(results.curves, condition.label, mechanism)
            if curves.is_empty():
                continue
            for rows in curves.partition_by("seed"):
                rows = rows.sort("step")
                ax.plot(rows["step"], rows["accuracy"], style.line, color=style.color, lw=0.5, alpha=0.5)
            median = median_curve(curves)
            ax.plot(median["step"], median["accuracy"], style.line, color=style.color, lw=2)
    return _finish(figure, learning_note(results), results, markers=False)


@_styled
def steps_figure(results: StudyResults, conditions: Sequence[Condition]) -> Figure:
    """Share of seeds solved against training steps, one panel per condition."""
    figure, axes = _grid(results, conditions, "share of seeds solved")
    for ax, condition in zip(axes, conditions, strict=True):
        for mechanism, style in styles(results.mechanisms).items():
            rows = evidence(results.seeds, condition.label, mechanism)
            if not rows.is_empty():
                at, share = solve_curve(rows["steps_to_solve"].to_list(), int(rows["steps"].to_numpy().max()))
                ax.step(at, share, style.line, where="post", color=style.color, linewidth=2)
    return _finish(figure, steps_note(results), results, markers=False)


def difference_reach(results: StudyResults) -> float:
    """Largest distance from 0 that the figure of paired differences shows."""
    largest = max(abs(value) for comparison in comparisons(results) for value in comparison.differences)
    return min(1.05, max(0.05, 1.1 * largest))


def steps_reach(results: StudyResults) -> float:
    """Training steps that figures against steps show: the same in each, so that they can be compared."""
    return 1.04 * float(results.seeds.filter(pl.col("role") == "final")["steps"].to_numpy().max())


def save_figures(results: StudyResults, directory: Path) -> dict[str, Path]:
    """Writes every figure that the results allow as a PNG file.

    Args:
        results: The study; without final seeds nothing is written.
        directory: Where to write; created if missing.

    Returns:
        The files written, by the name of the figure.
    """
    conditions = finished_conditions(results)
    if not conditions:
        return {}
    figures = {
        "accuracy": accuracy_figure(results),
        "solved": solved_figure(results),
        "learning_curves": learning_figure(results, conditions),
        "steps_to_solve": steps_figure(results, conditions),
    }
    if comparisons(results):
        figures["difference"] = difference_figure(results)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        write_atomically(paths[name], png(figure))
    return paths


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _key(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, default=str)


def _distinguish(settings: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each of the settings, the fields that tell it from the others, as ``"basis 16"``."""
    keys = dict.fromkeys(key for fields in settings for key in fields)
    varying = [key for key in keys if len({_key({key: fields.get(key)}) for fields in settings}) > 1]
    return [[f"{key.replace('_', ' ')} {fields[key]}" for key in varying if key in fields] for fields in settings]


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _seed_counts(results: StudyResults) -> str:
    counts = _range([summary.seeds for summary in summaries(results)])
    return f"n\u00a0=\u00a0{counts} per condition and mechanism"


def _bootstrap_kind() -> str:
    return f"{LEVEL:.0%} bootstrap interval (none below {MINIMUM_FOR_INTERVAL} seeds or where all are equal)"


def _rows(labels: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with one labelled row per condition, from the top."""
    figure = Figure(figsize=(_WIDTH, 1.7 + 0.5 * len(labels)), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(labels)), ["\n".join(wrap(label)) for label in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    for boundary in range(1, len(labels)):
        ax.axhline(boundary - 0.5, color=GRID, linewidth=0.6)
    return figure, ax


def _grid(results: StudyResults, conditions: Sequence[Condition], ylabel: str) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per condition, two beside each other."""
    columns = min(2, len(conditions))
    rows = math.ceil(len(conditions) / columns)
    figure = Figure(figsize=(_WIDTH, 1.2 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid[:, 0]:
        ax.set_ylabel(ylabel)
    axes = list(grid.flat)
    for unused in axes[len(conditions) :]:
        unused.remove()
    axes = axes[: len(conditions)]
    for ax, condition in zip(axes, conditions, strict=True):
        ax.set_title("\n".join(wrap(condition.label, 44)))
        ax.set(xlim=(0, steps_reach(results)), ylim=_RANGE, xlabel="training steps")
    return figure, axes


def _draw_predictors(ax: Axes, column: int, condition: Condition) -> None:
    for fact, (_, marker, _, shift) in PREDICTORS.items():
        size = 40 if fact == "chance" else 6
        if fact in condition.facts:
            ax.plot(column + shift, condition.facts[fact], marker=marker, markersize=size, color=MUTED)


def _draw_accuracy(
    ax: Axes, results: StudyResults, present: Sequence[tuple[int, Summary]], style: Style, shift: float
) -> None:
    """One mechanism's means, joined, with intervals and seeds; the seeds stand left of the mean."""
    at = [column + shift + 0.06 for column, _ in present]
    ax.plot(at, [summary.accuracy for _, summary in present], style.line, color=style.color, linewidth=1)
    for x, (column, summary) in zip(at, present, strict=True):
        seeds = evidence(results.seeds, summary.condition, summary.mechanism)["accuracy"].to_list()
        seeds_at = [column + shift - 0.06 + offset for offset in spread(len(seeds), 0.1)]
        _draw_seeds(ax, seeds_at, seeds, style)
        if interval := summary.accuracy_interval:
            _draw_interval(ax, [x, x], [interval.low, interval.high], style)
        _draw_mean(ax, x, summary.accuracy, style)


def _draw_mean(ax: Axes, x: float, y: float, style: Style) -> None:
    ax.plot(x, y, style.marker, color=style.color, markerfacecolor=style.fill, markersize=6, zorder=3)


def _draw_seeds(ax: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    ax.plot(x, y, style.marker, color=style.color, markerfacecolor=style.fill, markersize=2.5, alpha=0.6)


def _draw_interval(ax: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    ax.plot(x, y, "-", color=style.color, linewidth=1.6, solid_capstyle="butt", zorder=2.5)


def _finish(
    figure: Figure,
    note: str,
    results: StudyResults,
    extra: Sequence[Line2D] = (),
    key: dict[str, str] | None = None,
    markers: bool = True,
) -> Figure:
    """Adds the key (by default the names of all mechanisms) and the note on what is shown."""
    key = key or {mechanism: mechanism_name(mechanism) for mechanism in results.mechanisms}
    handles = [
        Line2D(
            [],
            [],
            color=style.color,
            linestyle=style.line,
            marker=style.marker if markers else "none",
            markerfacecolor=style.fill,
            label=key[mechanism],
        )
        for mechanism, style in styles(results.mechanisms).items()
        if mechanism in key
    ]
    figure.legend(
        handles=[*handles, *extra],
        loc="outside upper left",
        ncols=len(handles) + len(extra),
        handlelength=2.8,
        columnspacing=1.2,
    )
    characters = int(figure.get_figwidth() * 16.5)
    figure.supxlabel(textwrap.fill(note, characters), x=0.01, ha="left", fontsize=7.5, color=MUTED)
    return figure
