from dataclasses import replace

import polars as pl
import pytest
from scipy import stats

from expressive_attention.study.results import CURVE_SCHEMA
from expressive_attention.study.statistics import (
    comparisons,
    findings,
    mean_interval,
    mechanism_name,
    median_curve,
    median_steps,
    solve_curve,
    summaries,
    tuning_summaries,
    wilson_interval,
)

from .report_data import make_condition, make_results, results_of, seed_row

ROPE = make_condition(16, 5, "rope")
LEARNED = make_condition(16, 5, "learned")


def rows_of(condition, mechanism, accuracies, **changes):
    return [seed_row(condition.label, mechanism, i, value, **changes) for i, value in enumerate(accuracies)]


def paired(ours, theirs):
    return results_of([*rows_of(ROPE, "expressive", ours), *rows_of(ROPE, "dot_product", theirs)], [ROPE], curves=[])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # p = 1 and p = 0: the ends are n / (n + z^2) and z^2 / (n + z^2), z^2 = 3.8414588
        (8, 8, 8 / 11.8414588, 1.0),
        (0, 8, 0.0, 3.8414588 / 11.8414588),
        # (p + z^2 / 2n -+ z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2 / n) by hand
        (2, 8, 0.0714792, 0.5907246),
        (15, 16, 0.7167126, 0.9888807),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    interval = wilson_interval(successes, trials)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_interval_refuses(successes, trials):
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize("n", [8, 16, 64])
def test_mean_interval_of_normal_quantiles_is_the_t_interval(n):
    values = stats.norm.ppf([(i + 0.5) / n for i in range(n)]).tolist()
    half_width = stats.t.ppf(0.975, n - 1) * stats.tstd(values) / n**0.5
    interval = mean_interval(values)
    assert interval is not None
    assert interval.high == pytest.approx(half_width, rel=0.05)
    assert interval.low == pytest.approx(-half_width, rel=0.05)


def test_mean_interval_is_the_same_on_every_call_and_stays_in_range():
    values = [1.0, 1.0, 0.999, 0.45, 1.0, 0.8, 1.0, 0.62]
    interval = mean_interval(values)
    assert interval is not None
    assert interval == mean_interval(values)
    assert 0.45 < interval.low < sum(values) / 8 < interval.high <= 1.0


@pytest.mark.parametrize("values", [[0.7], [0.1, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5], [1.0] * 8, [0.1 + 0.2, *[0.3] * 7]])
def test_mean_interval_is_none_where_a_bootstrap_has_nothing_to_say(values):
    assert mean_interval(values) is None


@pytest.mark.parametrize(
    ("values", "message"), [([], "empty"), ([0.5, float("nan")], "not finite"), ([None, 0.5], "not finite")]
)
def test_mean_interval_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values)


@pytest.mark.parametrize(
    ("taken", "curve", "median"),
    [
        ([300, 500, None, 500], ([0, 300, 500, 2000], [0, 0.25, 0.75, 0.75]), 500),
        ([300, None, None, None], ([0, 300, 2000], [0, 0.25, 0.25]), None),
        ([300, None], ([0, 300, 2000], [0, 0.5, 0.5]), 300),
        ([None, None], ([0, 2000], [0, 0]), None),
        ([2000], ([0, 2000], [0, 1]), 2000),
    ],
)
def test_solve_curve(taken, curve, median):
    assert solve_curve(taken, 2000) == curve
    assert median_steps(taken, 2000) == median


@pytest.mark.parametrize(("taken", "message"), [([], "empty"), ([None, 2100], "2100, more than steps=2000")])
def test_solve_curve_refuses(taken, message):
    with pytest.raises(ValueError, match=message):
        solve_curve(taken, 2000)


def test_median_curve_keeps_the_last_accuracy_of_a_seed_that_ended():
    nan = float("nan")
    curves = {0: [0.1, 0.2, 0.3], 1: [0.1, 0.4, 0.9], 2: [0.2], 3: [0.3, nan, nan], 4: [0.5, 0.6, 0.7]}
    rows = [
        {"seed": seed, "step": 100 * (i + 1), "loss": 1.0, "accuracy": value}
        for seed, values in curves.items()
        for i, value in enumerate(values)
    ]
    # medians of .1 .1 .2 .3 .5, then .2 .4 .2 .3 .6, then .3 .9 .2 .3 .7
    median = median_curve(pl.DataFrame(rows[::-1], schema=CURVE_SCHEMA))
    assert median.to_dict(as_series=False) == {"step": [100, 200, 300], "accuracy": [0.2, 0.3, 0.3]}


