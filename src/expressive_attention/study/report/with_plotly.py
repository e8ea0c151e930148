"""Interactive figures of a report, in the page's style; drawn by the page when they come into sight."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import polars as pl
from markupsafe import Markup
from plotly.subplots import make_subplots

from ..analysis.summaries import (
    Interval,
    Summary,
    comparisons,
    describe_interval,
    evidence,
    mechanism_name,
    median_curve,
    solve_curve,
    summaries,
)
from ..runs.results import Condition, StudyResults
from .attention import AttentionMap
from .theme import (
    AHEAD,
    BEHIND,
    EMPTY,
    GRID,
    INK,
    MUTED,
    PREDICTORS,
    SHARE,
    Map,
    Style,
    candidate_names,
    crowding,
    difference_reach,
    dodge,
    finished_conditions,
    ladder,
    margin_maps,
    predictors_of,
    solved_maps,
    spread,
    steps_reach,
    steps_tests,
    styles,
    wrap,
)

__all__ = [
    "accuracy_plot",
    "attention_plot",
    "difference_plot",
    "learning_plot",
    "margin_map_plot",
    "markup",
    "solved_map_plot",
    "solved_plot",
    "split_plot",
    "steps_plot",
]

# A figure as plotly's JSON: written directly where there are many, since building `go.Figure` takes 0.1 s.
Plot = dict[str, Any]

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'
_RANGE = [-0.03, 1.03]  # a share, with room for markers at both ends
_HEADROOM = 28  # pixels for a line of text above a plot


def accuracy_plot(results: StudyResults) -> go.Figure:
    """Accuracy against complexity: one panel per model, one column per task."""
    layout = ladder(results)
    figure = make_subplots(
        rows=len(layout.panels),
        shared_xaxes=True,
        vertical_spacing=0.3 / max(3, len(layout.panels)),
        subplot_titles=[_text(panel.title) for panel in layout.panels],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    drawn, shift = styles(results.mechanisms), dodge(results.mechanisms)
    found = {(summary.condition, summary.mechanism): summary for summary in summaries(results)}
    for row, panel in enumerate(layout.panels, 1):
        known = [(column, predictors_of(condition)) for column, condition in panel.conditions]
        for fact, (name, _, symbol, offset) in PREDICTORS.items():
            figure.add_scatter(
                row=row,
                col=1,
                x=[column + offset for column, values in known if fact in values],
                y=[values[fact] for _, values in known if fact in values],
                mode="markers",
                marker={"symbol": symbol, "size": 16 if fact == "chance" else 8, "color": MUTED},
                hovertemplate=f"{name} %{{y:.3f}}<extra></extra>",
            )
        for mechanism, style in drawn.items():
            columns = [(at, found.get((condition.label, mechanism))) for at, condition in panel.conditions]
            present = [(at, summary) for at, summary in columns if summary]
            for trace in _accuracy_traces(results, present, mechanism, style, shift[mechanism]):
                figure.add_trace(trace, row=row, col=1)
    ticks = ["<br>".join(map(_text, lines)) for lines in layout.tasks]
    figure.update_xaxes(
        tickangle=0,
        tickfont_size=11,
        range=[-0.5, len(ticks) - 0.5],
        tickvals=list(range(len(ticks))),
        ticktext=ticks,
        showgrid=False,
    )
    figure.update_layout(shapes=[_line(boundary - 0.5, "x", GRID) for boundary in range(1, len(ticks))])
    figure.update_xaxes(title_text="task, state space in bits", row=len(layout.panels), col=1)
    figure.update_yaxes(range=_RANGE, title_text="held-out accuracy")
    return figure.update_layout(height=120 + 230 * len(layout.panels), margin_t=_HEADROOM)


def _accuracy_traces(
    results: StudyResults,
    present: Sequence[tuple[int, Summary]],
    mechanism: str,
    style: Style,
    shift: float,
) -> list[go.Scatter]:
    """One mechanism's seeds, and its means with intervals; the seeds stand left of the mean."""
    x, y, texts = [], [], []
    closer = crowding(results.mechanisms)
    for column, summary in present:
        rows = evidence(results.seeds, summary.condition, mechanism)
        x += [column + shift - 0.06 * closer + offset for offset in spread(rows.height, 0.1 * closer)]
        y += rows["accuracy"].to_list()
        texts += [f"{mechanism_name(mechanism)}, seed {seed}" for seed in rows["seed"]]
    return [
        _seed_marks(x, y, texts, style, "%{text}: %{y:.3f}"),
        _means(
            [column + shift + 0.06 * closer for column, _ in present],
            [summary.accuracy for _, summary in present],
            style,
            hover=[
                f"{mechanism_name(mechanism)}: {summary.accuracy:.3f}<br>"
                + describe_interval(summary.accuracy_interval, summary.seeds, ".3f")
                for _, summary in present
            ],
            mode="lines+markers",
            error_y=_arms([(summary.accuracy, summary.accuracy_interval) for _, summary in present], style),
        ),
    ]


