"""Draws a description with plotly, for the page: as plotly's JSON, which takes less time than its objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from markupsafe import Markup

from .description import Axis, Cells, Curves, Note, Panel, Points, Reference, Rule
from .theme import EMPTY, GRID, INK, MUTED, VEIL

__all__ = ["plot"]


_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'
_INCH = 110  # pixels of an inch on paper
_MARK, _LINE = 1.7, 1.3  # pixels of a point on paper: a screen is farther away
_HEADROOM = 28  # pixels for a line of text above a panel
_TEXT = 15  # pixels of a line of text


def plot(panels: Sequence[Panel], *, titled: bool = True) -> Markup:
    """The JSON from which the page's script draws panels above each other, with their titles or without."""
    layout: dict[str, Any] = {"shapes": [], "annotations": []}
    data: list[dict[str, Any]] = []
    heads = [_HEADROOM if (titled and panel.title) or _has_text_above(panel) else 8 for panel in panels]
    bodies = [round(_INCH * panel.height) for panel in panels]
    whole = sum(bodies) + sum(heads[1:])
    top = 0
    for number, (panel, head, body) in enumerate(zip(panels, heads, bodies, strict=True), 1):
        suffix = "" if number == 1 else str(number)
        top += head if number > 1 else 0
        domain = [max(0.0, 1 - (top + body) / whole), 1 - top / whole]
        top += body
        names = {"x": f"x{suffix}", "y": f"y{suffix}"}
        below = {"domain": [0, 1], "anchor": names["y"], "tickangle": 0} | _axis(panel.x)
        if number < len(panels):
            below |= {"showticklabels": False, "title": {"text": ""}, "matches": f"x{len(panels)}"}
        layout[f"xaxis{suffix}"] = below
        layout[f"yaxis{suffix}"] = {"domain": domain, "anchor": names["x"]} | _axis(panel.y)
        for part in panel.parts:
            _DRAW[type(part)](part, panel, names, data, layout)
        if titled and panel.title:
            layout["annotations"].append(_text(panel.title, 0, domain[1], "left", "bottom", font={"size": 13}))
    lines = max((len(names) for names in panels[-1].x.ticks or ()), default=1)
    layout["height"] = heads[0] + whole + _TEXT * lines + (40 if panels[-1].x.label else 16)
    notes = [part for panel in panels for part in panel.parts if isinstance(part, Note)]
    beside = max((len(note.text) for note in notes if note.place == "beside"), default=0)
    layout["margin"] = {"l": 8, "r": 8 + (8 * beside + 6 if beside else 0), "t": heads[0], "b": 8}
    if panels[0].square:
        layout["xaxis"] |= {"constrain": "domain", "constraintoward": "left"}
        layout["yaxis"] |= {"constrain": "domain", "constraintoward": "top", "scaleanchor": "x"}
    elif any(isinstance(part, Cells) for part in panels[0].parts):
        layout["plot_bgcolor"] = EMPTY
    return _markup(data, layout)


def _has_text_above(panel: Panel) -> bool:
    return any(isinstance(part, Note) and part.place.startswith("above") for part in panel.parts)


def _axis(axis: Axis) -> dict[str, Any]:
    """An axis in the style of the page; touch scrolls the page, not the plot."""
    found: dict[str, Any] = {
        "title": {"text": _escaped(axis.label).replace("\n", "<br>"), "standoff": 8},
        "fixedrange": True,
        "gridcolor": GRID,
        "linecolor": MUTED,
        "showline": True,
        "tickcolor": MUTED,
        "ticks": "outside",
        "zeroline": False,
        "automargin": True,
    }
    if axis.limits is not None:
        found["range"] = list(axis.limits)
    if axis.step is not None:
        found["dtick"] = axis.step
    if axis.ticks is not None:
        found |= {
            "tickvals": list(range(len(axis.ticks))),
            "ticktext": ["<br>".join(map(_escaped, lines)) for lines in axis.ticks],
            "tickfont": {"size": 11},
            "showgrid": False,
            "ticks": "",
        }
    return found


_Parts = tuple[dict[str, str], list[dict[str, Any]], dict[str, Any]]


def _points(part: Points, _: Panel, names: dict[str, str], data: list[dict[str, Any]], __: dict[str, Any]) -> None:
    style, size = part.style, _MARK * part.size
    centers = part.x if part.along == "x" else part.y
    said = f": %{{{part.along}:{part.value}}}" if part.value else ""
    trace: dict[str, Any] = {
        "x": list(part.x),
        "y": list(part.y),
        "mode": "lines+markers" if part.joined else "markers",
        "line": {"color": style.color, "dash": style.dash, "width": 1.5},
        "marker": {
            "symbol": style.symbol,
            "size": size,
            "color": style.fill,
            "line": {"color": style.color, "width": max(1, size / 5)},
        },
        "opacity": 0.6 if part.size < 3 else 1,
        "text": list(map(_escaped_with_breaks, part.texts)),
        "hovertemplate": f"%{{text}}{said}<extra></extra>",
    }
    if part.low:
        bars = list(zip(centers, part.low, part.high, strict=True))
        trace[f"error_{part.along}"] = {
            "type": "data",
            "symmetric": False,
            "array": [0 if high is None else round(high - center, 6) for center, _, high in bars],
            "arrayminus": [0 if low is None else round(center - low, 6) for center, low, _ in bars],
            "color": style.color,
            "thickness": 2,
            "width": 0,
        }
    _add(data, trace, names)


