from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from expressive_attention.study.analysis.comparisons import comparisons
from expressive_attention.study.analysis.estimators import wilson_interval
from expressive_attention.study.analysis.findings import findings, findings_by_condition
from expressive_attention.study.analysis.significance import holm, sign_flip_p
from expressive_attention.study.analysis.summaries import median_curve, summaries, tuning_summaries
from expressive_attention.study.analysis.survival import log_rank_p
from expressive_attention.study.analysis.wording import mechanism_name
from expressive_attention.study.training.result import CURVE_SCHEMA, EXAMPLE_SCHEMA

from ..report_data import KEY_SCHEMA, make_condition, make_results, results_of, seed_row

ROPE = make_condition(16, 5, "rope")
LEARNED = make_condition(16, 5, "learned")


def rows_of(condition, mechanism, accuracies, **changes):
    return [seed_row(condition.label, mechanism, i, value, **changes) for i, value in enumerate(accuracies)]


def paired(ours, theirs):
    return results_of([*rows_of(ROPE, "expressive", ours), *rows_of(ROPE, "dot_product", theirs)], [ROPE], curves=[])


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
    assert (summary.setting.learning_rate, summary.seeds, summary.solved, summary.diverged) == (0.02, 4, 3, 1)
    assert summary.accuracy == pytest.approx(0.8995)
    assert summary.accuracy_interval is None
    assert summary.solved_interval == wilson_interval(3, 4)
    assert summary.rollout_digits == pytest.approx(sum(value**5 for value in accuracies) / 4)
    assert summary.rollout_exact == pytest.approx(sum(value**10 for value in accuracies) / 4)
    assert (summary.median_steps, summary.steps) == (1000, 2000)
    assert summary.best_of_three == 1.0  # each choice of three has one of the best two


def test_seeds_that_all_diverged_count_with_all_steps():
    rows = rows_of(ROPE, "expressive", [0.1] * 6, steps=100, diverged_at=100)
    (summary,) = summaries(results_of(rows, [ROPE], steps=2000))
    assert (summary.median_steps, summary.restricted_steps, summary.steps) == (None, 2000, 2000)


def test_no_seed_is_the_best_without_validation():
    rows = rows_of(ROPE, "expressive", [0.1, 0.9, 0.9], validation=None)
    assert summaries(results_of(rows, [ROPE]))[0].best_of_three is None
    assert summaries(results_of(rows_of(ROPE, "expressive", [0.1, 0.9]), [ROPE]))[0].best_of_three is None


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
        (FINE[:5], STUCK[:5], "not counted"),
        (FINE[:6], STUCK[:6], "EA ahead"),
        ([1.0], [0.1], "not counted"),
        # without spread there is no interval, and nothing left to doubt
        ([1.0] * 6, [0.5] * 6, "EA ahead"),
        ([0.5] * 6, [1.0] * 6, "DPA ahead"),
        # certain, and smaller than the smallest effect
        ([0.99] * 6, [0.999] * 6, "no difference shown"),
        ([0.98] * 6, [0.99] * 6, "DPA ahead"),
        # chance is 1/16
        ([0.05, 0.06, 0.07] * 2, [0.06] * 6, "neither learned"),
        # a difference of two mechanisms that are no better than a guess is no lead
        ([0.06] * 6, [0.02] * 6, "neither learned"),
    ],
)
def test_verdict(ours, theirs, verdict):
    (comparison,) = comparisons(paired(ours, theirs))
    assert comparison.verdict == verdict


def test_the_number_of_conditions_decides_what_p_is_small_enough():
    # 6 pairs of one sign have p = 1/32: below 0.05 for one condition, not for two
    conditions = [make_condition(basis, 5, "rope") for basis in (4, 8, 16)]
    rows = [
        seed_row(condition.label, mechanism, seed, accuracy)
        for condition in conditions
        for seed in range(6 if condition is not conditions[2] else 5)
        for mechanism, accuracy in (("expressive", 1.0), ("dot_product", 0.5 + seed / 100))
    ]

    def tested(chosen):
        labels = {condition.label for condition in chosen}
        return comparisons(results_of([row for row in rows if row["condition"] in labels], chosen))

    assert [(found.p, found.leader) for found in tested(conditions[:1])] == [(1 / 32, "expressive")]
    # too few pairs: not tested, so that it takes nothing from the other
    assert [(found.p, found.leader) for found in tested(conditions[1:])] == [(1 / 32, "expressive"), (None, None)]
    assert [(found.p, found.leader) for found in tested(conditions)] == [(2 / 32, None)] * 2 + [(None, None)]