def solved_plot(results: StudyResults) -> go.Figure:
    """Share of seeds solved on each condition."""
    labels = [condition.label for condition in finished_conditions(results)]
    shift = dodge(results.mechanisms)
    figure = _rows(labels)
    beside: list[dict[str, Any]] = []
    for mechanism, style in styles(results.mechanisms).items():
        found = [summary for summary in summaries(results) if summary.mechanism == mechanism]
        shares = [summary.solved / summary.seeds for summary in found]
        at = [labels.index(summary.condition) + shift[mechanism] for summary in found]
        counts = [f"{summary.solved}/{summary.seeds}" for summary in found]
        figure.add_trace(
            _means(
                shares,
                at,
                style,
                hover=[
                    f"{mechanism_name(mechanism)}: {count} solved<br>"
                    + describe_interval(summary.solved_interval, summary.seeds, ".3f")
                    for count, summary in zip(counts, found, strict=True)
                ],
                error_x=_arms(
                    [(share, summary.solved_interval) for share, summary in zip(shares, found, strict=True)],
                    style,
                ),
            )
        )
        beside += [
            {"x": 1, "xref": "paper", "xanchor": "left", "xshift": 6, "y": y, "text": count, "showarrow": False}
            for y, count in zip(at, counts, strict=True)
        ]
    figure.update_xaxes(range=_RANGE, title_text="share of seeds solved")
    return figure.update_layout(margin_r=44, annotations=beside)


def difference_plot(results: StudyResults) -> go.Figure:
    """Paired difference in accuracy on each condition."""
    compared = comparisons(results)
    labels = list(dict.fromkeys(comparison.condition for comparison in compared))
    candidates = list(dict.fromkeys(comparison.candidate.mechanism for comparison in compared))
    drawn, shift = styles(results.mechanisms), dodge(candidates)
    figure = _rows(labels)
    figure.add_vline(0, line_color=INK, line_width=1)
    for candidate in candidates:
        found = [comparison for comparison in compared if comparison.candidate.mechanism == candidate]
        at = [labels.index(comparison.condition) + shift[candidate] for comparison in found]
        x, y, texts = [], [], []
        for row, comparison in zip(at, found, strict=True):
            x += comparison.differences
            y += [row + 0.24 + offset for offset in spread(len(comparison.differences), 0.14)]
            texts += [f"seed {seed}" for seed in comparison.seeds]
        figure.add_trace(_seed_marks(x, y, texts, drawn[candidate], "%{text}: %{x:+.3f}"))
        figure.add_trace(
            _means(
                [comparison.difference for comparison in found],
                at,
                drawn[candidate],
                hover=[
                    f"{mechanism_name(candidate)} - DPA: {comparison.difference:+.4f}<br>"
                    + describe_interval(comparison.interval, len(comparison.differences), "+.4f")
                    for comparison in found
                ],
                error_x=_arms([(comparison.difference, comparison.interval) for comparison in found], drawn[candidate]),
            )
        )
    reach = difference_reach(results)
    names = _text(candidate_names(results))
    figure.update_xaxes(range=[-reach, reach], title_text=f"accuracy of {names} - accuracy of DPA")
    for text, at, anchor in (("DPA better", 0, "left"), (f"{names} better", 1, "right")):
        figure.add_annotation(
            x=at,
            y=1,
            xref="paper",
            yref="paper",
            xanchor=anchor,
            yanchor="bottom",
            text=text,
            showarrow=False,
        )
    return figure.update_layout(margin_t=_HEADROOM)


