"""The figures in matplotlib, for files and paper."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...analysis.comparisons import comparisons
from ...analysis.summaries import evidence, median_curve, summaries
from ...analysis.survival import solve_curve
from ...analysis.wording import mechanism_name
from ...config.condition import Condition
from ...runs.results import StudyResults
from ..attention import AttentionMap
from .layout import finished_conditions, ladder, splits_of
from .maps import Map, margin_maps, solved_maps
from .matplotlib_parts import (
    RANGE,
    WIDTH,
    annotated,
    draw_accuracy,
    draw_interval,
    draw_mean,
    draw_predictors,
    draw_seeds,
    draw_split,
    finished,
    grid_of_conditions,
    rows_of_conditions,
    styled_figure,
)
from .notes import candidate_names, notes, steps_tests
from .tables import split_table
from .theme import (
    AHEAD,
    BEHIND,
    EMPTY,
    GRID,
    INK,
    MUTED,
    PREDICTORS,
    SHARE,
    difference_reach,
    dodge,
    predictors_of,
    readable_on,
    spread,
    styles,
    wrap,
)

__all__ = [
    "accuracy_figure",
    "attention_figure",
    "difference_figure",
    "learning_figure",
    "margin_map_figure",
    "solved_figure",
    "solved_map_figure",
    "splits_figure",
    "steps_figure",
]


_SHARES = LinearSegmentedColormap.from_list("share", ["#ffffff", SHARE])
_MARGINS = LinearSegmentedColormap.from_list("margin", [BEHIND, "#ffffff", AHEAD])


@styled_figure
def accuracy_figure(results: StudyResults) -> Figure:
    """Accuracy against complexity: one panel per model, one column per task."""
    layout = ladder(results)
    width = max(WIDTH, 1.5 + 0.75 * len(layout.tasks))
    figure = Figure(figsize=(width, 1.5 + 2.1 * len(layout.panels)), layout="constrained")
    axes = figure.subplots(len(layout.panels), 1, sharex=True, squeeze=False)[:, 0]
    found = {(summary.condition, summary.mechanism): summary for summary in summaries(results)}
    for ax, panel in zip(axes, layout.panels, strict=True):
        ax.set(title=panel.title, ylim=RANGE, ylabel="held-out accuracy")
        ax.grid(visible=False, axis="x")
        for boundary in range(1, len(layout.tasks)):
            ax.axvline(boundary - 0.5, color=GRID, linewidth=0.6)
        for column, condition in panel.conditions:
            draw_predictors(ax, column, condition)
        for mechanism, style in styles(results.mechanisms).items():
            columns = [(at, found.get((condition.label, mechanism))) for at, condition in panel.conditions]
            present = [(at, summary) for at, summary in columns if summary]
            draw_accuracy(ax, results, present, style, dodge(results.mechanisms)[mechanism])
    axes[-1].set_xticks(range(len(layout.tasks)), ["\n".join(lines) for lines in layout.tasks])
    axes[-1].set(xlim=(-0.5, len(layout.tasks) - 0.5), xlabel="task, state space in bits")
    known = {fact for condition in results.conditions for fact in predictors_of(condition)}
    predictors = [
        Line2D([], [], color=MUTED, marker=marker, linestyle="none", label=name)
        for fact, (name, marker, _, _) in PREDICTORS.items()
        if fact in known
    ]
    return finished(figure, notes(results)["accuracy"], results, predictors)


@styled_figure
def solved_figure(results: StudyResults) -> Figure:
    """Share of seeds solved on each condition."""
    conditions = finished_conditions(results)
    figure, ax = rows_of_conditions([condition.label for condition in conditions])
    row = {condition.label: index for index, condition in enumerate(conditions)}
    drawn, shift = styles(results.mechanisms), dodge(results.mechanisms)
    for summary in summaries(results):
        share, at = summary.solved / summary.seeds, row[summary.condition] + shift[summary.mechanism]
        interval = summary.solved_interval
        draw_interval(ax, [interval.low, interval.high], [at, at], drawn[summary.mechanism])
        draw_mean(ax, share, at, drawn[summary.mechanism])
        ax.text(1.05, at, f"{summary.solved}/{summary.seeds}", va="center", clip_on=False)
    ax.set(xlim=RANGE, xlabel="share of seeds solved")
    return finished(figure, notes(results)["solved"], results)


@styled_figure
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
    figure, ax = rows_of_conditions(labels)
    drawn, shift = styles(results.mechanisms), dodge(candidates)
    ax.axvline(0, color=INK, linewidth=0.8)
    for comparison in compared:
        mechanism = comparison.candidate.mechanism
        style, at = drawn[mechanism], labels.index(comparison.condition) + shift[mechanism]
        seeds_at = [at + 0.24 + offset for offset in spread(len(comparison.differences), 0.14)]
        draw_seeds(ax, comparison.differences, seeds_at, style)
        if comparison.interval:
            draw_interval(ax, [comparison.interval.low, comparison.interval.high], [at, at], style)
        draw_mean(ax, comparison.difference, at, style)
    reach = difference_reach(results)
    names = candidate_names(results)
    ax.set(xlim=(-reach, reach), xlabel=f"accuracy of {names} - accuracy of DPA")
    ax.set_title("DPA better", loc="left", color=MUTED, fontsize="medium")
    ax.set_title(f"{names} better", loc="right", color=MUTED, fontsize="medium")
    key = {mechanism: f"{mechanism_name(mechanism)} - DPA" for mechanism in candidates}
    return finished(figure, notes(results)["difference"], results, key=key)


@styled_figure
def learning_figure(results: StudyResults, conditions: Sequence[Condition]) -> Figure:
    """Learning curves, one panel per condition."""
    figure, axes = grid_of_conditions(results, conditions, "accuracy")
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
    return finished(figure, notes(results)["learning_curves"], results, markers=False)


@styled_figure
def steps_figure(results: StudyResults, conditions: Sequence[Condition]) -> Figure:
    """Share of seeds solved against training steps, one panel per condition."""
    figure, axes = grid_of_conditions(results, conditions, "share of seeds solved")
    for ax, condition in zip(axes, conditions, strict=True):
        for mechanism, style in styles(results.mechanisms).items():
            rows = evidence(results.seeds, condition.label, mechanism)
            if not rows.is_empty():
                at, share = solve_curve(rows["steps_to_solve"].to_list(), int(rows["steps"].to_numpy().max()))
                ax.step(at, share, style.line, where="post", color=style.color, linewidth=2)
        size = 8 if len(results.mechanisms) == 2 else 5.5
        ax.text(0.02, 0.96, steps_tests(results, condition), transform=ax.transAxes, va="top", color=INK, fontsize=size)
    return finished(figure, notes(results)["steps_to_solve"], results, markers=False)


@styled_figure
def margin_map_figure(results: StudyResults) -> Figure:
    """Mean difference in accuracy by model and task, one map per mechanism that is compared with DPA.

    Raises:
        ValueError: If there is nothing to compare.
    """
    maps = margin_maps(results)
    if not maps:
        raise ValueError("no condition has finished seeds of two mechanisms")
    reach = max(0.05, *(abs(value) for found in maps for value in found.values.flat if value == value))
    return _maps_figure(maps, _MARGINS, (-reach, reach), notes(results)["margin_map"])


@styled_figure
def solved_map_figure(results: StudyResults) -> Figure:
    """Share of seeds solved by model and task, one map per mechanism."""
    return _maps_figure(solved_maps(results), _SHARES, (0.0, 1.0), notes(results)["solved_map"])


@styled_figure
def splits_figure(results: StudyResults, conditions: Sequence[Condition]) -> Figure:
    """Accuracy by group of test positions: one row per condition, one panel per split."""
    splits = splits_of(results)
    columns = max(len(splits[condition.label]) for condition in conditions)
    figure = Figure(figsize=(WIDTH, 1.3 + 2.3 * len(conditions)), layout="constrained")
    grid = figure.subplots(len(conditions), columns, squeeze=False, sharey=True)
    for axes, condition in zip(grid, conditions, strict=True):
        axes[0].set(ylabel="accuracy", ylim=RANGE)
        axes[0].set_title("\n".join(wrap(condition.label, 100 // columns)))
        rows = split_table(results).filter(pl.col("condition") == condition.label)
        for ax, split in zip(axes, splits[condition.label], strict=False):
            draw_split(ax, rows.filter(pl.col("split") == split), split, styles(results.mechanisms))
        for unused in axes[len(splits[condition.label]) :]:
            unused.remove()
    ceiling = Line2D([], [], color=MUTED, marker="_", markersize=10, linestyle="none", label="best possible")
    return finished(figure, notes(results)["splits"], results, [ceiling])


@styled_figure
def attention_figure(maps: Sequence[AttentionMap], note: str) -> Figure:
    """Mean attention weights: one panel per condition, mechanism, seed and layer, four beside each other."""
    columns = min(4, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, found in zip(axes, maps, strict=False):
        ax.imshow(found.weights.numpy(), cmap=_SHARES, vmin=0.0, vmax=1.0)
        ax.grid(visible=False)
        ax.set_title("\n".join([*wrap(found.condition, 26), *found.title]), fontsize=6.5)
        ax.set(xlabel="key", ylabel="query")
    for unused in axes[len(maps) :]:
        unused.remove()
    return annotated(figure, note)


def _maps_figure(maps: Sequence[Map], colors: Colormap, limits: tuple[float, float], note: str) -> Figure:
    """Maps above each other, each cell with its text."""
    rows, columns = maps[0].values.shape
    lines = max(map(len, maps[0].columns))
    height = 1.2 + 0.13 * lines + len(maps) * (0.35 + 0.42 * rows)
    figure = Figure(figsize=(max(WIDTH, 1.5 + 0.62 * columns), height), layout="constrained")
    axes = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    for ax, found in zip(axes, maps, strict=True):
        ax.set_facecolor(EMPTY)
        ax.imshow(found.values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
        for row, column in np.argwhere(~np.isnan(found.values)):
            share = (found.values[row, column] - limits[0]) / (limits[1] - limits[0])
            ink = readable_on(to_hex(colors(float(share))))
            ax.text(column, row, found.texts[row][column], ha="center", va="center", fontsize=7, color=ink)
        ax.set_title(found.title)
        ax.grid(visible=False)
        ax.set_yticks(range(rows), ["\n".join(wrap(name, 18)) for name in found.rows])
        ax.set_xticks(range(columns), ["\n".join(task) for task in found.columns], fontsize=6.5)
    axes[-1].set_xlabel("task, state space in bits")
    return annotated(figure, note)
