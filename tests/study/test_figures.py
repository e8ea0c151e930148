from dataclasses import replace

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from expressive_attention.study.figures import (
    accuracy_figure,
    difference_figure,
    ladder,
    learning_figure,
    save_figures,
    solved_figure,
    steps_figure,
    styles,
    wrap,
)
from expressive_attention.study.statistics import comparisons, summaries

from .report_data import LADDER, MECHANISMS, make_condition, make_results, results_of, seed_row

NAMES = {"accuracy", "solved", "difference", "learning_curves", "steps_to_solve"}


def luminance(color):
    """Relative luminance (WCAG 2)."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def points_of(line):
    return np.round(np.asarray(line.get_xydata(), dtype=float), 9).tolist()


def drawn(ax):
    """Different points of all lines on the axes."""
    return {(x, y) for line in ax.lines for x, y in points_of(line)}


def lines_of(ax, style, width):
    return [line for line in ax.lines if line.get_color() == style.color and line.get_linewidth() == width]


def test_mechanisms_differ_without_color():
    ours, theirs = styles(["expressive", "dot_product"]).values()
    assert ours.marker != theirs.marker
    assert ours.line != theirs.line
    assert ours.dash != theirs.dash
    # a filled and an open marker, three times as far apart in grey as WCAG asks of neighboring colors
    assert (luminance(theirs.fill) + 0.05) / (luminance(ours.fill) + 0.05) > 4.5


def test_style_of_a_mechanism_does_not_depend_on_the_others():
    alone, beside = styles(["dot_product"]), styles(["squared", "dot_product"])
    assert alone["dot_product"] == beside["dot_product"]
    assert len({style.marker for style in styles(["expressive", "dot_product", "squared"]).values()}) == 3


def test_ladder_keeps_tasks_of_equal_complexity_and_models_apart():
    layout = ladder(make_results(((4, 10, "rope"), (16, 5, "rope"), (2, 5, "learned"), (16, 5, "learned"))))
    assert layout.tasks == (
        ("basis 2", "delay 5", "5 bits"),
        ("basis 4", "delay 10", "20 bits"),
        ("basis 16", "delay 5", "20 bits"),
    )
    assert [panel.title for panel in layout.panels] == ["position rope", "position learned"]
    assert [[column for column, _ in panel.conditions] for panel in layout.panels] == [[1, 2], [0, 2]]


def test_ladder_of_one_condition_is_named_by_its_label():
    layout = ladder(make_results([(16, 5, "rope")]))
    assert layout.tasks == (("sum, basis 16, delay 5, rope", "20 bits"),)
    assert [panel.title for panel in layout.panels] == [""]


def test_labels_break_after_commas_only():
    assert wrap("sum, basis 16, delay 5, rope", 16) == ["sum, basis\u00a016,", "delay\u00a05, rope"]


def test_accuracy_figure_shows_seeds_means_and_chance():
    condition = make_condition(16, 5, "rope")
    rows = [seed_row(condition.label, "expressive", seed, value) for seed, value in enumerate((0.5, 0.75))]
    figure = accuracy_figure(results_of(rows, [condition]))
    heights = sorted(y for _, y in drawn(figure.axes[0]))
    assert heights == pytest.approx(sorted([0.5, 0.75, 0.625, 1 / 16, 1 / 16 + 0.004, 1 / 16 - 0.003]))


def test_solved_figure_shows_shares_and_wilson_intervals():
    results = make_results()
    points = [x for x, _ in drawn(solved_figure(results).axes[0])]
    for summary in summaries(results):
        for x in (summary.solved / summary.seeds, summary.solved_interval.low, summary.solved_interval.high):
            assert round(x, 9) in points


def test_difference_figure_shows_every_pair_and_the_interval():
    results = make_results()
    points = [x for x, _ in drawn(difference_figure(results).axes[0])]
    for comparison in comparisons(results):
        assert comparison.interval is not None
        ends = (comparison.interval.low, comparison.interval.high)
        for x in (*comparison.differences, comparison.difference, *ends):
            assert round(x, 9) in points


def test_difference_figure_needs_two_mechanisms():
    with pytest.raises(ValueError, match="no condition has finished seeds of two mechanisms"):
        difference_figure(make_results(mechanisms=["expressive"]))


def test_learning_figure_shows_each_seed_and_the_median():
    results = make_results(seeds=3)
    condition = results.conditions[1]
    (ax,) = learning_figure(results, [condition]).axes
    for mechanism, style in styles(MECHANISMS).items():
        rows = results.curves.filter(role="final", condition=condition.label, mechanism=mechanism)
        by_seed = [seed.sort("step")["accuracy"].to_numpy() for seed in rows.partition_by("seed")]
        thin = [np.asarray(line.get_ydata()) for line in lines_of(ax, style, 0.5)]
        np.testing.assert_array_equal(np.sort(thin, axis=0), np.sort(by_seed, axis=0))
        (thick,) = lines_of(ax, style, 2)
        np.testing.assert_allclose(np.asarray(thick.get_ydata()), np.median(by_seed, axis=0))


def test_steps_figure_ends_at_the_share_solved():
    results = make_results()
    axes = steps_figure(results, results.conditions).axes
    assert len(axes) == 3
    for summary in summaries(results):
        ax = axes[[condition.label for condition in results.conditions].index(summary.condition)]
        (line,) = lines_of(ax, styles(MECHANISMS)[summary.mechanism], 2)
        assert points_of(line)[-1] == [summary.steps, summary.solved / summary.seeds]


@pytest.mark.parametrize("draw", [accuracy_figure, solved_figure, difference_figure])
@pytest.mark.parametrize("grid", [LADDER[:1], LADDER], ids=["1 condition", "20 conditions"])
def test_no_text_is_cut(draw, grid):
    figure = draw(make_results(grid, seeds=8))
    figure.draw_without_rendering()
    used, canvas = figure.get_tightbbox(), figure.bbox_inches
    assert canvas.x0 <= used.x0 < used.x1 <= canvas.x1
    assert canvas.y0 <= used.y0 < used.y1 <= canvas.y1


@pytest.mark.parametrize(
    ("results", "names"),
    [
        (make_results(), NAMES),
        (make_results(seeds=1), NAMES),
        (make_results(mechanisms=["expressive"]), NAMES - {"difference"}),
        (make_results(mechanisms=["expressive", "dot_product", "squared"], seeds=6), NAMES),
        (make_results(seeds=0), set()),
    ],
    ids=["whole", "one seed", "one mechanism", "three mechanisms", "no final seed"],
)
def test_save_figures(results, names, tmp_path):
    paths = save_figures(results, tmp_path / "figures")
    assert paths == {name: tmp_path / "figures" / f"{name}.png" for name in names}
    assert set((tmp_path / "figures").glob("*")) == set(paths.values())
    for path in paths.values():
        assert imread(path).std() > 0.05


def test_unfinished_mechanism_leaves_a_gap(tmp_path):
    whole = make_results()
    lacking = (pl.col("mechanism") == "dot_product") & (pl.col("condition") == whole.conditions[0].label)
    results = replace(whole, seeds=whole.seeds.filter(~lacking), curves=whole.curves.filter(~lacking))
    assert set(save_figures(results, tmp_path)) == NAMES
    labels = [tick.get_text() for tick in difference_figure(results).axes[0].get_yticklabels()]
    assert len(labels) == 2


def test_settings_of_the_caller_are_neither_used_nor_changed():
    with mpl.rc_context({"font.size": 40, "lines.linewidth": 9}):
        before = dict(mpl.rcParams)
        figure = solved_figure(make_results())
        assert dict(mpl.rcParams) == before
    assert max(float(text.get_fontsize()) for text in figure.findobj(Text) if text.get_text()) < 12
