"""Maps and splits in plotly, for the page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from ...analysis.wording import mechanism_name
from ...runs.results import StudyResults
from ..attention import AttentionMap
from .maps import Map, margin_maps, solved_maps
from .plotly_parts import HEADROOM, RANGE, Plot, escaped, escaped_with_breaks, marker_of, shortened
from .theme import AHEAD, BEHIND, EMPTY, MUTED, SHARE, dodge, styles, wrap

__all__ = ["attention_plot", "margin_map_plot", "solved_map_plot", "split_plot"]


def margin_map_plot(results: StudyResults) -> go.Figure:
    """Mean difference in accuracy by model and task."""
    maps = margin_maps(results)
    reach = max(0.05, *(abs(value) for found in maps for value in found.values.flat if value == value))
    return _maps(maps, [(0.0, BEHIND), (0.5, "#ffffff"), (1.0, AHEAD)], (-reach, reach))


def solved_map_plot(results: StudyResults) -> go.Figure:
    """Share of seeds solved by model and task."""
    return _maps(solved_maps(results), [(0.0, "#ffffff"), (1.0, SHARE)], (0.0, 1.0))


def split_plot(results: StudyResults, rows: pl.DataFrame) -> Plot:
    """Accuracy by group of test positions.

    Args:
        results: The study.
        rows: Rows of `figure_data.split_table` of one condition and split.
    """
    split = rows["split"][0]
    groups = rows.unique("group").sort("group")
    place = {group: index for index, group in enumerate(groups["group"])}
    names = [str(group) for group in place] if split == "position" else groups["name"].to_list()
    known = groups.drop_nulls("ceiling")
    traces: list[dict[str, Any]] = [
        {
            "x": [place[group] for group in known["group"]],
            "y": shortened(known["ceiling"]),
            "mode": "markers",
            "marker": {"symbol": "line-ew-open", "size": 22 if len(names) < 8 else 12, "color": MUTED},
            "hovertemplate": "best possible %{y:.3f}<extra></extra>",
        }
    ]
    drawn = styles(results.mechanisms)
    for mechanism, shift in dodge(results.mechanisms).items():
        style, found = drawn[mechanism], rows.filter(pl.col("mechanism") == mechanism).sort("group")
        means = found["accuracy"]
        traces.append(
            {
                "x": [place[group] + 0.6 * shift for group in found["group"]],
                "y": shortened(means),
                "mode": "lines+markers" if split == "position" else "markers",
                "line": {"color": style.color, "dash": style.dash, "width": 1},
                "marker": marker_of(style, 7, 1.5),
                "text": [escaped(f"{mechanism_name(mechanism)}, {name}") for name in found["name"]],
                "hovertemplate": "%{text}: %{y:.3f}<extra></extra>",
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": shortened(found["highest"] - means),
                    "arrayminus": shortened(means - found["lowest"]),
                    "color": style.color,
                    "thickness": 1.5,
                    "width": 0,
                },
            }
        )
    along = {
        "title": {"text": "position" if split == "position" else ""},
        "range": [-0.6, len(names) - 0.4],
        "tickvals": list(range(len(names))),
        "ticktext": ["<br>".join(map(escaped, textwrap.wrap(name, max(7, 28 // len(names))))) for name in names],
        "tickangle": 0,
        "showgrid": False,
    }
    up = {"title": {"text": "accuracy"}, "range": RANGE, "dtick": 0.25}
    return {"data": traces, "layout": {"height": 230, "xaxis": along, "yaxis": up}}


def attention_plot(found: AttentionMap) -> Plot:
    """Mean attention weights of one layer."""
    weights = {
        "type": "heatmap",
        "z": [[round(weight, 3) for weight in row] for row in found.weights.tolist()],
        "colorscale": [(0.0, "#ffffff"), (1.0, SHARE)],
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "hovertemplate": "query %{y}, key %{x}: %{z:.3f}<extra></extra>",
    }
    both = {"showgrid": False, "constrain": "domain"}
    keys = {"title": {"text": "key"}, "constraintoward": "left"}
    queries = {"title": {"text": "query"}, "constraintoward": "top", "autorange": "reversed", "scaleanchor": "x"}
    return {"data": [weights], "layout": {"height": 240, "xaxis": both | keys, "yaxis": both | queries}}


def _maps(maps: Sequence[Map], colors: list[tuple[float, str]], limits: tuple[float, float]) -> go.Figure:
    """Maps above each other, each cell with its text."""
    rows, columns = maps[0].values.shape
    body, names = 44 * rows + 40, 15 * max(map(len, maps[0].columns)) + 24
    figure = make_subplots(
        rows=len(maps),
        shared_xaxes=True,
        vertical_spacing=min(0.9 / len(maps), 34 / (body * len(maps))),
        subplot_titles=[escaped(found.title) for found in maps],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    for place, found in enumerate(maps, 1):
        figure.add_heatmap(
            row=place,
            col=1,
            z=[[None if value != value else round(value, 5) for value in row] for row in found.values.tolist()],
            text=[[escaped(text) for text in row] for row in found.texts],
            texttemplate="%{text}",
            hovertext=[[escaped_with_breaks(text) for text in row] for row in found.details],
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            colorscale=colors,
            zmin=limits[0],
            zmax=limits[1],
            showscale=False,
            xgap=2,
            ygap=2,
        )
    figure.update_yaxes(
        range=[rows - 0.5, -0.5],
        tickvals=list(range(rows)),
        ticktext=["<br>".join(map(escaped, wrap(name, 13))) for name in maps[0].rows],
        showgrid=False,
        ticks="",
    )
    figure.update_xaxes(
        tickangle=0,
        tickfont_size=11,
        range=[-0.5, columns - 0.5],
        tickvals=list(range(columns)),
        ticktext=["<br>".join(map(escaped, lines)) for lines in maps[0].columns],
        showgrid=False,
        ticks="",
    )
    figure.update_xaxes(title_text="task, state space in bits", row=len(maps), col=1)
    return figure.update_layout(height=len(maps) * body + names + 40, margin_t=HEADROOM, plot_bgcolor=EMPTY)