def test_p_is_adjusted_over_the_conditions_of_one_mechanism():
    mechanisms = ["expressive", "squared", "dot_product"]
    conditions = [ROPE, LEARNED]
    accuracies = {
        "expressive": [FINE, [*FINE[:2], *STUCK[2:]]],
        "squared": [STUCK[::-1], FINE[::-1]],
        "dot_product": [STUCK, STUCK[::-1]],
    }
    rows = [
        row
        for mechanism in mechanisms
        for condition, values in zip(conditions, accuracies[mechanism], strict=True)
        for row in rows_of(condition, mechanism, values)
    ]
    found = comparisons(results_of(rows, conditions, mechanisms))
    assert [each.condition for each in found] == [ROPE.label] * 2 + [LEARNED.label] * 2

    def steps(values):
        return [1000 if value >= 0.995 else None for value in values]

    for mechanism in ("expressive", "squared"):
        both = [each for each in found if each.candidate.mechanism == mechanism]
        pairs = list(zip(accuracies[mechanism], accuracies["dot_product"], strict=True))
        assert [each.p for each in both] == holm([sign_flip_p(each.differences) for each in both])
        assert [each.steps_p for each in both] == holm(
            [log_rank_p(steps(ours), steps(theirs), 2000) for ours, theirs in pairs]
        )


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
        "By the paired difference in accuracy EA is ahead on 1 of 2 conditions, DPA on 0; on 0 no difference is shown. "
        "1 condition not counted: fewer than 6 pairs of seeds."
    )
    assert missing == "Not compared yet: 1 condition of 3, where EA and DPA have not both finished."
    assert learned == (
        "sum, basis 16, delay 5, learned: not counted. EA solved 0/2 seeds, mean accuracy 0.375 (no "
        "interval: fewer than 6 seeds), 2 diverged; DPA solved 1/2 seeds, mean accuracy 0.875 (no interval: "
        "fewer than 6 seeds). Paired difference -0.5000 (no interval: fewer than 6 seeds; 2 pairs). Not counted: "
        "fewer than 6 pairs of seeds."
    )
    assert rope == (
        "sum, basis 16, delay 5, rope: EA ahead. EA solved 6/6 seeds, mean accuracy 1.000 (no interval: all "
        "equal); DPA solved 0/6 seeds, mean accuracy 0.500 (no interval: all equal). Paired difference +0.5000 "
        "(no interval: all equal; 6 pairs; p = 0.031). Steps before it is solved, over all seeds: 1,000 against "
        "2,000, -1,000 (no interval: all equal; log-rank p < 0.001)."
    )


def test_findings_give_intervals():
    (comparison,) = comparisons(paired(FINE, STUCK))
    sentence = findings(paired(FINE, STUCK))[-1]
    assert f"(95% interval {comparison.interval:+.4f}; 8 pairs; p = 0.008)" in sentence
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


# ---- what protocol 3 adds ----


def test_p_is_adjusted_over_the_declared_family():
    results = paired([1.0] * 8, [0.5] * 8)
    assert comparisons(results)[0].p == comparisons(results)[0].raw_p == 2 / 2**8
    (found,) = comparisons(replace(results, family=6))
    assert (found.p, found.raw_p, found.leader) == (6 * 2 / 2**8, 2 / 2**8, "expressive")
    assert comparisons(replace(results, family=7))[0].leader is None


