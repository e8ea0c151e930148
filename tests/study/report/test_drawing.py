"""A file and the page draw one description: the same numbers at the same places, and the same words."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from expressive_attention.study.report.attention import AttentionMap
from expressive_attention.study.report.drawing.description import Axis, Cells, Curves, Drawing, Group, Note, Panel, Rule
from expressive_attention.study.report.drawing.theme import styles
from expressive_attention.study.report.drawing.with_matplotlib import image
from expressive_attention.study.report.drawing.with_plotly import plot
from expressive_attention.study.report.figure import Material
from expressive_attention.study.report.figures import FIGURES

from ..report_data import LADDER, make_results, mixed_results

MAP = AttentionMap("plain", "expressive", 3, "worst", 0.5, 0, torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
STYLE = styles(["expressive"])["expressive"]


def content(panels, **options):
    """The JSON that the page has for some panels."""
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', str(plot(panels, **options)))
    return json.loads(text)


def points_in_file(axes):
    found = set()
    for line in axes.lines:
        found |= {tuple(point) for point in np.round(np.asarray(line.get_xydata(), dtype=float), 4)}
    return found


def points_on_page(trace):
    """Marks of a trace, and the ends of their bars."""
    marks = [(x, y) for x, y in zip(trace["x"], trace["y"], strict=True) if x is not None and y is not None]
    for axis in ("x", "y"):
        bars = trace.get(f"error_{axis}")
        for (x, y), up, down in zip(marks[:], bars["array"], bars["arrayminus"], strict=True) if bars else ():
            ends = ((x + up, y), (x - down, y)) if axis == "x" else ((x, y + up), (x, y - down))
            marks += ends if up or down else ()
    return {tuple(point) for point in np.round(np.array(marks, dtype=float), 4)}


@pytest.mark.parametrize("name", FIGURES)
def test_the_page_shows_what_the_file_shows(name):
    results = mixed_results() if name in ("splits", "attention_maps") else make_results(LADDER[:4], seeds=8)
    drawing = FIGURES[name].draw(Material(results, [MAP]))
    assert drawing is not None
    axes = image(drawing).axes
    assert len(axes) == len(drawing.panels) > 0
    plots = [content(drawing.panels)] if drawing.stacked else [content([panel]) for panel in drawing.panels]
    for index, (ax, panel) in enumerate(zip(axes, drawing.panels, strict=True)):
        page = plots[0] if drawing.stacked else plots[index]
        suffix = str(index + 1) if drawing.stacked and index else ""
        traces = [trace for trace in page["data"] if trace["xaxis"] == f"x{suffix}"]
        maps = [trace for trace in traces if trace.get("type") == "heatmap"]
        found = set().union(*(points_on_page(trace) for trace in traces if trace not in maps))
        rules = [part for part in panel.parts if isinstance(part, Rule)]
        assert found <= points_in_file(ax)
        assert len(found) >= len(points_in_file(ax)) - 2 * len(rules)
        for trace, picture in zip(maps, ax.images, strict=True):
            values = np.ma.filled(np.ma.asarray(picture.get_array(), dtype=float), np.nan)
            np.testing.assert_allclose(np.array(trace["z"], dtype=float), values, atol=1e-5)
            assert (trace["zmin"], trace["zmax"]) == picture.get_clim()
        assert page["layout"][f"xaxis{suffix}"]["range"] == pytest.approx(ax.get_xlim())
        assert page["layout"][f"yaxis{suffix}"]["range"] == pytest.approx(ax.get_ylim())
        assert page["layout"][f"yaxis{suffix}"]["title"]["text"] == panel.y.label
        shapes = [shape for shape in page["layout"]["shapes"] if f"x{suffix}" in (shape["xref"], shape["xref"][:-7])]
        assert len(shapes) == len(rules)
        texts = {text["text"] for text in page["layout"]["annotations"]}
        for note in (part.text for part in panel.parts if isinstance(part, Note)):
            assert not note or note.replace("\n", "<br>") in texts
            assert note in {text.get_text() for text in ax.texts} | {ax.get_title("left"), ax.get_title("right")}


def test_figures_have_places_of_their_own():
    orders = [figure.order for figure in FIGURES.values()]
    assert orders == sorted(set(orders))


def panel_of(*parts, title="a < b"):
    return Panel(title, Axis("x", (0, 2)), Axis("y", (0, 1)), parts, height=1.0)


def test_the_plots_of_a_stack_are_above_each_other_with_their_titles():
    layout = content([panel_of(title="first"), panel_of(title="second"), panel_of(title="")])["layout"]
    ends = [layout[name]["domain"] for name in ("yaxis", "yaxis2", "yaxis3")]
    assert ends[0][1] == 1
    assert ends[2][0] == pytest.approx(0)
    assert all(above[0] > below[1] for above, below in itertools.pairwise(ends))
    assert [text["text"] for text in layout["annotations"]] == ["first", "second"]
    assert [layout[name].get("matches") for name in ("xaxis", "xaxis2", "xaxis3")] == ["x3", "x3", None]


def test_values_that_are_not_numbers_leave_gaps():
    curve = Curves([([0, 1, 2], [0.1, float("nan"), 0.3]), ([0, 1], [0.2, 0.4])], STYLE, width=2)
    (trace,) = content([panel_of(curve)])["data"]
    assert (trace["x"], trace["y"]) == ([0, 1, 2, None, 0, 1, None], [0.1, None, 0.3, None, 0.2, 0.4, None])
    cells = Cells([[float("nan"), 0.5]], ("#ffffff", "#000000"), (0.0, 1.0))
    (trace,) = content([panel_of(cells)])["data"]
    assert trace["z"] == [[None, 0.5]]


def test_texts_are_shown_as_they_are():
    panel = replace(panel_of(Note("<i>p</i>", "inside")), x=Axis("<b>x</b>", (-0.5, 0.5), [["<u>tick</u>", "&"]]))
    layout = content([panel])["layout"]
    assert layout["annotations"][0]["text"] == "&lt;i&gt;p&lt;/i&gt;"
    assert layout["annotations"][1]["text"] == "a &lt; b"
    assert layout["xaxis"]["title"]["text"] == "&lt;b&gt;x&lt;/b&gt;"
    assert layout["xaxis"]["ticktext"] == ["&lt;u&gt;tick&lt;/u&gt;<br>&amp;"]
    assert content([panel], titled=False)["layout"]["annotations"] == layout["annotations"][:1]
    figure = image(Drawing("", "", [Group("", [panel])], stacked=True))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["<u>tick</u>\n&"]


@pytest.mark.parametrize("count", [2, 12])
def test_the_key_has_room_for_many_mechanisms(count):
    """The last five of twelve were cut, and the predictors."""
    drawing = FIGURES["accuracy"].draw(Material(make_results(LADDER[:4], seeds=8)))
    names = [f"softmax of {number}" for number in range(count)]
    figure = image(replace(drawing, key=[(STYLE, name) for name in names]))
    figure.draw_without_rendering()
    (key,) = figure.legends
    assert [text.get_text() for text in key.texts][:count] == names
    assert len(key.texts) > count
    box = key.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y0 >= max(axes.get_window_extent().y1 for axes in figure.axes)