def _reference(
    part: Reference, _: Panel, names: dict[str, str], data: list[dict[str, Any]], __: dict[str, Any]
) -> None:
    trace = {
        "x": list(part.x),
        "y": list(part.y),
        "mode": "markers",
        "marker": {"symbol": part.symbol, "size": _MARK * part.size, "color": MUTED},
        "hovertemplate": f"{_escaped(part.name)} %{{{part.along}:.3f}}<extra></extra>",
    }
    _add(data, trace, names)


def _curves(part: Curves, _: Panel, names: dict[str, str], data: list[dict[str, Any]], __: dict[str, Any]) -> None:
    x: list[float | None] = []
    y: list[float | None] = []
    for xs, ys in part.lines:
        # A gap after each line lets one trace hold them all; of a value, as many digits as can be seen.
        x += [*xs, None]
        y += [*(None if value != value else round(value, 4) for value in ys), None]
    said = f"{_escaped(part.name or '')}, step %{{x}}: %{{y:.3f}}<extra></extra>"
    line = {"color": part.style.color, "dash": part.style.dash, "width": _LINE * part.width}
    trace = {
        "x": x,
        "y": y,
        "mode": "lines",
        "line": line | ({"shape": "hv"} if part.stepped else {}),
        "opacity": part.opacity,
        **({"hoverinfo": "skip"} if part.name is None else {"hovertemplate": said}),
    }
    _add(data, trace, names)


def _cells(part: Cells, panel: Panel, names: dict[str, str], data: list[dict[str, Any]], __: dict[str, Any]) -> None:
    last = len(part.colors) - 1
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": [[None if value != value else round(value, 5) for value in row] for row in part.values],
        "colorscale": [(at / last, color) for at, color in enumerate(part.colors)],
        "zmin": part.limits[0],
        "zmax": part.limits[1],
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": f"{panel.y.label} %{{y}}, {panel.x.label} %{{x}}: %{{z:.3f}}<extra></extra>",
    }
    if part.texts:
        trace |= {"text": [list(map(_escaped, row)) for row in part.texts], "texttemplate": "%{text}"}
        trace |= {"xgap": 2, "ygap": 2}
    if part.details:
        trace["hovertext"] = [list(map(_escaped_with_breaks, row)) for row in part.details]
        trace["hovertemplate"] = "%{hovertext}<extra></extra>"
    _add(data, trace, names)


def _rule(part: Rule, _: Panel, names: dict[str, str], __: list[dict[str, Any]], layout: dict[str, Any]) -> None:
    along = "y" if part.across == "x" else "x"
    layout["shapes"].append({
        "type": "line",
        "layer": "below",
        f"{part.across}0": part.at,
        f"{part.across}1": part.at,
        f"{part.across}ref": names[part.across],
        f"{along}0": 0,
        f"{along}1": 1,
        f"{along}ref": f"{names[along]} domain",
        "line": {"color": part.color, "width": 1, **({"dash": "dot"} if part.dotted else {})},
    })  # fmt: skip


def _note(part: Note, _: Panel, names: dict[str, str], __: list[dict[str, Any]], layout: dict[str, Any]) -> None:
    if not part.text:
        return
    refs = {"xref": f"{names['x']} domain", "yref": f"{names['y']} domain"}
    if part.place == "beside":
        found = _text(part.text, 1, part.y, "left", "middle", **refs | {"yref": names["y"]}, xshift=6)
    elif part.place == "inside":
        found = _text(part.text, 0.02, 1, "left", "top", **refs, bgcolor=VEIL)
    else:
        is_right = part.place == "above right"
        found = _text(part.text, float(is_right), 1, "right" if is_right else "left", "bottom", **refs)
    layout["annotations"].append(found)


_DRAW: dict[type, Callable[..., None]] = {
    Points: _points,
    Reference: _reference,
    Curves: _curves,
    Rule: _rule,
    Note: _note,
    Cells: _cells,
}


def _add(data: list[dict[str, Any]], trace: dict[str, Any], names: dict[str, str]) -> None:
    if trace.get("x") or trace.get("z"):
        data.append(trace | {"xaxis": names["x"], "yaxis": names["y"]})


def _text(text: str, x: float, y: float, xanchor: str, yanchor: str, **more: Any) -> dict[str, Any]:
    found = {"text": _escaped(text).replace("\n", "<br>"), "x": x, "y": y, "xanchor": xanchor, "yanchor": yanchor}
    return found | {"xref": "paper", "yref": "paper", "showarrow": False} | more


def _markup(data: list[dict[str, Any]], layout: dict[str, Any]) -> Markup:
    layout = {
        "template": {},
        "dragmode": False,
        "showlegend": False,
        "font": {"family": _FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",  # that of the page
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": "#ffffff", "font": {"color": INK}},
    } | layout
    text = json.dumps({"data": data, "layout": layout}, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(
        f'<div class="plotly-graph-div" aria-busy="true" style="height:{layout["height"]}px">'
        f'<script type="application/json">{text}</script></div>'
    )


def _escaped(text: str) -> str:
    """Text that plotly shows as it is, instead of reading it as HTML."""
    return escape(text, quote=False)


def _escaped_with_breaks(text: str) -> str:
    """Text that plotly shows as it is, with breaks of lines."""
    return "<br>".join(map(_escaped, text.split("<br>")))
