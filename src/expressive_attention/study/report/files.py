"""The files of figures: images, and their numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..files import write_atomically
from .drawing.description import Drawing
from .drawing.layout import finished_conditions
from .drawing.with_matplotlib import image, png
from .figure import Material
from .figures import FIGURES

__all__ = ["drawings_of", "save_figures"]


def drawings_of(material: Material) -> dict[str, Drawing]:
    """Every figure that the results allow, by its name, in the order of the page; none without final seeds."""
    if not finished_conditions(material.results):
        return {}
    drawn = {name: figure.draw(material) for name, figure in FIGURES.items()}
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def save_figures(drawings: Mapping[str, Drawing], material: Material, directory: Path) -> dict[str, Path]:
    """Writes figures as PNG files, and their numbers beside them as CSV.

    A figure that cannot show all conditions shows those on which the mechanisms differ most; the numbers are of all.

    Args:
        drawings: The figures, as `drawings_of` describes them.
        material: Results that they are drawn from.
        directory: Folder to write to; it is made if it does not exist.

    Returns:
        The image files written, by the name of the figure.
    """
    paths: dict[str, Path] = {}
    for name, drawing in drawings.items():
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{name}.csv"
        write_atomically(path, FIGURES[name].table(material).write_csv().encode())
        if drawing.groups:
            paths[name] = path.with_suffix(".png")
            write_atomically(paths[name], png(image(drawing)))
    return paths
