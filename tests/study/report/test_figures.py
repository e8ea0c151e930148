import json
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from expressive_attention.study.analysis.comparisons import comparisons
from expressive_attention.study.analysis.summaries import summaries
from expressive_attention.study.analysis.wording import mechanism_name
from expressive_attention.study.report.attention import AttentionMap
from expressive_attention.study.report.drawing.description import Axis, Note, Points
from expressive_attention.study.report.drawing.layout import ladder, most_different, narrowed
from expressive_attention.study.report.drawing.theme import MEAN, SEED, readable_on, styles, wrap
from expressive_attention.study.report.drawing.with_matplotlib import image
from expressive_attention.study.report.drawing.with_plotly import plot
from expressive_attention.study.report.figure import Material
from expressive_attention.study.report.figures import FIGURES
from expressive_attention.study.report.files import drawings_of
from expressive_attention.study.report.files import save_figures as save
from expressive_attention.study.report.parts import condition_rows

from ..report_data import LADDER, MECHANISMS, make_condition, make_results, mixed_results, results_of, seed_row
from ..tiny import tiny_config

COMPARED = {"difference", "margin_map"}
NAMES = {"at_a_glance", "accuracy", "solved", "solved_map", "learning_curves", "steps_to_solve"} | COMPARED


def draw(name, results, maps=()):
    """A figure as it is on paper."""
    return image(FIGURES[name].draw(Material(results, maps)))


def save_figures(results, directory):
    material = Material(results)
    return save(drawings_of(material), material, directory)


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


@pytest.mark.parametrize(
    ("positions", "models"), [(("rope",), [""]), (("rope", "learned"), ["position rope", "position learned"])]
)
def test_ladder_of_one_task_is_named_by_the_task_and_not_by_a_condition(positions, models):
    layout = ladder(make_results([(16, 5, position) for position in positions]))
    assert layout.tasks == (("sum, basis 16, delay 5", "20 bits"),)
    assert [panel.title for panel in layout.panels] == models


def test_conditions_have_the_names_of_their_tasks():
    (condition,) = tiny_config().conditions()
    assert (condition.task_label, condition.label) == ("sum, basis 4, delay 2", "sum, basis 4, delay 2, rope")


def test_ladder_names_mixed_tasks_by_what_tells_them_apart():
    plain = make_condition(4, 10, "rope")
    mixed = {"kind": "multi", "operations": ("sum",), "basis": 4, "delays": (2, 3), "context": 10}
    others = replace(plain, label="mixed", task=mixed, facts=plain.facts | {"complexity": 6.3})
    assert ladder(results_of([], [plain, others])).tasks == (
        ("delays 2 3", "6.3 bits"),
        ("delay 10", "20 bits"),
    )


def test_most_different_conditions_keep_the_order_of_the_study():
    grid = ((2, 5, "rope"), (4, 5, "rope"), (8, 5, "rope"))
    conditions = [make_condition(*point) for point in grid]
    rows = [
        seed_row(condition.label, mechanism, 0, accuracy)
        for condition, ours in zip(conditions, (0.5, 0.6, 0.2), strict=True)
        for mechanism, accuracy in {"expressive": ours, "dot_product": 0.55}.items()
    ]
    results = results_of(rows, conditions)
    assert most_different(results, 2) == [conditions[0], conditions[2]]
    assert narrowed(results, 2).conditions == [conditions[0], conditions[2]]
    assert narrowed(results, 3) is results


