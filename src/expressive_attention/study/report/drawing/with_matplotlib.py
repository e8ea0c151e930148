"""Draws a description with matplotlib, for files and paper."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from .description import Axis, Cells, Curves, Drawing, Group, Note, Panel, Points, Reference, Rule
from .theme import EMPTY, GRID, INK, MUTED, PREDICTORS, readable_on, wrap

__all__ = ["image", "png"]


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
_SLOT = 0.75  # of each position along x
_LINE = 0.14  # of a line of text
_AROUND = 1.2  # of a key of one row, note and labels of the lowest axis
_KEY_ROW = 0.18  # of each further row of the key


def image(drawing: Drawing) -> Figure:
    """The figure, under this module's settings of matplotlib, whatever the caller's are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        return _stacked(drawing) if drawing.stacked else _beside_each_other(drawing)


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file, of 256 colors: a third of the size, for eyes the same."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="rgba")
    width, height = figure.canvas.get_width_height(physical=True)
    picture = Image.frombytes("RGBA", (width, height), buffer.getvalue()).convert("RGB")
    picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, format="png")
    return small.getvalue()


def _stacked(drawing: Drawing) -> Figure:
    panels = drawing.panels
    ticks = max((len(lines) for lines in panels[-1].x.ticks or ()), default=0)
    titles = sum(bool(panel.title) for panel in panels)
    height = _AROUND + sum(panel.height for panel in panels) + _LINE * (ticks + 1.5 * titles)
    figure = Figure(figsize=(max(_WIDTH, 1.5 + _SLOT * drawing.slots), height), layout="constrained")
    ratios = [panel.height for panel in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel, [panel.title] if panel.title else [], is_lowest=panel is panels[-1])
    return _finished(figure, drawing)


def _beside_each_other(drawing: Drawing) -> Figure:
    columns = min(drawing.columns, max(len(group.panels) for group in drawing.groups))
    rows = [row for group in drawing.groups for row in _rows(group, columns)]
    height = _AROUND + sum(max(_height(panel, columns) + _LINE * len(title) for title, panel in row) for row in rows)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        for ax, (title, panel) in zip(axes, row, strict=False):
            _draw(ax, panel, title)
            if ax is not axes[0] and not panel.square:
                ax.set_ylabel("")
        for unused in axes[len(row) :]:
            unused.remove()
    return _finished(figure, drawing)


def _height(panel: Panel, columns: int) -> float:
    """A square panel is no higher than wide, its labels included."""
    return min(panel.height, _WIDTH / columns - 0.3) if panel.square else panel.height


def _rows(group: Group, columns: int) -> list[list[tuple[list[str], Panel]]]:
    """Rows of panels with the lines of their titles."""
    width = 96 // columns
    titled = [([*_broken(group.title, width), *_broken(panel.title, width)], panel) for panel in group.panels]
    return [titled[start : start + columns] for start in range(0, len(titled), columns)]


def _broken(title: str, width: int) -> list[str]:
    return [line for part in title.split("\n") if part for line in (wrap(part, width) if len(part) > width else [part])]


def _draw(ax: Axes, panel: Panel, title: Sequence[str], *, is_lowest: bool = True) -> None:
    ax.set_title("\n".join(title), fontsize=6.5 if panel.square else None)
    for part in panel.parts:
        _DRAW[type(part)](ax, part)
    has_cells = any(isinstance(part, Cells) for part in panel.parts)
    if has_cells:
        ax.set_aspect("equal" if panel.square else "auto")
    ax.grid(visible=not has_cells and panel.x.ticks is None, axis="x")
    ax.grid(visible=not has_cells and panel.y.ticks is None, axis="y")
    if panel.x.limits is not None:
        ax.set_xlim(panel.x.limits)
    if panel.y.limits is not None:
        ax.set_ylim(panel.y.limits)
    ax.set_ylabel(panel.y.label)
    _name_ticks(ax.set_yticks, panel.y)
    if is_lowest:
        ax.set_xlabel(panel.x.label)
        _name_ticks(ax.set_xticks, panel.x, fontsize=6.5 if has_cells else None)


