"""The files of figures: images, and their numbers beside them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ...analysis.comparisons import comparisons
from ...files import write_atomically
from ...runs.results import StudyResults
from ..attention import AttentionMap
from .layout import MOST_PANELS, finished_conditions, most_different, narrowed, split_conditions
from .notes import notes
from .tables import FIGURE_DATA, attention_table
from .with_matplotlib import (
    accuracy_figure,
    attention_figure,
    difference_figure,
    learning_figure,
    margin_map_figure,
    solved_figure,
    solved_map_figure,
    splits_figure,
    steps_figure,
)

__all__ = ["png", "save_figures"]


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
