"""The files of figures: images, their numbers beside them, and an archive of all tables."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..files import write_atomically
from .drawing.description import Drawing
from .drawing.layout import finished_conditions
from .drawing.with_matplotlib import image, png
from .export import study_tables
from .figure import Material
from .figures import FIGURES

__all__ = ["archive_link", "drawings_of", "save_figures"]

_EMBEDDED = 300_000  # bytes of the largest archive that the page holds itself
_NO_TIME = (1980, 1, 1, 0, 0, 0)  # the same study, the same bytes


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
        paths[name] = path.with_suffix(".png")
        # Paper cannot be unfolded: with nothing in sight, it shows all that the page folds away.
        shown = drawing if drawing.groups else replace(drawing, groups=drawing.folded[1])
        write_atomically(paths[name], png(image(shown)))
    return paths


def archive_link(drawings: Mapping[str, Drawing], material: Material, directory: Path) -> str:
    """The address of a zip file of the study's tables and of the numbers of its figures.

    The address holds the file itself; a larger one than 300 kB is written to `directory` as ``tables.zip``.

    Args:
        drawings: As for `save_figures`, which has written their numbers.
        material: As there.
        directory: Folder of the page.
    """
    content = _archive(drawings, material, directory / "figures")
    if len(content) <= _EMBEDDED:
        return f"data:application/zip;base64,{base64.b64encode(content).decode()}"
    write_atomically(directory / "tables.zip", content)
    return "tables.zip"


def _archive(drawings: Mapping[str, Drawing], material: Material, directory: Path) -> bytes:
    content = {f"{name}.csv": table.write_csv() for name, table in study_tables(material.results).items()}
    content |= {f"figures/{name}.csv": (directory / f"{name}.csv").read_text(encoding="utf-8") for name in drawings}
    content["config.toml"] = material.results.config
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, text in content.items():
            file.writestr(zipfile.ZipInfo(name, _NO_TIME), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