def test_text_on_a_color_has_the_contrast_of_wcag():
    for color in ("#0072B2", "#1a6e52", "#ffffff", "#d9e9f3", "#D55E00"):
        light, dark = sorted([luminance(color), luminance(readable_on(color))], reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 3.9


def numbers_in(ax):
    """Text of each cell of a map, by column and row."""
    return {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts}


def test_margin_map_shows_the_difference_and_who_is_ahead():
    results = make_results(LADDER, seeds=16)
    (ax,) = draw("margin_map", results).axes
    layout, texts = ladder(results), numbers_in(ax)
    values = np.asarray(ax.images[0].get_array())
    by_label = {comparison.condition: comparison for comparison in comparisons(results)}
    for row, panel in enumerate(layout.panels):
        for column, condition in panel.conditions:
            found = by_label[condition.label]
            assert values[row, column] == found.difference
            assert texts[column, row] == f"{found.difference:+.2f}{'*' if found.leader else ''}"
    assert {text[-1] == "*" for text in texts.values()} == {True, False}
    low, high = ax.images[0].get_clim()
    assert low == -high == -max(abs(found.difference) for found in by_label.values())


def test_marks_of_a_narrowed_map_are_those_of_the_whole_study():
    grid = [(basis, delay, "rope") for basis in range(2, 10) for delay in range(2, 11)]
    results = make_results(grid, seeds=16)  # 72 conditions, of which 40 are shown
    (ax,) = draw("margin_map", results).axes
    ahead = {found.condition for found in comparisons(results) if found.leader}
    layout = ladder(narrowed(results))
    marked = {position for position, text in numbers_in(ax).items() if text.endswith("*")}
    assert len(layout.tasks) == 40
    assert marked
    assert len(marked) < len([found for found in comparisons(narrowed(results)) if found.leader])  # adjusted for fewer
    assert marked == {(column, 0) for column, shown in layout.panels[0].conditions if shown.label in ahead}


def test_solved_map_shows_counts_and_leaves_gaps():
    grid = ((2, 5, "rope"), (4, 5, "rope"), (4, 5, "learned"))
    results = make_results(grid, seeds=4)
    figure = draw("solved_map", results)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["EA", "DPA"]
    for ax, mechanism in zip(figure.axes, MECHANISMS, strict=True):
        found = {each.condition: each for each in summaries(results) if each.mechanism == mechanism}
        places = {(0, 0): grid[0], (1, 0): grid[1], (1, 1): grid[2]}
        expected = {place: found[make_condition(*point).label] for place, point in places.items()}
        assert numbers_in(ax) == {place: f"{each.solved}/4" for place, each in expected.items()}
        values = np.ma.filled(ax.images[0].get_array(), np.nan)
        assert np.isnan(values[1, 0])
        assert all(values[row, column] == each.solved / 4 for (column, row), each in expected.items())


def test_splits_figure_shows_means_extremes_and_the_best_predictor():
    results = mixed_results()
    axes = draw("splits", results).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["mixed\nBy position", "mixed\nBy rule"]
    for ax in axes:
        ours, theirs = (styles(MECHANISMS)[mechanism].color for mechanism in MECHANISMS)
        heights = {
            color: {y for line in ax.lines if line.get_color() == color for _, y in points_of(line)}
            for color in (ours, theirs)
        }
        assert heights[ours] == {0.5, 0.6, 0.7}  # lowest seed, mean, highest seed
        assert heights[theirs] == {0.4, 0.5, 0.6}
        assert 0.9 in {y for _, y in drawn(ax)}


def test_attention_figure_shows_the_weights():
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    maps = [AttentionMap("a, b", "expressive", 3, "worst", 0.5, 0, weights)]
    (ax,) = draw("attention_maps", make_results(seeds=1), maps).axes
    np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), weights.numpy())
    assert ax.get_title(loc="left") == "a, b\nEA, worst seed: 3\naccuracy 0.500, layer 1"


def table(results, directory, name):
    return pl.read_csv(save_figures(results, directory)[name].with_suffix(".csv"))


def test_numbers_beside_a_figure_are_those_it_shows(tmp_path):
    results = make_results()
    save_figures(results, tmp_path)
    read = {path.stem: pl.read_csv(path) for path in tmp_path.glob("*.csv")}

    def shown(name, *columns):
        values = (value for column in columns for value in read[name][column].drop_nulls())
        return {round(value, 9) for value in values}

    def heights(figure, axis):
        return {point[axis] for ax in figure.axes for point in drawn(ax)}

    accuracies = shown("accuracy", "accuracy", "low", "high")
    assert accuracies == heights(draw("accuracy", results), 1) - {0.0, 1.0} | accuracies & {0.0, 1.0}
    assert shown("difference", "difference", "low", "high") | {0.0} == heights(draw("difference", results), 0) - {1.0}
    edges = {0.0, 1.0}
    assert shown("solved", "share", "low", "high") - edges == heights(draw("solved", results), 0) - edges
    chances = {round(condition.facts["chance"], 9) for condition in results.conditions}
    curves = shown("learning_curves", "accuracy")
    assert curves | chances == heights(draw("learning_curves", results), 1) | chances
    steps = {(step, round(share, 9)) for step, share in read["steps_to_solve"].select("step", "share").iter_rows()}
    assert steps == set().union(*map(drawn, draw("steps_to_solve", results).axes))


def test_numbers_beside_the_maps(tmp_path):
    results = make_results(LADDER[:4], seeds=8)
    margins = table(results, tmp_path, "margin_map")
    for row, found in zip(margins.iter_rows(named=True), comparisons(results), strict=True):
        assert (row["condition"], row["difference"], row["ahead"]) == (found.condition, found.difference, found.leader)
        assert row["pairs"] == 8
    solved = table(results, tmp_path, "solved_map")
    for row, found in zip(solved.iter_rows(named=True), summaries(results), strict=True):
        assert (row["condition"], row["mechanism"], row["solved"]) == (found.condition, found.mechanism, found.solved)
        assert mechanism_name(row["mechanism"]) in ("EA", "DPA")