def learning_plot(results: StudyResults, condition: Condition) -> Plot:
    """Learning curves of one condition."""
    traces = []
    for mechanism, style in styles(results.mechanisms).items():
        curves = evidence(results.curves, condition.label, mechanism)
        if curves.is_empty():
            continue
        steps, accuracies = [], []
        for rows in curves.partition_by("seed"):
            rows = rows.sort("step")
            # The gap after each seed lets one trace hold them all.
            steps += [*rows["step"].to_list(), None]
            accuracies += [*_short(rows["accuracy"].fill_nan(None)), None]
        median = median_curve(curves)
        traces += [
            {
                "x": steps,
                "y": accuracies,
                "mode": "lines",
                "line": {"color": style.color, "dash": style.dash, "width": 0.7},
                "opacity": 0.5,
                "hoverinfo": "skip",
            },
            _curve(mechanism, style, median["step"].to_list(), _short(median["accuracy"])),
        ]
    chance = _line(condition.facts["chance"], "y", MUTED) | {"line": {"color": MUTED, "width": 1, "dash": "dot"}}
    return _panel(results, "accuracy", traces, shapes=[chance])


def steps_plot(results: StudyResults, condition: Condition) -> Plot:
    """Share of seeds solved against training steps, of one condition."""
    traces = []
    for mechanism, style in styles(results.mechanisms).items():
        rows = evidence(results.seeds, condition.label, mechanism)
        if rows.height:
            at, share = solve_curve(rows["steps_to_solve"].to_list(), int(rows["steps"].to_numpy().max()))
            traces.append(_curve(mechanism, style, at, share, shape="hv"))
    said = {
        "x": 0.02,
        "y": 1,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "top",
        "text": _text(steps_tests(results, condition)).replace("\n", "<br>"),
        "showarrow": False,
        "bgcolor": "rgba(255, 255, 255, 0.8)",
    }
    return _panel(results, "share of seeds solved", traces, annotations=[said] if said["text"] else [])


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
            "y": _short(known["ceiling"]),
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
                "y": _short(means),
                "mode": "lines+markers" if split == "position" else "markers",
                "line": {"color": style.color, "dash": style.dash, "width": 1},
                "marker": _marker(style, 7, 1.5),
                "text": [_text(f"{mechanism_name(mechanism)}, {name}") for name in found["name"]],
                "hovertemplate": "%{text}: %{y:.3f}<extra></extra>",
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": _short(found["highest"] - means),
                    "arrayminus": _short(means - found["lowest"]),
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
        "ticktext": ["<br>".join(map(_text, textwrap.wrap(name, max(7, 28 // len(names))))) for name in names],
        "tickangle": 0,
        "showgrid": False,
    }
    up = {"title": {"text": "accuracy"}, "range": _RANGE, "dtick": 0.25}
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
        subplot_titles=[_text(found.title) for found in maps],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    for place, found in enumerate(maps, 1):
        figure.add_heatmap(
            row=place,
            col=1,
            z=[[None if value != value else round(value, 5) for value in row] for row in found.values.tolist()],
            text=[[_text(text) for text in row] for row in found.texts],
            texttemplate="%{text}",
            hovertext=[[_text_with_breaks(text) for text in row] for row in found.details],
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
        ticktext=["<br>".join(map(_text, wrap(name, 13))) for name in maps[0].rows],
        showgrid=False,
        ticks="",
    )
    figure.update_xaxes(
        tickangle=0,
        tickfont_size=11,
        range=[-0.5, columns - 0.5],
        tickvals=list(range(columns)),
        ticktext=["<br>".join(map(_text, lines)) for lines in maps[0].columns],
        showgrid=False,
        ticks="",
    )
    figure.update_xaxes(title_text="task, state space in bits", row=len(maps), col=1)
    return figure.update_layout(height=len(maps) * body + names + 40, margin_t=_HEADROOM, plot_bgcolor=EMPTY)


def _rows(labels: Sequence[str]) -> go.Figure:
    """A figure with one labelled row per condition, from the top."""
    names = [wrap(label, 20) for label in labels]
    figure = go.Figure(layout_height=100 + max(56, 12 + 16 * max(map(len, names))) * len(labels))
    figure.update_yaxes(
        range=[len(labels) - 0.5, -0.5],
        tickvals=list(range(len(labels))),
        ticktext=["<br>".join(map(_text, lines)) for lines in names],
        showgrid=False,
        ticks="",
    )
    figure.update_layout(shapes=[_line(boundary - 0.5, "y", GRID) for boundary in range(1, len(labels))])
    return figure


def _line(at: float, across: str, color: str) -> dict[str, Any]:
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


def _panel(results: StudyResults, ylabel: str, traces: list[dict[str, Any]], **layout: Any) -> Plot:
    """A figure of a share against training steps."""
    along = {"title": {"text": "training steps"}, "range": [0, steps_reach(results)]}
    up = {"title": {"text": ylabel}, "range": _RANGE, "dtick": 0.25}
    return {"data": traces, "layout": {"height": 230, "xaxis": along, "yaxis": up, **layout}}


def _curve(mechanism: str, style: Style, x: list[Any], y: list[Any], **line: Any) -> dict[str, Any]:
    return {
        "x": x,
        "y": y,
        "mode": "lines",
        "line": {"color": style.color, "dash": style.dash, "width": 2.5, **line},
        "hovertemplate": f"{_text(mechanism_name(mechanism))}, step %{{x}}: %{{y:.3f}}<extra></extra>",
    }


def _short(values: pl.Series) -> list[float | None]:
    """As many digits as can be seen: a page has many numbers."""
    return values.round(4).to_list()


def _means(
    x: Sequence[float], y: Sequence[float], style: Style, hover: list[str], mode: str = "markers", **arms: Any
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode=mode,
        line={"color": style.color, "dash": style.dash, "width": 1.5},
        marker=_marker(style, 10, 2),
        text=list(map(_text_with_breaks, hover)),
        hovertemplate="%{text}<extra></extra>",
        **arms,
    )


def _seed_marks(x: Sequence[float], y: Sequence[float], texts: list[str], style: Style, template: str) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        opacity=0.6,
        marker=_marker(style, 5, 1),
        text=list(map(_text, texts)),
        hovertemplate=f"{template}<extra></extra>",
    )


def _marker(style: Style, size: int, width: float) -> dict[str, Any]:
    return {
        "symbol": style.symbol,
        "size": size,
        "color": style.fill,
        "line": {"color": style.color, "width": width},
    }


def _arms(centers: Sequence[tuple[float, Interval | None]], style: Style) -> dict[str, Any]:
    """Error bars; those without an interval have no length."""
    return {
        "array": [interval.high - center if interval else 0 for center, interval in centers],
        "arrayminus": [center - interval.low if interval else 0 for center, interval in centers],
        "color": style.color,
        "thickness": 2,
        "width": 0,
    }


def markup(plot: go.Figure | Plot) -> Markup:
    """What the page's script draws the plot from, in the page's style; fingers scroll the page and not the plot."""
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


def _text(text: str) -> str:
    """Text that plotly shows as it is, instead of reading it as HTML."""
    return escape(text, quote=False)


def _text_with_breaks(text: str) -> str:
    return "<br>".join(map(_text, text.split("<br>")))