def _name_ticks(set_ticks: Callable[..., Any], axis: Axis, **options: Any) -> None:
    if axis.ticks is not None:
        set_ticks(range(len(axis.ticks)), ["\n".join(lines) for lines in axis.ticks], **options)


def _points(ax: Axes, part: Points) -> None:
    style = part.style
    small = part.size < 3
    if part.joined:
        ax.plot(part.x, part.y, style.line, color=style.color, linewidth=1)
    for x, y, low, high in zip(part.x, part.y, part.low, part.high, strict=False):
        if low is not None and high is not None:
            ends = ([low, high], [y, y]) if part.along == "x" else ([x, x], [low, high])
            ax.plot(*ends, "-", color=style.color, linewidth=1.6, solid_capstyle="butt", zorder=2.5)
    ax.plot(
        part.x, part.y, style.marker, color=style.color, markerfacecolor=style.fill, markersize=part.size,
        alpha=0.6 if small else None, zorder=2 if small else 3,
    )  # fmt: skip


def _reference(ax: Axes, part: Reference) -> None:
    ax.plot(part.x, part.y, part.marker, color=MUTED, markersize=part.size)


def _curves(ax: Axes, part: Curves) -> None:
    for x, y in part.lines:
        ax.plot(
            x, y, part.style.line, color=part.style.color, linewidth=part.width, alpha=part.opacity,
            drawstyle="steps-post" if part.stepped else "default",
        )  # fmt: skip


def _rule(ax: Axes, part: Rule) -> None:
    draw = ax.axvline if part.across == "x" else ax.axhline
    draw(part.at, color=part.color, linewidth=part.width, linestyle=":" if part.dotted else "-")


def _note(ax: Axes, part: Note) -> None:
    if part.place == "beside":
        ax.annotate(part.text, (1, part.y), (5, 0), ("axes fraction", "data"), "offset points", va="center")
    elif part.place == "inside":
        size = 8 if part.text.count("\n") == 0 else 5.5
        ax.text(0.02, 0.96, part.text, transform=ax.transAxes, va="top", color=INK, fontsize=size)
    else:
        ax.set_title(part.text, loc="right" if "right" in part.place else "left", color=MUTED, fontsize="medium")


def _cells(ax: Axes, part: Cells) -> None:
    colors = LinearSegmentedColormap.from_list("", list(part.colors))
    low, high = part.limits
    values = np.asarray(part.values, dtype=float)
    ax.set_facecolor(EMPTY)
    ax.imshow(values, cmap=colors, vmin=low, vmax=high)
    for row, texts in enumerate(part.texts):
        for column, text in enumerate(texts):
            if text:
                ink = readable_on(to_hex(colors(float((values[row, column] - low) / (high - low)))))
                ax.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)


_DRAW: dict[type, Callable[[Axes, Any], None]] = {
    Points: _points,
    Reference: _reference,
    Curves: _curves,
    Rule: _rule,
    Note: _note,
    Cells: _cells,
}


def _finished(figure: Figure, drawing: Drawing) -> Figure:
    """The figure with its key and its note."""
    handles = [
        Line2D(
            [], [], color=style.color, linestyle=style.line, marker=style.marker if drawing.marks else "none",
            markerfacecolor=style.fill, label=name,
        )
        for style, name in drawing.key
    ]  # fmt: skip
    for fact in drawing.references:
        name, marker, _, _ = PREDICTORS[fact]
        handles.append(Line2D([], [], color=MUTED, marker=marker, markersize=8, linestyle="none", label=name))
    if handles:
        _add_key(figure, handles)
    characters = int(figure.get_figwidth() * 16.5)
    figure.supxlabel(textwrap.fill(drawing.note, characters), x=0.01, ha="left", fontsize=7.5, color=MUTED)
    return figure


def _add_key(figure: Figure, handles: Sequence[Line2D]) -> None:
    """The key above the axes, in as few rows as the width has room for."""
    for rows in range(1, len(handles) + 1):
        columns = math.ceil(len(handles) / rows)
        key = figure.legend(
            handles=handles, loc="outside upper left", ncols=columns, handlelength=2.8, columnspacing=1.2
        )
        if columns == 1 or key.get_window_extent().width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + (rows - 1) * _KEY_ROW)
            return
        key.remove()
