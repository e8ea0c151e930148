"""Draws the pictures of the README and the documentation from finished studies.

.venv/bin/ea study run quick && .venv/bin/python docs/images/make.py runs/quick

The picture of the geometry needs no study.
"""

import sys
from pathlib import Path

import matplotlib as mpl

from expressive_attention.geometry.folder import landscape_figure
from expressive_attention.study.figures import accuracy_figure, margin_map_figure
from expressive_attention.study.store import Store, collect

# By the name of the study; an accuracy figure for those that are not here.
FIGURES = {"ladder": margin_map_figure}

if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "expressive-attention"  # the same file from the same numbers
    landscape_figure().savefig(Path(__file__).with_name("geometry_landscape.svg"), metadata={"Date": None})
    for folder in sys.argv[1:]:
        results = collect(Store(Path(folder)))
        figure = FIGURES.get(results.name, accuracy_figure)(results)
        figure.savefig(Path(__file__).with_name(f"{results.name}.svg"), metadata={"Date": None})
