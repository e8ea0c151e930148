"""Draws the pictures of the README and the documentation from finished studies, or from their exported tables.

.venv/bin/ea study run quick && .venv/bin/python docs/images/make.py runs/quick results/ladder results/geometry_ablation

The picture of the geometry needs no study.
"""

import sys
from pathlib import Path

import matplotlib as mpl

from expressive_attention.geometry.folder import landscape_figure
from expressive_attention.study.report.drawing.with_matplotlib import image
from expressive_attention.study.report.figure import Material
from expressive_attention.study.report.figures import FIGURES
from expressive_attention.study.runs.exported import load_results

# The figure of a study, by its name; accuracy for those that are not here.
SHOWN = {"ladder": "margin_map"}

if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "expressive-attention"  # the same file from the same numbers
    landscape_figure().savefig(Path(__file__).with_name("geometry_landscape.svg"), metadata={"Date": None})
    for folder in sys.argv[1:]:
        results = load_results(Path(folder))
        drawing = FIGURES[SHOWN.get(results.name, "accuracy")].draw(Material(results))
        assert drawing is not None
        image(drawing).savefig(Path(__file__).with_name(f"{results.name}.svg"), metadata={"Date": None})
