"""Pictures of attention space. Each function draws on ``ax=`` and returns it, or returns a figure of several axes.

Colours are those of Okabe and Ito, which colour-blind readers can distinguish; line styles and marks repeat their
meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import measures
from .record import ANGLES, MEASURES, SIZES, LayerRecord, Record

__all__ = [
    "angle_and_size",
    "angles",
    "angles_by_step",
    "attention_map",
    "compare",
    "heads",
    "key_plane",
    "landscape",
    "similarity",
]

NAMES = {"expressive": "EA, z²/(1 + z²)", "squared": "z²", "softmax": "DPA, exp z"}
_COLORS = {"expressive": "#0072B2", "squared": "#009E73", "softmax": "#D55E00"}
_LINES = {"expressive": "-", "squared": "-.", "softmax": "--"}

# Blue: antiparallel; white: zero; orange: parallel. At equal size blue is darker, also in greyscale.
SIGNED = LinearSegmentedColormap.from_list(
    "signed",
    list(
        zip(
            (0, 0.15, 0.35, 0.5, 0.65, 0.85, 1),
            ("#00182b", "#004d80", "#3f9bd6", "#ffffff", "#ffe3a3", "#f5b32c", "#d98200"),
            strict=True,
        )
    ),
)


def landscape(size: float = 4.0, *, ax: Axes | None = None) -> Axes:
    """Plot the weight of a key by its angle to the query for EA and DPA, as a share of the largest weight.

    Args:
        size: scale |q| |k|, the largest score.
        ax: Axes to draw on; default: a new figure.
    """
    ax = _axes(ax, 5.0, 3.4)
    angle = torch.linspace(0, torch.pi, 721, dtype=torch.float64)
    for form in ("expressive", "softmax"):
        w = measures.weight(size * angle.cos(), form)
        ax.plot(angle.rad2deg().numpy(), (w / w.max()).numpy(), _LINES[form], color=_COLORS[form], label=NAMES[form])
    ax.set(
        xlabel="angle of query and key, degrees", ylabel="weight, relative", xticks=range(0, 181, 45), ylim=(0, 1.05)
    )
    ax.set_title(f"scale |q| |k| = {size:g}", fontsize="medium")
    ax.legend(frameon=False)
    return ax


def key_plane(form: str, query: float = 1.5, extent: float = 4.0, *, ax: Axes | None = None) -> Axes:
    """Plot the weight of a key anywhere in a plane, for a query along its first axis, as a share of the largest.

    Args:
        form: One of `measures.FORMS`.
        query: Length of the query, times the scale.
        extent: Extent of the plane to each side.
        ax: Axes to draw on; default: a new figure.

    Raises:
        ValueError: `form` is not one of these.
    """
    ax = _axes(ax, 4.0, 4.0)
    along = torch.linspace(-extent, extent, 201, dtype=torch.float64)
    w = measures.weight(query * along, form).expand(201, 201)  # the direction across has no effect
    ax.imshow(
        (w / w.max()).numpy(), cmap="cividis", origin="lower", extent=(-extent, extent, -extent, extent), vmin=0, vmax=1
    )
    ax.annotate("", (query, 0), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "white", "lw": 2})
    ax.annotate("q", (query, 0.15), color="white")
    ax.set(xlabel="key, along the query", ylabel="key, across", title=NAMES[form])
    return ax


def angles(layer: LayerRecord, head: int, *, ax: Axes | None = None, legend: bool = True) -> Axes:
    """Plot how a head's pairs and its attention spread over the cos of their angle, against random directions.

    Args:
        layer: Layer of a record.
        head: Index of the head, from 0.
        ax: Axes to draw on; default: a new figure.
        legend: Whether to explain the three curves.

    Raises:
        ValueError: There is no such head.
    """
    _check_head(layer, head)
    ax = _axes(ax, 5.0, 3.4)
    width = (ANGLES[1] - ANGLES[0]).item()
    middle = ((ANGLES[:-1] + ANGLES[1:]) / 2).numpy()
    pairs, mass = (x[head].sum(-1).numpy() for x in (layer.pairs, layer.mass))
    ax.bar(middle, pairs / max(pairs.sum(), 1) / width, width, color="0.8", label="pairs")
    ax.step(middle, mass / max(mass.sum(), 1e-300) / width, where="mid", color=_COLORS[layer.form], label="attention")
    if layer.dim > 1:
        ax.plot(middle, np.array(layer.random_shares()) / width, "k:", label=f"random directions, E = {layer.dim}")
    ax.axvline(0, color="0.5", lw=0.6)
    ax.set(xlabel="cos of query and key", ylabel="density", xlim=(-1, 1), yticks=[])
    ax.set_title(layer.head_name(head), fontsize="medium")
    ax.set_ylim(0, ax.get_ylim()[1] * (1.4 if legend else 1.0))
    if legend:
        ax.legend(frameon=False, fontsize="small", loc="upper left")
    return ax


def angle_and_size(layer: LayerRecord, head: int, *, ax: Axes | None = None) -> Axes:
    """Plot the mean attention of a pair by its cos and by scale |q| |k|; bins without a pair are white.

    Args:
        layer: Layer of a record.
        head: Index of the head, from 0.
        ax: Axes to draw on; default: a new figure.

    Raises:
        ValueError: There is no such head.
    """
    _check_head(layer, head)
    ax = _axes(ax, 5.0, 3.4)
    pairs, mass = (x[head].numpy() for x in (layer.pairs, layer.mass))
    mean = np.where(pairs > 0, mass / np.maximum(pairs, 1), np.nan)
    image = ax.pcolormesh(ANGLES.numpy(), np.exp2(SIZES.numpy()), mean.T, cmap="cividis", vmin=0)
    used = np.exp2(SIZES.numpy()[:-1][pairs.sum(0) > 0])
    ax.set(xlabel="cos of query and key", ylabel="scale |q| |k|", yscale="log", ylim=(used.min(), used.max() * 2**0.5))
    ax.set_title(layer.head_name(head), fontsize="medium")
    ax.figure.colorbar(image, ax=ax, label="attention")
    return ax


def angles_by_step(records: Mapping[int, Record], layer: str, head: int) -> Figure:
    """Plot `angles` of one head at several steps of training, side by side.

    Args:
        records: Records of the same model, by step.
        layer: Name of the layer.
        head: Index of the head, from 0.

    Raises:
        ValueError: There is no record, layer or head.
    """
    if not records:
        raise ValueError("records must hold at least one record, got none")
    figure, axes = plt.subplots(
        1, len(records), figsize=(2.6 * len(records), 2.6), sharex=True, squeeze=False, layout="constrained"
    )
    for ax, (step, record) in zip(axes[0], sorted(records.items()), strict=True):
        angles(record.layer(layer), head, ax=ax, legend=step == min(records))
        share = record.layer(layer).measures()["antiparallel"][head]
        ax.set_title(f"step {step}\nantiparallel {share:.0%}", fontsize="medium")
    return figure


def attention_map(
    layer: LayerRecord,
    head: int,
    example: int = 0,
    *,
    ax: Axes | None = None,
    tokens: list[str] | None = None,
    relative: bool = False,
) -> Axes:
    """Plot the attention of a head on kept tokens, one row per query, with the sign of z in colour.

    Orange marks attention to a parallel key, z > 0. Blue, which is darker, marks attention to an antiparallel key, with
    a minus sign if there is room.

    Args:
        layer: Layer of a record.
        head: Index of the head, from 0.
        example: Index of the kept example, from 0.
        ax: Axes to draw on; default: a new figure.
        tokens: Names of the positions; positions beyond the list keep their numbers.
        relative: Whether to show shares of each query's largest attention, for heads that look at many keys.

    Raises:
        ValueError: There is no such head or example.
    """
    _check_head(layer, head)
    if not 0 <= example < len(layer.query):
        raise ValueError(f"example must be from 0 to {len(layer.query) - 1}, got {example}")
    ax = _axes(ax, 4.2, 4.0)
    a, z = layer.attention(example)[head], layer.scores(example)[head]
    if relative:
        a = a / a.amax(-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    signed = (a * z.sign()).numpy()
    image = ax.imshow(signed, cmap=SIGNED, vmin=-1, vmax=1, interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["1, z < 0", "0", "1, z > 0"], fontsize="small")
    if signed.size <= 1600:
        for i, j in zip(*np.nonzero(signed < -0.15), strict=True):
            ax.text(j, i, "\N{MINUS SIGN}", ha="center", va="center", color="white", fontsize="small")
    ax.set(xlabel="key", ylabel="query")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if tokens is not None:
        names = [*tokens, *map(str, range(len(tokens), max(signed.shape)))]
        ax.set_xticks(range(signed.shape[1]), names[: signed.shape[1]], rotation=90, fontsize="small")
        ax.set_yticks(range(signed.shape[0]), names[: signed.shape[0]], fontsize="small")
    ax.set_title(layer.head_name(head), fontsize="medium")
    return ax


def heads(record: Record, measure: str, *, ax: Axes | None = None) -> Axes:
    """Plot a measure of every head, one row per layer.

    Args:
        record: A record of `capture`.
        measure: One of `MEASURES`.
        ax: Axes to draw on; default: a new figure.

    Raises:
        ValueError: There is no such measure, or the record has no layer.
    """
    if not record.layers:
        raise ValueError("record must have at least one layer, got an empty record")
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {list(MEASURES)}, got {measure!r}")
    names = list(record.layers)
    ax = _axes(ax, 6.0, 0.8 + 0.35 * max(len(names), 3))
    values = np.full((len(names), max(layer.heads for layer in record.layers.values())), np.nan)
    for row, layer in enumerate(record.layers.values()):
        values[row, : layer.heads] = layer.measures()[measure].numpy()
    image = ax.imshow(values, cmap="cividis", aspect="auto")
    ax.set(xlabel="head", xticks=range(values.shape[1]))
    ax.set_yticks(range(len(names)), names, fontsize="small")
    ax.set_title(f"{measure}: {MEASURES[measure]}", fontsize="small")
    ax.figure.colorbar(image, ax=ax)
    return ax


def similarity(first: LayerRecord, second: LayerRecord, *, ax: Axes | None = None) -> Axes:
    """Plot how alike the heads of two layers attend, of one model or of two that read the same tokens.

    The similarity (Bhattacharyya) is 1 for the same attention and 0 for attention to different keys; see
    `LayerRecord.similarity`.

    Args:
        first: Layer with one row per head.
        second: Layer with one column per head.
        ax: Axes to draw on; default: a new figure.

    Raises:
        ValueError: The layers read different numbers of tokens.
    """
    values = first.similarity(second).numpy()
    ax = _axes(ax, 4.4, 3.8)
    image = ax.imshow(values, cmap="cividis", vmin=0, vmax=1)
    ax.set(xlabel=f"head of {second.name or 'the model'}", ylabel=f"head of {first.name or 'the model'}")
    ax.set(xticks=range(values.shape[1]), yticks=range(values.shape[0]))
    ax.figure.colorbar(image, ax=ax, label="similarity")
    return ax


def compare(records: Mapping[str, Record], layer: str, head: int, example: int = 0) -> Figure:
    """Plot angles and attention of the same head in several models, such as EA and DPA of one run, side by side.

    Args:
        records: Records by the title of their column.
        layer: Name of the layer.
        head: Index of the head, from 0.
        example: Index of the kept example, from 0.

    Raises:
        ValueError: There is no record, layer, head or example.
    """
    if not records:
        raise ValueError("records must hold at least one record, got none")
    figure, axes = plt.subplots(2, len(records), figsize=(3.6 * len(records), 6.2), squeeze=False, layout="constrained")
    for column, (title, record) in enumerate(records.items()):
        angles(record.layer(layer), head, ax=axes[0, column])
        attention_map(record.layer(layer), head, example, ax=axes[1, column])
        axes[0, column].set_title(title)
        axes[1, column].set_title("")
    return figure


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    made: Any = plt.subplots(figsize=(width, height), layout="constrained")[1]
    return made


def _check_head(layer: LayerRecord, head: int) -> None:
    if not 0 <= head < layer.heads:
        raise ValueError(f"head must be from 0 to {layer.heads - 1} in {layer.name!r}, got {head}")
