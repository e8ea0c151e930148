"""Figures of a study as image files, each with its numbers beside it."""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from ..analysis.summaries import Summary, comparisons, evidence, mechanism_name, median_curve, solve_curve, summaries
from ..files import write_atomically
from ..runs.results import Condition, StudyResults
from .attention import AttentionMap
from .tables import FIGURE_DATA, attention_table, split_table
from .theme import (
    AHEAD,
    BEHIND,
    EMPTY,
    GRID,
    INK,
    MOST_PANELS,
    MUTED,
    PREDICTORS,
    SHARE,
    Map,
    Style,
    candidate_names,
    crowding,
    difference_reach,
    dodge,
    finished_conditions,
    ladder,
    margin_maps,
    most_different,
    narrowed,
    notes,
    predictors_of,
    readable_on,
    solved_maps,
    split_conditions,
    splits_of,
    spread,
    steps_reach,
    steps_tests,
    styles,
    wrap,
)

__all__ = [
    "accuracy_figure",
    "attention_figure",
    "difference_figure",
    "learning_figure",
    "margin_map_figure",
    "png",
    "save_figures",
    "solved_figure",
    "solved_map_figure",
    "splits_figure",
    "steps_figure",
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
_SHARES = LinearSegmentedColormap.from_list("share", ["#ffffff", SHARE])
_MARGINS = LinearSegmentedColormap.from_list("margin", [BEHIND, "#ffffff", AHEAD])
_WIDTH = 7.0  # inches: the text width of a page
_RANGE = (-0.03, 1.03)  # a share, with room for markers at both ends


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
    known = {fact for condition in results.conditions for fact in predictors_of(condition)}
    predictors = [
        Line2D([], [], color=MUTED, marker=marker, linestyle="none", label=name)
        for fact, (name, marker, _, _) in PREDICTORS.items()
        if fact in known
    ]
    return _finish(figure, notes(results)["accuracy"], results, predictors)


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
    return _finish(figure, notes(results)["solved"], results)


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
    return _finish(figure, notes(results)["difference"], results, key=key)


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
    return _finish(figure, notes(results)["learning_curves"], results, markers=False)


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
        size = 8 if len(results.mechanisms) == 2 else 5.5
        ax.text(0.02, 0.96, steps_tests(results, condition), transform=ax.transAxes, va="top", color=INK, fontsize=size)
    return _finish(figure, notes(results)["steps_to_solve"], results, markers=False)


@_styled
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


@_styled
def solved_map_figure(results: StudyResults) -> Figure:
    """Share of seeds solved by model and task, one map per mechanism."""
    return _maps_figure(solved_maps(results), _SHARES, (0.0, 1.0), notes(results)["solved_map"])


@_styled
def splits_figure(results: StudyResults, conditions: Sequence[Condition]) -> Figure:
    """Accuracy by group of test positions: one row per condition, one panel per split."""
    splits = splits_of(results)
    columns = max(len(splits[condition.label]) for condition in conditions)
    figure = Figure(figsize=(_WIDTH, 1.3 + 2.3 * len(conditions)), layout="constrained")
    grid = figure.subplots(len(conditions), columns, squeeze=False, sharey=True)
    for axes, condition in zip(grid, conditions, strict=True):
        axes[0].set(ylabel="accuracy", ylim=_RANGE)
        axes[0].set_title("\n".join(wrap(condition.label, 100 // columns)))
        rows = split_table(results).filter(pl.col("condition") == condition.label)
        for ax, split in zip(axes, splits[condition.label], strict=False):
            _draw_split(ax, rows.filter(pl.col("split") == split), split, styles(results.mechanisms))
        for unused in axes[len(splits[condition.label]) :]:
            unused.remove()
    ceiling = Line2D([], [], color=MUTED, marker="_", markersize=10, linestyle="none", label="best possible")
    return _finish(figure, notes(results)["splits"], results, [ceiling])


@_styled
def attention_figure(maps: Sequence[AttentionMap], note: str) -> Figure:
    """Mean attention weights: one panel per condition, mechanism, seed and layer, four beside each other."""
    columns = min(4, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure = Figure(figsize=(_WIDTH, 0.6 + 2.5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, found in zip(axes, maps, strict=False):
        ax.imshow(found.weights.numpy(), cmap=_SHARES, vmin=0.0, vmax=1.0)
        ax.grid(visible=False)
        ax.set_title("\n".join([*wrap(found.condition, 26), *found.title]), fontsize=6.5)
        ax.set(xlabel="key", ylabel="query")
    for unused in axes[len(maps) :]:
        unused.remove()
    return _annotated(figure, note)


def save_figures(results: StudyResults, directory: Path, maps: Sequence[AttentionMap] = ()) -> dict[str, Path]:
    """Writes every figure that the results allow as a PNG file, and its numbers beside it as CSV.

    A figure that cannot show all conditions shows those on which the mechanisms differ most; the numbers are of all.

    Args:
        results: The study; without final seeds nothing is written.
        directory: Where to write; created if missing.
        maps: Attention maps of some of its models.

    Returns:
        The image files written, by the name of the figure.
    """
    finished = finished_conditions(results)
    if not finished:
        return {}
    rows, panels = narrowed(results), most_different(results, MOST_PANELS)
    figures = {
        "accuracy": accuracy_figure(rows),
        "solved_map": solved_map_figure(results),
        "solved": solved_figure(rows),
        "learning_curves": learning_figure(results, panels),
        "steps_to_solve": steps_figure(results, panels),
    }
    if comparisons(results):
        figures["margin_map"] = margin_map_figure(results)
        figures["difference"] = difference_figure(rows)
    if split := split_conditions(results):
        figures["splits"] = splits_figure(results, split)
    tables = {name: FIGURE_DATA[name](results) for name in figures}
    if maps:
        figures["attention_maps"] = attention_figure(maps, notes(results)["attention_maps"])
        tables["attention_maps"] = attention_table(maps)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        write_atomically(paths[name], png(figure))
        write_atomically(paths[name].with_suffix(".csv"), tables[name].write_csv().encode())
    return paths


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file, of 256 colors: a third of the size, for eyes the same."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="rgba")
    width, height = figure.canvas.get_width_height(physical=True)
    image = Image.frombytes("RGBA", (width, height), buffer.getvalue()).convert("RGB")
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, format="png")
    return small.getvalue()


def _rows(labels: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with one labelled row per condition, from the top."""
    names = [wrap(label) for label in labels]
    height = max(0.5, 0.1 + 0.14 * max(map(len, names)))
    figure = Figure(figsize=(_WIDTH, 1.7 + height * len(labels)), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(labels)), ["\n".join(lines) for lines in names])
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
    for fact, value in predictors_of(condition).items():
        _, marker, _, shift = PREDICTORS[fact]
        size = 40 if fact == "chance" else 6
        ax.plot(column + shift, value, marker=marker, markersize=size, color=MUTED)


def _maps_figure(maps: Sequence[Map], colors: Colormap, limits: tuple[float, float], note: str) -> Figure:
    """Maps above each other, each cell with its text."""
    rows, columns = maps[0].values.shape
    lines = max(map(len, maps[0].columns))
    height = 1.2 + 0.13 * lines + len(maps) * (0.35 + 0.42 * rows)
    figure = Figure(figsize=(max(_WIDTH, 1.5 + 0.62 * columns), height), layout="constrained")
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
    return _annotated(figure, note)


def _draw_split(ax: Axes, rows: pl.DataFrame, split: str, drawn: dict[str, Style]) -> None:
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
            _draw_interval(ax, [x, x], [low, high], style)
            ax.plot(x, mean, style.marker, color=style.color, markerfacecolor=style.fill, markersize=4, zorder=3)
    names = groups["group"].cast(pl.String) if split == "position" else groups["name"]
    ax.set_xticks(range(len(names)), ["\n".join(textwrap.wrap(name, max(7, 28 // len(names)))) for name in names])
    ax.set(xlim=(-0.6, len(names) - 0.4), xlabel=f"by {split}")
    ax.grid(visible=False, axis="x")


def _draw_accuracy(
    ax: Axes, results: StudyResults, present: Sequence[tuple[int, Summary]], style: Style, shift: float
) -> None:
    """One mechanism's means, joined, with intervals and seeds; the seeds stand left of the mean."""
    closer = crowding(results.mechanisms)
    at = [column + shift + 0.06 * closer for column, _ in present]
    ax.plot(at, [summary.accuracy for _, summary in present], style.line, color=style.color, linewidth=1)
    for x, (column, summary) in zip(at, present, strict=True):
        seeds = evidence(results.seeds, summary.condition, summary.mechanism)["accuracy"].to_list()
        seeds_at = [column + shift - 0.06 * closer + offset for offset in spread(len(seeds), 0.1 * closer)]
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
    return _annotated(figure, note)


def _annotated(figure: Figure, note: str) -> Figure:
    characters = int(figure.get_figwidth() * 16.5)
    figure.supxlabel(textwrap.fill(note, characters), x=0.01, ha="left", fontsize=7.5, color=MUTED)
    return figure