def test_a_split_that_is_not_by_position_is_in_sight_alone():
    """As of text, whose positions are split by the bytes read."""
    results = mixed_results()
    alone = results.splits.filter((pl.col("condition") == "mixed") & (pl.col("split") == "rule"))
    axes = draw("splits", replace(results, splits=alone)).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["mixed\nBy rule"]


def test_numbers_beside_the_splits_are_of_all_conditions(tmp_path):
    rows = table(mixed_results(), tmp_path, "splits")
    assert rows["condition"].unique().sort().to_list() == ["mixed", "plain"]
    ours = rows.filter(condition="mixed", mechanism="expressive", split="rule", group=3).row(0, named=True)
    assert ours == {
        "condition": "mixed", "mechanism": "expressive", "split": "rule", "group": 3, "name": "rule 3", "count": 8,
        "seeds": 3, "accuracy": pytest.approx(0.6), "lowest": 0.5, "highest": 0.7, "ceiling": 0.9,
    }  # fmt: skip


def test_a_ceiling_below_one_is_marked_and_others_are_not():
    ceilings = (0.75, 1.0)
    plain = make_condition(16, 5, "rope")
    for ceiling in ceilings:
        condition = replace(plain, facts=plain.facts | {"ceiling": ceiling})
        figure = draw("accuracy", results_of([seed_row(plain.label, "expressive", 0, 0.5)], [condition]))
        heights = {y for _, y in drawn(figure.axes[0])}
        assert (ceiling in heights) == (ceiling < 1)


def test_labels_break_after_commas_only():
    assert wrap("sum, basis 16, delay 5, rope", 16) == ["sum, basis\u00a016,", "delay\u00a05, rope"]


@pytest.mark.parametrize(
    ("labels", "shared", "names"),
    [
        (["sum, basis 4, rope", "sum, basis 8, rope"], "sum, rope", [["basis\u00a04"], ["basis\u00a08"]]),
        (["sum, rope", "sum, rope, heads 2"], "", [["sum, rope"], ["sum, rope, heads\u00a02"]]),
        (["a task"], "", [["a\u00a0task"]]),
    ],
)
def test_rows_are_named_by_how_conditions_differ(labels, shared, names):
    panel = condition_rows(labels, Axis("share", (0, 1)), [], ["expressive"])
    assert (panel.y.label, panel.y.ticks) == (shared, names)


def test_a_long_common_name_has_lines_that_fit_beside_its_rows():
    """The name "mixed sum, basis 16, context 20, rope" of four conditions was cut off at the top."""
    labels = [f"mixed sum, basis 16, {own}, context 20, rope" for own in ("delays 4 5", "delays 5 6")]
    panel = condition_rows(labels, Axis("share", (0, 1)), [], ["expressive"])
    lines = panel.y.label.split("\n")
    assert (
        ", ".join(line.rstrip(",") for line in lines).replace("\u00a0", " ") == "mixed sum, basis 16, context 20, rope"
    )
    assert len(lines) == 2
    assert max(map(len, lines)) <= 20
    content = json.loads(str(plot([panel])).partition('json">')[2].partition("</script>")[0])
    assert content["layout"]["yaxis"]["title"]["text"] == "<br>".join(lines)


@pytest.mark.parametrize("mechanisms", [MECHANISMS[:2], MECHANISMS[:4], MECHANISMS])
def test_mechanisms_of_a_row_keep_apart(mechanisms):
    results = make_results(mechanisms=mechanisms)
    (counts,) = FIGURES["solved"].draw(Material(results)).panels
    inches = counts.height / len(results.conditions)
    at = sorted(part.y for part in counts.parts if isinstance(part, Note))
    assert len(at) == len(results.conditions) * len(mechanisms)
    assert min(np.diff(at)) * inches > 0.12  # a line of text

    (differences,) = FIGURES["difference"].draw(Material(results)).panels
    marks = [part for part in differences.parts if isinstance(part, Points)]
    means = sorted(y for part in marks if part.size == MEAN for y in part.y)
    for part in marks:
        if part.size == SEED:  # each lies below the mean of its own mechanism, above that of the next
            own = next(other for other in marks if other.size == MEAN and other.style == part.style)
            assert {max(mean for mean in means if mean < y) for y in part.y} == set(own.y)


def test_accuracy_figure_shows_seeds_means_and_chance():
    condition = make_condition(16, 5, "rope")
    rows = [seed_row(condition.label, "expressive", seed, value) for seed, value in enumerate((0.5, 0.75))]
    figure = draw("accuracy", results_of(rows, [condition]))
    heights = sorted(y for _, y in drawn(figure.axes[0]))
    assert heights == pytest.approx(sorted([0.5, 0.75, 0.625, 1 / 16, 1 / 16 + 0.004, 1 / 16 - 0.003]))


