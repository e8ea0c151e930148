"""The figures on the page: plots to look into, and images for paper and for browsers without scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from .drawing.description import Drawing, Group
from .drawing.with_plotly import plot
from .figures import FIGURES

__all__ = ["Chart", "charts_of"]


# Plots in groups: heading of the group, headings of its plots and plots; empty where there is none.
_Groups = Sequence[tuple[str, Sequence[tuple[str, Markup]]]]


@dataclass(frozen=True)
class Chart:
    """One figure of the page.

    Attributes:
        name: Name of its anchor and of its files.
        title: Its heading.
        drawing: Description, with its key and words.
        groups: Its plots.
        folded: Its plots that a reader can unfold.
        still: Data URI of its image; None: there is none.
        small: Whether plots are small enough for four beside each other.
    """

    name: str
    title: str
    drawing: Drawing
    groups: _Groups
    folded: _Groups
    still: str | None
    small: bool


def charts_of(drawings: Mapping[str, Drawing], images: Mapping[str, Path]) -> list[Chart]:
    """The figures with their images."""
    return [
        Chart(
            name=name,
            title=FIGURES[name].title,
            drawing=drawing,
            groups=[("", [("", plot(drawing.panels))])] if drawing.stacked else _plots(drawing.groups),
            folded=_plots(drawing.folded[1]),
            still=_data_uri(images[name]) if name in images else None,
            small=any(panel.square for panel in drawing.panels),
        )
        for name, drawing in drawings.items()
    ]


def _plots(groups: Sequence[Group]) -> _Groups:
    return [
        (group.title, [(", ".join(panel.title.split("\n")), plot([panel], titled=False)) for panel in group.panels])
        for group in groups
    ]


def _data_uri(path: Path) -> str:
    """The picture as WebP of the same pixels, which has three quarters of the PNG file's bytes."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "WEBP", lossless=True, quality=25, method=1)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
