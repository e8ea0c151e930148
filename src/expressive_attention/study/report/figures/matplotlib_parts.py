"""Parts that the figures in matplotlib share."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib as mpl
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...analysis.summaries import Summary, evidence
from ...analysis.wording import mechanism_name
from ...config.condition import Condition
from ...runs.results import StudyResults
from .theme import (
    GRID,
    INK,
    MUTED,
    PREDICTORS,
    Style,
    crowding,
    dodge,
    predictors_of,
    spread,
    steps_reach,
    styles,
    wrap,
)

__all__ = [
    "RANGE",
    "WIDTH",
    "annotated",
    "draw_accuracy",
    "draw_interval",
    "draw_mean",
    "draw_predictors",
    "draw_seeds",
    "draw_split",
    "finished",
    "grid_of_conditions",
    "rows_of_conditions",
    "styled_figure",
]


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
WIDTH = 7.0  # inches: the text width of a page
RANGE = (-0.03, 1.03)  # a share, with room for markers at both ends


_Draw = TypeVar("_Draw", bound=Callable[..., Figure])


def styled_figure(draw: _Draw) -> _Draw:
    """Runs `draw` under this module's matplotlib settings, whatever the caller's are."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(_SETTINGS)
            return draw(*args, **kwargs)

    return styled  # pyright: ignore[reportReturnType]


def rows_of_conditions(labels: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with one labelled row per condition, from the top."""
    names = [wrap(label) for label in labels]
    height = max(0.5, 0.1 + 0.14 * max(map(len, names)))
    figure = Figure(figsize=(WIDTH, 1.7 + height * len(labels)), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(labels)), ["\n".join(lines) for lines in names])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    for boundary in range(1, len(labels)):
        ax.axhline(boundary - 0.5, color=GRID, linewidth=0.6)
    return figure, ax


def grid_of_conditions(
    results: StudyResults, conditions: Sequence[Condition], ylabel: str
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per condition, two beside each other."""
    columns = min(2, len(conditions))
    rows = math.ceil(len(conditions) / columns)
    figure = Figure(figsize=(WIDTH, 1.2 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid[:, 0]:
        ax.set_ylabel(ylabel)
    axes = list(grid.flat)
    for unused in axes[len(conditions) :]:
        unused.remove()
    axes = axes[: len(conditions)]
    for ax, condition in zip(axes, conditions, strict=True):
        ax.set_title("\n".join(wrap(condition.label, 44)))
        ax.set(xlim=(0, steps_reach(results)), ylim=RANGE, xlabel="training steps")
    return figure, axes


def draw_predictors(ax: Axes, column: int, condition: Condition) -> None:
    """Accuracies of simple predictors on a condition."""
    for fact, value in predictors_of(condition).items():
        _, marker, _, shift = PREDICTORS[fact]
        size = 40 if fact == "chance" else 6
        ax.plot(column + shift, value, marker=marker, markersize=size, color=MUTED)


def draw_split(ax: Axes, rows: pl.DataFrame, split: str, drawn: dict[str, Style]) -> None:
    """Means of each mechanism by group, with bars from the lowest to the highest seed, and the best predictor."""
    groups = rows.unique("group").sort("group")
    place = {group: index for index, group in enumerate(groups["group"])}
    known = groups.drop_nulls("ceiling")
    ax.plot([place[g] for g in known["group"]], known["ceiling"], "_", color=MUTED, markersize=14)
    for mechanism, shift in dodge(list(drawn)).items():
        style, found = drawn[mechanism], rows.filter(pl.col("mechanism") == mechanism).sort("group")
        at = [place[group] + 0.6 * shift for group in found["group"]]
        if split == "position":
            ax.plot(at, found["accuracy"], style.line, color=style.color, linewidth=1)
        for x, mean, low, high in zip(at, found["accuracy"], found["lowest"], found["highest"], strict=True):
            draw_interval(ax, [x, x], [low, high], style)
            ax.plot(x, mean, style.marker, color=style.color, markerfacecolor=style.fill, markersize=4, zorder=3)
    names = groups["group"].cast(pl.String) if split == "position" else groups["name"]
    ax.set_xticks(range(len(names)), ["\n".join(textwrap.wrap(name, max(7, 28 // len(names)))) for name in names])
    ax.set(xlim=(-0.6, len(names) - 0.4), xlabel=f"by {split}")
    ax.grid(visible=False, axis="x")


def draw_accuracy(
    ax: Axes, results: StudyResults, present: Sequence[tuple[int, Summary]], style: Style, shift: float
) -> None:
    """One mechanism's means, joined, with intervals and seeds; the seeds stand left of the mean."""
    closer = crowding(results.mechanisms)
    at = [column + shift + 0.06 * closer for column, _ in present]
    ax.plot(at, [summary.accuracy for _, summary in present], style.line, color=style.color, linewidth=1)
    for x, (column, summary) in zip(at, present, strict=True):
        seeds = evidence(results.seeds, summary.condition, summary.mechanism)["accuracy"].to_list()
        seeds_at = [column + shift - 0.06 * closer + offset for offset in spread(len(seeds), 0.1 * closer)]
        draw_seeds(ax, seeds_at, seeds, style)
        if interval := summary.accuracy_interval:
            draw_interval(ax, [x, x], [interval.low, interval.high], style)
        draw_mean(ax, x, summary.accuracy, style)


def draw_mean(ax: Axes, x: float, y: float, style: Style) -> None:
    """The mean of a mechanism."""
    ax.plot(x, y, style.marker, color=style.color, markerfacecolor=style.fill, markersize=6, zorder=3)


def draw_seeds(ax: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    """The seeds of a mechanism."""
    ax.plot(x, y, style.marker, color=style.color, markerfacecolor=style.fill, markersize=2.5, alpha=0.6)


def draw_interval(ax: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    """The interval of a mean."""
    ax.plot(x, y, "-", color=style.color, linewidth=1.6, solid_capstyle="butt", zorder=2.5)


def finished(
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
    return annotated(figure, note)


def annotated(figure: Figure, note: str) -> Figure:
    """The figure with its note."""
    characters = int(figure.get_figwidth() * 16.5)
    figure.supxlabel(textwrap.fill(note, characters), x=0.01, ha="left", fontsize=7.5, color=MUTED)
    return figure