def test_median_curve_refuses_no_rows():
    with pytest.raises(ValueError, match="no row"):
        median_curve(pl.DataFrame(schema=CURVE_SCHEMA))


def test_summary_of_final_seeds_alone():
    accuracies = [1.0, 0.998, 0.6, 1.0]
    rows = rows_of(ROPE, "expressive", accuracies, learning_rate=0.02)
    rows[1] |= {"steps_to_solve": 1500, "steps": 1700}
    rows[2] |= {"diverged_at": 300, "steps": 300}
    rows += rows_of(ROPE, "expressive", [0.1, 0.1], role="tuning", learning_rate=0.005)
    (summary,) = summaries(results_of(rows, [LEARNED, ROPE]))
    assert (summary.condition, summary.mechanism) == (ROPE.label, "expressive")
    assert (summary.learning_rate, summary.seeds, summary.solved, summary.diverged) == (0.02, 4, 3, 1)
    assert summary.accuracy == pytest.approx(0.8995)
    assert summary.accuracy_interval is None
    assert summary.solved_interval == wilson_interval(3, 4)
    assert summary.rollout_digits == pytest.approx(sum(value**5 for value in accuracies) / 4)
    assert summary.rollout_exact == pytest.approx(sum(value**10 for value in accuracies) / 4)
    assert (summary.median_steps, summary.steps) == (1000, 2000)


def test_summaries_refuse_what_is_not_a_number_and_say_where():
    rows = rows_of(ROPE, "dot_product", [0.5, float("nan")])
    with pytest.raises(ValueError, match="sum, basis 16, delay 5, rope, DPA: accuracy holds"):
        summaries(results_of(rows, [ROPE]))


def test_summaries_refuse_final_seeds_at_several_learning_rates():
    rows = [*rows_of(ROPE, "expressive", [0.5]), seed_row(ROPE.label, "expressive", 1, 0.5, learning_rate=0.02)]
    with pytest.raises(ValueError, match=r"several learning rates: \[0.01, 0.02\]"):
        summaries(results_of(rows, [ROPE]))


def test_comparison_is_over_shared_seeds():
    ours = [seed_row(ROPE.label, "expressive", seed, 0.9 + seed / 100) for seed in (3, 1, 2, 9)]
    theirs = [seed_row(ROPE.label, "dot_product", seed, 0.5) for seed in (1, 2, 3, 4)]
    (comparison,) = comparisons(results_of([*ours, *theirs], [ROPE]))
    assert comparison.seeds == (1, 2, 3)
    assert comparison.differences == pytest.approx((0.41, 0.42, 0.43))
    assert comparison.difference == pytest.approx(0.42)
    assert (comparison.candidate.seeds, comparison.baseline.seeds) == (3, 3)
    assert comparison.candidate.accuracy == pytest.approx(0.92)


STUCK = [0.61, 0.5, 0.7, 0.62, 0.58, 0.66, 0.71, 0.49]
FINE = [1.0, 0.999, 0.998, 1.0, 0.997, 1.0, 0.999, 0.996]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (FINE, STUCK, "EA ahead"),
        (STUCK, FINE, "DPA ahead"),
        (FINE, FINE[::-1], "no difference shown"),
        (FINE, FINE, "no difference shown"),
        # every pair has one sign, but five pairs do so by chance in 1 of 16 studies
        (FINE[:5], STUCK[:5], "no difference shown"),
        (FINE[:6], STUCK[:6], "EA ahead"),
        ([1.0], [0.1], "no difference shown"),
        # without spread there is no interval, and nothing left to doubt
        ([1.0] * 6, [0.5] * 6, "EA ahead"),
        ([0.5] * 6, [1.0] * 6, "DPA ahead"),
    ],
)
def test_verdict(ours, theirs, verdict):
    (comparison,) = comparisons(paired(ours, theirs))
    assert comparison.verdict == verdict


def test_no_interval_is_made_up():
    assert [found.interval for found in comparisons(paired([1.0] * 6, [0.5] * 6))] == [None]
    assert [found.interval for found in comparisons(paired([0.9], [0.5]))] == [None]