def test_solved_figure_shows_shares_and_wilson_intervals():
    results = make_results()
    points = [x for x, _ in drawn(draw("solved", results).axes[0])]
    for summary in summaries(results):
        for x in (summary.solved / summary.seeds, summary.solved_interval.low, summary.solved_interval.high):
            assert round(x, 9) in points


def test_difference_figure_shows_every_pair_and_the_interval():
    results = make_results()
    points = [x for x, _ in drawn(draw("difference", results).axes[0])]
    for comparison in comparisons(results):
        assert comparison.interval is not None
        ends = (comparison.interval.low, comparison.interval.high)
        for x in (*comparison.differences, comparison.difference, *ends):
            assert round(x, 9) in points


def test_difference_figure_needs_two_mechanisms():
    material = Material(make_results(mechanisms=["expressive"]))
    assert FIGURES["difference"].draw(material) is FIGURES["margin_map"].draw(material) is None


def test_only_seeds_of_protocol_2_end_early():
    results = make_results(seeds=2)
    notes = [FIGURES["learning_curves"].draw(Material(replace(results, protocol=protocol))).note for protocol in (2, 3)]
    assert ["A seed ends when it has solved" in note for note in notes] == [True, False]


def test_learning_figure_shows_each_seed_and_the_median():
    results = make_results(seeds=3)
    condition = results.conditions[1]
    ax = draw("learning_curves", results).axes[1]
    for mechanism, style in styles(MECHANISMS).items():
        rows = results.curves.filter(role="final", condition=condition.label, mechanism=mechanism)
        by_seed = [seed.sort("step")["accuracy"].to_numpy() for seed in rows.partition_by("seed")]
        thin = [np.asarray(line.get_ydata()) for line in lines_of(ax, style, 0.5)]
        np.testing.assert_array_equal(np.sort(thin, axis=0), np.sort(by_seed, axis=0))
        (thick,) = lines_of(ax, style, 2)
        np.testing.assert_allclose(np.asarray(thick.get_ydata()), np.median(by_seed, axis=0))


def test_steps_figure_ends_at_the_share_solved():
    results = make_results()
    axes = draw("steps_to_solve", results).axes
    assert len(axes) == 3
    for summary in summaries(results):
        ax = axes[[condition.label for condition in results.conditions].index(summary.condition)]
        (line,) = lines_of(ax, styles(MECHANISMS)[summary.mechanism], 2)
        assert points_of(line)[-1] == [summary.steps, summary.solved / summary.seeds]


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("grid", [LADDER[:1], LADDER], ids=["1 condition", "20 conditions"])
def test_no_text_is_cut(name, grid):
    figure = draw(name, make_results(grid, seeds=8))
    figure.draw_without_rendering()
    used, canvas = figure.get_tightbbox(), figure.bbox_inches
    assert canvas.x0 <= used.x0 < used.x1 <= canvas.x1
    assert canvas.y0 <= used.y0 < used.y1 <= canvas.y1


@pytest.mark.parametrize(
    ("results", "names"),
    [
        (make_results(), NAMES),
        (make_results(seeds=1), NAMES),
        (make_results(mechanisms=["expressive"]), NAMES - COMPARED),
        (make_results(mechanisms=["expressive", "dot_product", "squared"], seeds=6), NAMES),
        (make_results(seeds=0), set()),
    ],
    ids=["whole", "one seed", "one mechanism", "three mechanisms", "no final seed"],
)
@pytest.mark.pictures
def test_save_figures(results, names, tmp_path):
    paths = save_figures(results, tmp_path / "figures")
    assert paths == {name: tmp_path / "figures" / f"{name}.png" for name in names}
    numbers = {path.with_suffix(".csv") for path in paths.values()}
    assert set((tmp_path / "figures").glob("*")) == {*paths.values(), *numbers}
    for path in paths.values():
        assert imread(path).std() > 0.05


def test_unfinished_mechanism_leaves_a_gap(tmp_path):
    whole = make_results()
    lacking = (pl.col("mechanism") == "dot_product") & (pl.col("condition") == whole.conditions[0].label)
    results = replace(whole, seeds=whole.seeds.filter(~lacking), curves=whole.curves.filter(~lacking))
    assert set(save_figures(results, tmp_path)) == NAMES
    labels = [tick.get_text() for tick in draw("difference", results).axes[0].get_yticklabels()]
    assert len(labels) == 2


def test_settings_of_the_caller_are_neither_used_nor_changed():
    with mpl.rc_context({"font.size": 40, "lines.linewidth": 9}):
        before = dict(mpl.rcParams)
        figure = draw("solved", make_results())
        assert dict(mpl.rcParams) == before
    assert max(float(text.get_fontsize()) for text in figure.findobj(Text) if text.get_text()) < 12
