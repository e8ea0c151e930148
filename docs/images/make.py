"""Draws the picture of the README from a finished study.

.venv/bin/ea study run quick && .venv/bin/python docs/images/make.py runs/quick
"""

import sys
from pathlib import Path

import matplotlib as mpl

from expressive_attention.study.figures import accuracy_figure
from expressive_attention.study.store import Store, collect

if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "expressive-attention"  # the same file from the same numbers
    figure = accuracy_figure(collect(Store(Path(sys.argv[1]))))
    figure.savefig(Path(__file__).with_name("quick.svg"), metadata={"Date": None})