def test_findings_count_and_tell_every_condition():
    rows = [
        *rows_of(ROPE, "expressive", [1.0] * 6),
        *rows_of(ROPE, "dot_product", [0.5] * 6),
        *rows_of(LEARNED, "expressive", [0.25, 0.5], diverged_at=100),
        *rows_of(LEARNED, "dot_product", [1.0, 0.75]),
    ]
    unfinished = make_condition(2, 5, "rope")
    solved, accuracy, missing, learned, rope = findings(results_of(rows, [LEARNED, ROPE, unfinished]))
    assert solved == "On 1 of 2 conditions EA solved more seeds than DPA, on 1 fewer, on 0 equally many."
    assert accuracy == (
        "By the paired difference in accuracy EA is ahead on 1 of 2 conditions, DPA on 0; on 1 no difference is shown."
    )
    assert missing == "Not compared yet: 1 condition of 3, where EA and DPA have not both finished."
    assert learned == (
        "sum, basis 16, delay 5, learned: no difference shown. EA solved 0/2 seeds, mean accuracy 0.375 (no "
        "interval: fewer than 6 seeds), 2 diverged; DPA solved 1/2 seeds, mean accuracy 0.875 (no interval: "
        "fewer than 6 seeds). Paired difference -0.5000 (no interval: fewer than 6 seeds; 2 pairs)."
    )
    assert rope == (
        "sum, basis 16, delay 5, rope: EA ahead. EA solved 6/6 seeds, mean accuracy 1.000 (no interval: all "
        "equal); DPA solved 0/6 seeds, mean accuracy 0.500 (no interval: all equal). Paired difference +0.5000 "
        "(no interval: all equal; 6 pairs)."
    )


def test_findings_give_intervals():
    (comparison,) = comparisons(paired(FINE, STUCK))
    sentence = findings(paired(FINE, STUCK))[-1]
    assert f"(95% interval {comparison.interval:+.4f}; 8 pairs)" in sentence
    assert f"mean accuracy 0.609 (95% interval {comparison.baseline.accuracy_interval:.3f})" in sentence


def test_findings_of_one_mechanism():
    results = results_of(rows_of(ROPE, "expressive", [1.0]), [ROPE], ["expressive"])
    first, second = findings(results)
    assert first == "Only EA has finished seeds: there is nothing to compare it with yet."
    assert second == (
        "sum, basis 16, delay 5, rope: no comparison. EA solved 1/1 seeds, mean accuracy 1.000 (no interval: "
        "fewer than 6 seeds)."
    )


def test_findings_of_an_empty_study():
    assert findings(results_of([], [ROPE])) == ["No final seed has finished yet: there is nothing to report."]


def test_findings_without_shared_seeds():
    rows = [seed_row(ROPE.label, "expressive", 0, 1.0), seed_row(ROPE.label, "dot_product", 1, 0.5)]
    sentences = findings(results_of(rows, [ROPE]))
    assert sentences[0].startswith("EA and DPA have no seed in common on any condition")
    assert [sentence.count("no comparison") for sentence in sentences[1:]] == [1, 1]


def test_other_mechanisms_keep_their_names_and_are_compared_with_the_baseline():
    mechanisms = ["expressive", "squared", "dot_product"]
    rows = [row for mechanism in mechanisms for row in rows_of(ROPE, mechanism, [0.5, 0.6])]
    results = results_of(rows, [ROPE], mechanisms)
    found = [(each.candidate.mechanism, each.baseline.mechanism) for each in comparisons(results)]
    assert found == [("expressive", "dot_product"), ("squared", "dot_product")]
    assert mechanism_name("squared") == "z²"
    assert sum(sentence.startswith("On 0 of 1 condition z² solved") for sentence in findings(results)) == 1


def test_tuning_is_summarized_and_the_choice_marked():
    rows = [
        *rows_of(ROPE, "expressive", [0.5, 1.0], role="tuning", learning_rate=0.02),
        *rows_of(ROPE, "expressive", [0.5, 0.7], role="tuning", learning_rate=0.005),
        *rows_of(ROPE, "expressive", [1.0], learning_rate=0.02),
        *rows_of(ROPE, "dot_product", [0.3], role="tuning", learning_rate=0.01),
    ]
    found = [
        (each.mechanism, each.setting.learning_rate, each.seeds, each.solved, each.accuracy, each.chosen)
        for each in tuning_summaries(results_of(rows, [ROPE]))
    ]
    assert found == [
        ("expressive", 0.005, 2, 0, pytest.approx(0.6), False),
        ("expressive", 0.02, 2, 1, pytest.approx(0.75), True),
        ("dot_product", 0.01, 1, 0, pytest.approx(0.3), False),
    ]


def test_tuning_seeds_are_no_evidence():
    whole = make_results()
    tuning_alone = replace(whole, seeds=whole.seeds.filter(pl.col("role") == "tuning"))
    assert summaries(tuning_alone) == []
    assert comparisons(tuning_alone) == []
