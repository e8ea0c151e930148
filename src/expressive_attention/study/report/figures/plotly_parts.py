"""Parts that the figures in plotly share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import polars as pl
from markupsafe import Markup

from ...analysis.estimators import Interval
from ...analysis.wording import mechanism_name
from ...runs.results import StudyResults
from .theme import GRID, INK, MUTED, Style, steps_reach, wrap

__all__ = [
    "HEADROOM",
    "RANGE",
    "Plot",
    "error_bars",
    "escaped",
    "escaped_with_breaks",
    "marker_of",
    "markup",
    "means_with_intervals",
    "one_curve",
    "one_panel",
    "rows_of_conditions",
    "seed_marks",
    "shortened",
    "straight_line",
]


# A figure as plotly's JSON: written directly where there are many, since building `go.Figure` takes 0.1 s.
Plot = dict[str, Any]

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'
RANGE = [-0.03, 1.03]  # a share, with room for markers at both ends
HEADROOM = 28  # pixels for a line of text above a plot


def rows_of_conditions(labels: Sequence[str]) -> go.Figure:
    """A figure with one labelled row per condition, from the top."""
    names = [wrap(label, 20) for label in labels]
    figure = go.Figure(layout_height=100 + max(56, 12 + 16 * max(map(len, names))) * len(labels))
    figure.update_yaxes(
        range=[len(labels) - 0.5, -0.5],
        tickvals=list(range(len(labels))),
        ticktext=["<br>".join(map(escaped, lines)) for lines in names],
        showgrid=False,
        ticks="",
    )
    figure.update_layout(shapes=[straight_line(boundary - 0.5, "y", GRID) for boundary in range(1, len(labels))])
    return figure


def straight_line(at: float, across: str, color: str) -> dict[str, Any]:
    """A line through the whole figure, across its x or y axis."""
    along = "y" if across == "x" else "x"
    return {
        "type": "line",
        "layer": "below",
        f"{across}0": at,
        f"{across}1": at,
        f"{across}ref": across,
        f"{along}0": 0,
        f"{along}1": 1,
        f"{along}ref": "paper",
        "line": {"color": color, "width": 1},
    }


def one_panel(results: StudyResults, ylabel: str, traces: list[dict[str, Any]], **layout: Any) -> Plot:
    """A figure of a share against training steps."""
    along = {"title": {"text": "training steps"}, "range": [0, steps_reach(results)]}
    up = {"title": {"text": ylabel}, "range": RANGE, "dtick": 0.25}
    return {"data": traces, "layout": {"height": 230, "xaxis": along, "yaxis": up, **layout}}


def one_curve(mechanism: str, style: Style, x: list[Any], y: list[Any], **line: Any) -> dict[str, Any]:
    """A line of a mechanism."""
    return {
        "x": x,
        "y": y,
        "mode": "lines",
        "line": {"color": style.color, "dash": style.dash, "width": 2.5, **line},
        "hovertemplate": f"{escaped(mechanism_name(mechanism))}, step %{{x}}: %{{y:.3f}}<extra></extra>",
    }


def shortened(values: pl.Series) -> list[float | None]:
    """As many digits as can be seen: a page has many numbers."""
    return values.round(4).to_list()


def means_with_intervals(
    x: Sequence[float], y: Sequence[float], style: Style, hover: list[str], mode: str = "markers", **arms: Any
) -> go.Scatter:
    """Means of a mechanism, with their intervals."""
    return go.Scatter(
        x=x,
        y=y,
        mode=mode,
        line={"color": style.color, "dash": style.dash, "width": 1.5},
        marker=marker_of(style, 10, 2),
        text=list(map(escaped_with_breaks, hover)),
        hovertemplate="%{text}<extra></extra>",
        **arms,
    )


def seed_marks(x: Sequence[float], y: Sequence[float], texts: list[str], style: Style, template: str) -> go.Scatter:
    """Small marks, one for each seed."""
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        opacity=0.6,
        marker=marker_of(style, 5, 1),
        text=list(map(escaped, texts)),
        hovertemplate=f"{template}<extra></extra>",
    )


def marker_of(style: Style, size: int, width: float) -> dict[str, Any]:
    """How plotly draws a mechanism's mark."""
    return {
        "symbol": style.symbol,
        "size": size,
        "color": style.fill,
        "line": {"color": style.color, "width": width},
    }


def error_bars(centers: Sequence[tuple[float, Interval | None]], style: Style) -> dict[str, Any]:
    """Error bars; those without an interval have no length."""
    return {
        "array": [interval.high - center if interval else 0 for center, interval in centers],
        "arrayminus": [center - interval.low if interval else 0 for center, interval in centers],
        "color": style.color,
        "thickness": 2,
        "width": 0,
    }


def markup(plot: go.Figure | Plot) -> Markup:
    """The JSON from which the page's script draws the plot in its style; touch scrolls the page, not the plot."""
    content = json.loads(plot.to_json() or "") if isinstance(plot, go.Figure) else plot
    axes = {
        "fixedrange": True,
        "gridcolor": GRID,
        "linecolor": MUTED,
        "showline": True,
        "tickcolor": MUTED,
        "ticks": "outside",
        "zeroline": False,
        "automargin": True,
    }
    given = content["layout"]
    layout = given | {
        "template": {},
        "dragmode": False,
        "showlegend": False,
        "font": {"family": _FONT, "size": 12, "color": INK},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8} | given.get("margin", {}),
        "hoverlabel": {"bgcolor": "#ffffff", "font": {"color": INK}},
    }
    for name, axis in given.items():
        if name.startswith(("xaxis", "yaxis")):
            layout[name] = axes | axis | {"title": {"standoff": 8} | axis.get("title", {})}
    text = json.dumps({"data": content["data"], "layout": layout}, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(
        f'<div class="plotly-graph-div" aria-busy="true" style="height:{layout["height"]}px">'
        f'<script type="application/json">{text}</script></div>'
    )


def escaped(text: str) -> str:
    """Text that plotly shows as it is, instead of reading it as HTML."""
    return escape(text, quote=False)


def escaped_with_breaks(text: str) -> str:
    """As `escaped`, with breaks of lines kept."""
    return "<br>".join(map(escaped, text.split("<br>")))
