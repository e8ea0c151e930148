"""Write the page, the pictures and a table to a folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from . import figures
from .page import write_page
from .record import MEASURES, Record

__all__ = ["landscape_figure", "write_folder"]


def write_folder(
    records: Mapping[str, Record], folder: str | Path, *, title: str, tokens: Sequence[Sequence[str]] | None = None
) -> list[Path]:
    """Write ``geometry.html``, ``heads.csv`` and PNGs.

    The pictures show the landscape and two measures of all heads. For up to four layers, they also compare angles and
    attention of the first head, show its attention by angle and size, and show how alike the heads of two models are.

    Args:
        records: Records by name; pictures that compare need the same layers in each.
        folder: Folder to write to.
        title: Title of the page.
        tokens: Text of the tokens of each kept example; default: their positions.

    Returns:
        Paths of the files, the page first.
    """
    folder = Path(folder)
    written = [write_page(records, folder / "geometry.html", title=title, tokens=tokens), folder / "heads.csv"]
    with written[1].open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, ["model", "name", "layer", "head", "form", *MEASURES])
        rows.writeheader()
        for name, record in records.items():
            rows.writerows({"model": name, **row} for row in record.rows())
    first = next(iter(records.values()))
    drawn: dict[str, Figure] = {"landscape": landscape_figure()}
    for measure in ("antiparallel", "effective_keys"):
        for name, record in records.items():
            drawn[f"{measure}_{name}".replace(" ", "_")] = _figure(figures.heads(record, measure))
    shared = {name: record for name, record in records.items() if record.layers.keys() == first.layers.keys()}
    for layer in list(first.layers)[:4]:  # the page has the other layers of deep models
        shown = layer or "model"
        drawn[f"compare_{shown}_head_0"] = figures.compare(shared, layer, 0)
        for name, record in shared.items():
            by_size = figures.angle_and_size(record.layer(layer), 0)
            drawn[f"angle_and_size_{shown}_head_0_{name}".replace(" ", "_")] = _figure(by_size)
        for name, record in list(shared.items())[1:]:
            alike = figures.similarity(first.layer(layer), record.layer(layer))
            drawn[f"similarity_{shown}_{name}".replace(" ", "_")] = _figure(alike)
    for name, figure in drawn.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def landscape_figure() -> Figure:
    """Plot weights of DPA and EA over the angle and over a plane of keys, as in the paper."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")
    figures.landscape(ax=axes[0])
    figures.key_plane("softmax", ax=axes[1])
    figures.key_plane("expressive", ax=axes[2])
    return figure


def _figure(ax: plt.Axes) -> Figure:
    found = ax.figure
    assert isinstance(found, Figure)
    return found
