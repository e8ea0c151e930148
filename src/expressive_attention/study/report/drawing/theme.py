"""Colors, marks and sizes, the same on the page and in image files."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from ...analysis.comparisons import comparisons
from ...config.condition import Condition
from ...runs.results import StudyResults

__all__ = [
    "AHEAD",
    "BEHIND",
    "DARK",
    "EMPTY",
    "GRID",
    "GROUP",
    "INK",
    "MEAN",
    "MUTED",
    "PREDICTORS",
    "SEED",
    "SHARE",
    "VEIL",
    "Style",
    "crowding",
    "css_color",
    "difference_reach",
    "dodge",
    "predictors_of",
    "readable_on",
    "slot_height",
    "spread",
    "steps_reach",
    "styles",
    "wrap",
]


INK = "#222222"
MUTED = "#666666"
GRID = "#dddddd"
EMPTY = "#e6e6e6"  # of a map where there is no number
SHARE = "#1a6e52"  # of shares and weights, on white
VEIL = "rgba(255, 255, 255, 0.8)"  # behind text that lies on lines
AHEAD, BEHIND = "#0072B2", "#D55E00"  # of the margin: the colors of EA and DPA
_DODGED = 0.7  # the part of a slot that mechanisms share

# The same colors on a dark page; others stay as they are.
DARK = {
    INK: "#e8e8e6",
    MUTED: "#a3a3a0",
    GRID: "#3b3e42",
    EMPTY: "#2b2e32",
    SHARE: "#5fd3a6",
    VEIL: "rgba(23, 25, 28, 0.8)",
    "#ffffff": "#17191c",
    "#000000": "#e8e8e6",
    AHEAD.lower(): "#3fa3e0",
    BEHIND.lower(): "#f07f2e",
}

SEED, GROUP, MEAN = 2.5, 4.0, 6.0  # diameters of marks, in points

# Predictors in `Condition.facts`: name for people, marker in image files, symbol in the report, and shift in the
# column, since the accuracies of the trivial ones nearly coincide.
PREDICTORS = {
    "chance": ("chance", "_", "line-ew-open", 0.0),
    "majority": ("majority digit", "x", "x-thin-open", -0.05),
    "copy_last": ("copy last digit", "+", "cross-thin-open", 0.05),
    "ceiling": ("best possible", "2", "y-down-open", 0.0),
}


@dataclass(frozen=True)
class Style:
    """The look of a mechanism, told apart by color, marker and dash, so that grey is enough.

    Attributes:
        color: Color of lines and markers (Okabe and Ito's palette, safe for color-blind readers).
        fill: Color inside markers.
        marker: Marker in image files.
        line: Line style in image files.
        symbol: Marker in the report.
        dash: Line style in the report.
    """

    color: str
    fill: str
    marker: str
    line: Literal["-", "--", "-.", ":"]
    symbol: str
    dash: str


_EXPRESSIVE = Style("#0072B2", "#0072B2", "o", "-", "circle", "solid")
_DOT_PRODUCT = Style("#D55E00", "#FFFFFF", "s", "--", "square", "dash")
_OTHERS = (
    Style("#009E73", "#009E73", "^", ":", "triangle-up", "dot"),
    Style("#CC79A7", "#FFFFFF", "D", "-.", "diamond", "dashdot"),
    Style("#56B4E9", "#56B4E9", "v", "-.", "triangle-down", "dashdot"),
    Style("#E69F00", "#FFFFFF", "^", ":", "triangle-up", "dot"),
    Style("#000000", "#FFFFFF", "P", "--", "cross", "dash"),
    Style("#009E73", "#FFFFFF", "v", "--", "triangle-down", "dash"),
    Style("#CC79A7", "#CC79A7", "^", "--", "triangle-up", "dash"),
    Style("#56B4E9", "#FFFFFF", "D", ":", "diamond", "dot"),
    Style("#E69F00", "#E69F00", "D", "-.", "diamond", "dashdot"),
    Style("#000000", "#000000", "v", ":", "triangle-down", "dot"),
)


def styles(mechanisms: Sequence[str]) -> dict[str, Style]:
    """The look of each of the mechanisms."""
    others = [mechanism for mechanism in mechanisms if mechanism not in ("expressive", "dot_product")]
    found = {"expressive": _EXPRESSIVE, "dot_product": _DOT_PRODUCT}
    found |= {mechanism: _OTHERS[index % len(_OTHERS)] for index, mechanism in enumerate(others)}
    return {mechanism: found[mechanism] for mechanism in mechanisms}


def dodge(mechanisms: Sequence[str]) -> dict[str, float]:
    """Positions beside each other, around 0, within a slot of width 1."""
    count = len(mechanisms)
    return {mechanism: (index - (count - 1) / 2) * _DODGED / count for index, mechanism in enumerate(mechanisms)}


def slot_height(mechanisms: Sequence[str]) -> float:
    """Inches that a slot needs in which each of the mechanisms, in the positions of `dodge`, has a line of text."""
    return 0.125 * len(mechanisms) / _DODGED


def crowding(mechanisms: Sequence[str], reach: float) -> float:
    """Factor on distances up to `reach` from a mean, so that seeds stay out of the next mechanism's part of a slot."""
    return min(1.0, 0.55 * _DODGED / len(mechanisms) / reach)


def spread(count: int, width: float) -> list[float]:
    """Positions of `count` seeds around 0, so that equal values do not hide each other."""
    return [0.0] if count == 1 else np.linspace(-width / 2, width / 2, count).tolist()


def wrap(label: str, width: int = 20) -> list[str]:
    """Lines of about `width` characters, broken after commas only: ``"basis 16"`` stays on one line."""
    unbroken = re.sub("(?<!,) ", "\u00a0", label)
    return textwrap.wrap(unbroken, width, break_long_words=False, break_on_hyphens=False)


def readable_on(color: str) -> str:
    """Ink or white, whichever contrasts more with the color (relative luminance as in WCAG 2)."""
    shares = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.2 else "#ffffff"


def predictors_of(condition: Condition) -> dict[str, float]:
    """Accuracies of the predictors that the condition tells of; a ceiling of 1 goes without saying."""
    facts = {fact: condition.facts[fact] for fact in PREDICTORS if fact in condition.facts}
    if facts.get("ceiling", 0.0) > 1 - 1e-9:
        del facts["ceiling"]
    return facts


def css_color(color: str) -> str:
    """The color for CSS, which follows the page's theme."""
    dark = DARK.get(color.lower())
    return f"light-dark({color}, {dark})" if dark else color


def difference_reach(results: StudyResults) -> float:
    """Largest distance from 0 that the figure of paired differences shows."""
    largest = max(abs(value) for comparison in comparisons(results) for value in comparison.differences)
    return min(1.05, max(0.05, 1.1 * largest))


def steps_reach(results: StudyResults) -> float:
    """Training steps that figures against steps show: the same in each, so that they can be compared."""
    return 1.04 * float(results.seeds.filter(pl.col("role") == "final")["steps"].to_numpy().max())