def test_steps_count_all_seeds_and_not_the_survivors():
    """One seed of EA solves sooner than all of DPA, the others never."""
    ours = [seed_row(ROPE.label, "expressive", i, 1.0 if i == 0 else 0.9, steps_to_solve=200 if i == 0 else None)
            for i in range(8)]  # fmt: skip
    theirs = [seed_row(ROPE.label, "dot_product", i, 1.0, steps_to_solve=600 + 10 * i) for i in range(8)]
    (found,) = comparisons(results_of([*ours, *theirs], [ROPE]))
    assert found.candidate.restricted_steps == (200 + 7 * 2000) / 8
    assert found.steps_difference == (200 + 7 * 2000) / 8 - 635
    assert found.steps_interval.low < found.steps_difference < found.steps_interval.high


def test_settings_were_chosen_by_validation():
    rows = rows_of(ROPE, "expressive", [0.9] * 2, role="tuning", validation=0.7)
    assert [trial.accuracy for trial in tuning_summaries(results_of(rows, [ROPE]))] == [0.7]
    assert [trial.accuracy for trial in tuning_summaries(results_of(rows, [ROPE], protocol=2))] == [0.9]


def fixed(right, validation=0.0):
    """EA and DPA on 40 test examples with one prediction each: the seeds of EA are right on more of them."""
    made = replace(ROPE, facts=ROPE.facts | {"fixed_data": True})
    rows = [
        seed_row(made.label, name, seed, (sum(n) + 8 * (seed % 2)) / 640, validation=0.5 + (validation if ours else 0))
        for name, n, ours in (("expressive", right, True), ("dot_product", [8] * 40, False))
        for seed in range(16)
    ]
    examples = [
        {"example": i, "scored": 1, "seeds": 16, "right": n, "condition": made.label, "mechanism": name}
        | {"learning_rate": 1e-2, "initial_gain": 1.0, "role": "final"}
        for name, counts in (("expressive", right), ("dot_product", [8] * 40))
        for i, n in enumerate(counts)
    ]
    schema = EXAMPLE_SCHEMA | KEY_SCHEMA
    return results_of(rows, [made], examples=pl.DataFrame(examples, schema=schema, orient="row"))


def test_with_fixed_data_the_drawing_of_test_examples_counts():
    """All of a lead is on five examples of forty: every seed shows it, and other examples might not."""
    few = [16] * 5 + [8] * 35
    (found,) = comparisons(fixed(few, validation=0.004))
    assert found.p < 0.001
    shares = np.array(few) / 16 - 0.5
    error = shares.std(ddof=1) / np.sqrt(40)
    assert found.example_interval.low == pytest.approx(found.difference - 1.959964 * error, abs=1e-6)
    assert found.leader == "expressive"
    (doubtful,) = comparisons(fixed([16] * 2 + [8] * 38))
    assert doubtful.p < 0.001
    assert doubtful.example_interval.low < 0
    assert doubtful.leader is None
    (told,) = (finding.details for finding in findings_by_condition(fixed(few, validation=0.004)))
    assert "On validation examples the difference is +0.0040" in told
    assert found.cross_entropy_difference == pytest.approx(-found.difference)  # by the making of these rows
    assert f"nats, difference {-found.difference:+.4f} (no interval: all equal)" in told
    unknown = fixed(few)
    seeds = unknown.seeds.with_columns(
        cross_entropy=pl.when(seed=3).then(float("nan")).otherwise("cross_entropy")
    )  # as where a seed diverges
    (diverged,) = comparisons(replace(unknown, seeds=seeds))
    assert diverged.cross_entropy_difference is diverged.cross_entropy_interval is None
    (plain,) = comparisons(paired([1.0] * 8, [0.5] * 8))
    assert plain.example_interval is None
    for count in (5, 6):  # few seeds may be alike by chance: the drawing of examples alone makes no interval
        (small,) = comparisons(replace(unknown, seeds=unknown.seeds.filter(pl.col("seed") < count)))
        assert (small.example_interval is None) is (count < 6), count


def test_fixed_data_of_one_test_example_are_not_counted():
    """They were an error, after the training."""
    whole = fixed([16] * 40)
    assert comparisons(whole)[0].leader == "expressive"
    (found,) = comparisons(replace(whole, examples=whole.examples.filter(example=0)))
    assert found.untested == "its test has one example, from which no error can be told"
    assert (found.p, found.example_interval, found.leader) == (None, None, None)
