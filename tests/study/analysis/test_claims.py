"""Verdicts on studies whose answer is known."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import stats

from expressive_attention.nn import MECHANISMS
from expressive_attention.study.analysis.claims import verdicts
from expressive_attention.study.analysis.claims.exclusive_range import exclusive_ranges
from expressive_attention.study.analysis.claims.two_sidedness import SHAPES
from expressive_attention.study.analysis.comparisons import comparisons
from expressive_attention.study.analysis.estimators import (
    clustered_interval,
    exact_interval,
    false_range_probability,
    lower_bound,
    mean_interval,
    upper_bound,
)
from expressive_attention.study.analysis.significance import sign_flip_p
from expressive_attention.study.analysis.trend import trend
from expressive_attention.study.config.declared import claim_names

from ..report_data import LADDER, make_condition, make_results, results_of, seed_row

SEEDS = 16  # with fewer, no loss of EA is excluded
NOISE = np.random.default_rng(0).normal(0, 0.02, (30, SEEDS))


def condition(index, bits=20.0, kind="nt", **model):
    """One of any number of conditions."""
    made = make_condition(4, 5, "rope")
    return replace(
        made,
        label=f"condition {index}",
        task={"kind": kind},
        model=made.model | model,
        facts=made.facts | {"complexity": bits},
    )


def study(conditions, margins, baseline=0.6, seeds=SEEDS):
    """EA minus DPA is the margin of each condition, plus noise."""
    rows = []
    for index, (made, margin) in enumerate(zip(conditions, margins, strict=True)):
        for seed in range(seeds):
            rows.append(seed_row(made.label, "dot_product", seed, baseline))
            rows.append(seed_row(made.label, "expressive", seed, baseline + margin + NOISE[index, seed % SEEDS]))
    return results_of(rows, conditions)


def solving(shares, bits=None, seeds=10):
    """Seeds solved by EA and DPA on each condition, of `seeds`."""
    conditions = [condition(i, at) for i, at in enumerate(bits or [20.0] * len(shares))]
    rows = [
        seed_row(made.label, mechanism, seed, 1.0 if seed < solved else 0.5)
        for made, pair in zip(conditions, shares, strict=True)
        for mechanism, solved in zip(("expressive", "dot_product"), pair, strict=True)
        for seed in range(seeds)
    ]
    return results_of(rows, conditions)


def verdict(results, claim):
    (found,) = verdicts(results, [claim])
    return found


def margins_of(results):
    return np.array([found.differences for found in comparisons(results)])


# ---- all claims ----


@pytest.mark.parametrize("claim", claim_names())
def test_every_claim_of_a_configuration_is_answered_whatever_is_missing(claim):
    whole = make_results(LADDER[:6], seeds=7)
    nothing = results_of([], [condition(0)])
    few = study([condition(0), condition(1)], [0.3, 0.3], seeds=5)
    for results in (whole, nothing, few, replace(whole, mechanisms=["expressive"])):
        found = verdict(results, claim)
        assert found.claim == claim
        assert found.answer in ("supported", "contradicted", "undecided")
        assert all([found.question, found.where, found.n, found.test])
        assert found.evidence in ("difference", "accuracy", "solved", "margin_map", "splits")
        if results is not whole:
            assert found.answer == "undecided"
            assert found.where.startswith("Not tested: ")
            assert found.effect == ""


def test_verdicts_come_in_the_order_asked():
    results = make_results(seeds=6)
    asked = ["lead_grows", "at_least_as_good"]
    assert [found.claim for found in verdicts(results, asked)] == asked
    assert verdicts(results, []) == []


def test_what_is_no_claim_is_refused():
    with pytest.raises(ValueError, match="got 'always_best'"):
        verdicts(make_results(seeds=6), ["lead_grows", "always_best"])


@pytest.mark.parametrize("claim", ["at_least_as_good", "lead_grows", "exclusive_range", "ahead_at_every_position"])
def test_tuning_seeds_and_other_mechanisms_change_nothing(claim):
    results = make_results(LADDER[:8], seeds=8)
    final = replace(results, seeds=results.seeds.filter(pl.col("role") == "final"))
    rows = results.seeds.filter(pl.col("mechanism") == "expressive").with_columns(
        mechanism=pl.lit("squared"), accuracy=pl.lit(1.0), solved=pl.lit(True)
    )
    more = replace(results, mechanisms=["squared", "expressive", "dot_product"], seeds=pl.concat([rows, results.seeds]))
    assert verdict(final, claim) == verdict(results, claim) == verdict(more, claim)


# ---- at least as good ----


@pytest.mark.parametrize(
    ("margins", "answer"),
    [
        ([0.2, 0.1, 0.3], "supported"),
        # the noise leaves open whether EA loses more than 0.01
        ([0.2, -0.004, 0.3], "undecided"),
        ([0.2, -0.2, 0.3], "contradicted"),
    ],
)
def test_at_least_as_good(margins, answer):
    results = study([condition(i) for i in range(3)], margins)
    found = verdict(results, "at_least_as_good")
    assert found.answer == answer
    assert found.n == "3 conditions, 16 pairs of seeds each"
    lowest = comparisons(results)[int(np.argmin(margins))]
    what = "DPA is furthest ahead" if answer == "contradicted" else "the lowest interval is"
    assert f"{what} on {lowest.condition}: {lowest.difference:+.3f} " in found.effect
    assert f"(95% interval {lowest.interval:+.3f})" in found.effect
    if answer == "contradicted":
        assert "EA is ahead on 2 of 3 conditions, DPA on 1; no difference is shown on 0." in found.where
        assert "DPA is ahead on: condition 1." in found.where
    if answer == "undecided":
        assert "A loss of more than 0.01 is not excluded on: condition 1." in found.where


def test_a_small_difference_without_doubt_is_as_good():
    # every interval lies between -0.01 and 0.01
    conditions = [condition(0), condition(1)]
    rows = [
        seed_row(made.label, mechanism, seed, 0.998 + 0.001 * ((seed + shift) % 2))
        for made in conditions
        for mechanism, shift in (("expressive", 0), ("dot_product", 1))
        for seed in range(16)
    ]
    found = verdict(results_of(rows, conditions), "at_least_as_good")
    assert found.answer == "supported"
    assert "no difference is shown on 2" in found.where


def test_fewer_pairs_than_declared_do_not_exclude_a_loss():
    results = study([condition(i) for i in range(2)], [0.2, 0.3], seeds=15)
    found = verdict(results, "at_least_as_good")
    assert found.answer == "undecided"
    assert "On 2 conditions there are fewer than 16 pairs of seeds." in found.where


def test_what_the_seeds_cannot_exclude_is_told_by_an_exact_bound():
    results = study([condition(i) for i in range(2)], [0.2, 0.3])
    assert f"short by more than 0.01 on up to {upper_bound(0, 16):.0%} of seeds on its best condition" in (
        verdict(results, "at_least_as_good").effect
    )
    rows = results.seeds.with_columns(
        accuracy=pl.when(
            (pl.col("condition") == "condition 1") & (pl.col("mechanism") == "expressive") & (pl.col("seed") < 3)
        ).then(0.1).otherwise(pl.col("accuracy"))
    )  # fmt: skip
    effect = verdict(replace(results, seeds=rows), "at_least_as_good").effect
    assert effect.endswith(f"and on up to {upper_bound(3, 16):.0%} on condition 1")


def test_the_condition_that_contradicts_is_named_before_one_that_is_less_certain():
    # EA and DPA are far apart on condition 1, with either sign; DPA is ahead by little, and surely, on condition 0
    conditions = [condition(0), condition(1)]
    rows = [
        seed_row(made.label, mechanism, seed, 0.5 + sign * (mechanism == "expressive"))
        for seed in range(16)
        for made, sign in zip(conditions, (-0.02 - 0.0001 * seed, 0.4 * (-1) ** seed), strict=True)
        for mechanism in ("expressive", "dot_product")
    ]
    found = verdict(results_of(rows, conditions), "at_least_as_good")
    assert found.answer == "contradicted"
    assert "DPA is furthest ahead on condition 0: -0.021 " in found.effect


def test_where_neither_has_learned_nothing_is_as_good():
    conditions = [condition(0), condition(1)]
    rows = [
        seed_row(made.label, mechanism, seed, level)
        for made, level in zip(conditions, (0.8, 0.25), strict=True)
        for mechanism in ("expressive", "dot_product")
        for seed in range(16)
    ]
    found = verdict(results_of(rows, conditions), "at_least_as_good")
    assert found.answer == "undecided"
    assert "no difference is shown on 1. On 1 neither learned." in found.where


def test_a_difference_below_the_smallest_effect_contradicts_nothing():
    """Every seed of DPA is better, by 0.002: certain, and of no consequence."""
    made = [condition(0)]
    rows = [
        seed_row("condition 0", mechanism, seed, 0.99 - less + 0.0001 * (seed % 3))
        for mechanism, less in (("expressive", 0.002), ("dot_product", 0.0))
        for seed in range(16)
    ]
    results = results_of(rows, made)
    assert comparisons(results)[0].p < 0.001
    assert comparisons(results)[0].leader is None
    assert verdict(results, "at_least_as_good").answer == "supported"


@pytest.mark.parametrize(
    ("facts", "unseen", "answer"),
    [
        ({}, {}, "supported"),
        ({"predictions": 511}, {}, "undecided"),
        ({"contexts": 255}, {}, "undecided"),
        ({}, {"unseen_predictions": 511}, "undecided"),
        ({}, {"unseen_contexts": 255}, "undecided"),
    ],
)
def test_a_condition_with_too_small_a_test_is_not_counted(facts, unseen, answer):
    whole = study([condition(i) for i in range(2)], [0.2, 0.3])
    small = replace(whole.conditions[1], facts=whole.conditions[1].facts | facts)
    fewer = [
        pl.when((pl.col("condition") == small.label) & (pl.col("seed") == 4))
        .then(n)
        .otherwise(pl.col(name))
        .alias(name)
        for name, n in unseen.items()
    ]
    results = replace(whole, conditions=[whole.conditions[0], small], seeds=whole.seeds.with_columns(fewer))
    found = verdict(results, "at_least_as_good")
    assert found.answer == answer
    if answer == "undecided":
        assert "1 condition not tested (fewer than 6 pairs of seeds, or too small a test)." in found.where
        assert comparisons(results)[1].verdict == "not counted"
        assert [each.condition for each in exclusive_ranges(results)] == ["condition 0"]


def test_at_least_as_good_everywhere_needs_every_condition():
    conditions = [condition(i) for i in range(3)]
    whole = study(conditions, [0.2] * 3)
    part = replace(whole, seeds=whole.seeds.filter((pl.col("condition") != "condition 2") | (pl.col("seed") < 5)))
    found = verdict(part, "at_least_as_good")
    assert found.answer == "undecided"
    assert found.n == "2 conditions, 16 pairs of seeds each"
    assert "1 condition not tested (fewer than 6 pairs of seeds, or too small a test)." in found.where


def test_many_conditions_are_named_in_part():
    results = study([condition(i) for i in range(12)], [0.2] * 7 + [-0.2] * 5)
    assert "DPA is ahead on: condition 7; condition 8; condition 9; and 2 more." in (
        verdict(results, "at_least_as_good").where
    )


# ---- growing lead ----

BITS = [5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0]


@pytest.mark.parametrize(
    ("margins", "answer"),
    [
        (np.linspace(0.0, 0.35, 8), "supported"),
        (np.linspace(0.35, 0.0, 8), "contradicted"),
        ([0.1] * 8, "undecided"),
        # it rises and falls
        ([0.0, 0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.0], "undecided"),
        # DPA's lead shrinks, and EA has none
        (np.linspace(-0.35, -0.1, 8), "undecided"),
    ],
)
def test_lead_grows(margins, answer):
    results = study([condition(i, bits) for i, bits in enumerate(BITS)], margins)
    found = verdict(results, "lead_grows")
    assert found.answer == answer
    fit = stats.linregress(BITS, margins_of(results).mean(1))
    tau = stats.kendalltau(BITS, margins_of(results).mean(1)).statistic
    interval = trend(BITS, margins_of(results), [0] * 8).interval
    assert f"per bit of complexity {fit.slope:+.4f} (95% interval {interval:+.4f})" in found.effect
    assert f"tau-b {tau:+.2f} (p " in found.effect
    means = margins_of(results).mean(1)
    assert found.where.startswith(
        f"EA - DPA averages {means[:3].mean():+.3f} at 5 to 15 bits, {means[3:6].mean():+.3f} at 20 to 30 bits, "
        f"{means[6:].mean():+.3f} at 35 to 40 bits. EA is ahead on"
    )


def test_the_lead_is_followed_within_each_model():
    # in each model the lead grows; over both it falls, since the large one meets the hard tasks
    bits = [5.0, 6.0, 7.0, 8.0, 9.0, 30.0, 31.0, 32.0, 33.0, 34.0]
    conditions = [condition(i, at, embed_dim=16 if at < 20 else 64) for i, at in enumerate(bits)]
    found = verdict(study(conditions, [0.3 + 0.05 * i for i in range(5)] + [0.05 * i for i in range(5)]), "lead_grows")
    assert found.answer == "supported"
    assert found.n == "10 conditions, 16 pairs of seeds each, 2 models"


def test_too_few_complexities_for_a_slope():
    few = study([condition(i, bits) for i, bits in enumerate(BITS[:6])], np.linspace(0, 0.3, 6))
    found = verdict(few, "lead_grows")
    assert (found.answer, found.effect) == ("undecided", "")
    assert "6 conditions of 1 model with several complexities are too few" in found.where
    same = verdict(study([condition(i) for i in range(8)], [0.1] * 8), "lead_grows")
    assert same.where == "Not tested: no model meets several complexities."


# ---- exclusive range ----


def fresh(results, shares, seeds=32):
    """The study with confirming seeds: of each condition named, those solved by EA and by DPA."""
    rows = [
        seed_row(label, mechanism, 2_000_000 + seed, 1.0 if seed < solved else 0.5, role="confirmation")
        for label, pair in shares.items()
        for mechanism, solved in zip(("expressive", "dot_product"), pair, strict=True)
        for seed in range(seeds)
    ]
    return replace(results, seeds=pl.concat([results.seeds, results_of(rows, []).seeds]), confirmation=32)


def test_a_range_is_not_confirmed_by_a_part_of_the_fresh_seeds():
    results = fresh(solving([(16, 0)], seeds=16), {"condition 0": (31, 0)}, seeds=31)
    found = verdict(results, "exclusive_range")
    assert found.answer == "undecided"
    assert "Not all fresh seeds are there yet on: condition 0." in found.where
    assert verdict(replace(results, confirmation=31), "exclusive_range").answer == "supported"


def test_an_exclusive_range_is_confirmed_by_fresh_seeds():
    results = solving([(16, 16), (16, 1), (15, 7), (1, 0)], bits=[5.0, 10.0, 20.0, 40.0], seeds=16)
    found = verdict(results, "exclusive_range")
    assert found.answer == "undecided"
    assert found.where.startswith(
        "EA has 2 candidates by the final seeds, at 10 to 20 bits: condition 1; condition 2. DPA has no candidate."
    )
    assert "Not all fresh seeds are there yet on: condition 1; condition 2." in found.where
    found = verdict(fresh(results, {"condition 1": (29, 15), "condition 2": (28, 3)}), "exclusive_range")
    assert found.answer == "supported"
    assert "EA: 2 candidates, 1 confirmed; DPA: 0 candidates, 0 confirmed." in found.effect
    ea, dpa = exact_interval(29, 32), exact_interval(15, 32)
    assert f"Fresh seeds on condition 1: EA 29/32 ({ea:.2f}), DPA 15/32 ({dpa:.2f})." in found.effect
    assert 2 * false_range_probability(32) < 0.001
    assert "equal mechanisms would confirm one of 2 with probability < 0.001 at most" in found.effect
    assert found.n == "4 conditions, 16 seeds each"


@pytest.mark.parametrize("counts", [(28, 0), (32, 16), (0, 0)])
def test_fresh_seeds_that_say_otherwise_confirm_nothing(counts):
    results = fresh(solving([(16, 0)], seeds=16), {"condition 0": counts})
    assert verdict(results, "exclusive_range").answer == "undecided"
    assert [each.confirmed for each in exclusive_ranges(results)] == [False]


@pytest.mark.parametrize(
    ("shares", "answer"),
    [
        ([(16, 16), (16, 13)], "contradicted"),
        ([(0, 0), (11, 1)], "contradicted"),
        ([(1, 16), (0, 15)], "contradicted"),
        # 12 of 16 may be a share of 90%, 12 of 16 one below half
        ([(12, 0)], "undecided"),
        ([(16, 12)], "undecided"),
        ([(0, 0), (16, 12)], "undecided"),
    ],
)
def test_exclusive_range_is_contradicted_where_bounds_exclude_it_everywhere(shares, answer):
    results = solving(shares, seeds=16)
    assert verdict(results, "exclusive_range").answer == answer
    excluded = [exact_interval(ours, 16).high < 0.9 or exact_interval(theirs, 16).low >= 0.5 for ours, theirs in shares]
    assert [each.excluded for each in exclusive_ranges(results)] == excluded
    assert f"is excluded on {sum(excluded)} of {len(shares)}" in verdict(results, "exclusive_range").effect


def test_a_range_that_is_there_is_hardly_ever_excluded():
    """At the limits of the range, 90% against just below half: the error is the declared one."""
    rng = np.random.default_rng(3)
    ours, theirs = rng.binomial(16, 0.9, 4000), rng.binomial(16, 0.4999, 4000)
    excluded = [
        exact_interval(int(a), 16).high < 0.9 or exact_interval(int(b), 16).low >= 0.5
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert np.mean(excluded) < 0.05


def test_dpas_own_range_is_told():
    found = verdict(solving([(1, 10), (0, 9)], bits=[8.0, 8.0]), "exclusive_range")
    assert "DPA has 2 candidates by the final seeds, at 8 bits: condition 0; condition 1." in found.where
    assert "DPA: 2 candidates, 0 confirmed" in found.effect


def test_exclusive_ranges_of_single_conditions():
    found = exclusive_ranges(solving([(9, 4), (9, 5), (8, 4), (4, 9)], bits=[1.0, 2.0, 3.0, 4.0]))
    assert [each.owner for each in found] == ["expressive", None, None, "dot_product"]
    assert [each.complexity for each in found] == [1.0, 2.0, 3.0, 4.0]
    assert (found[1].ea, found[1].dpa, found[1].ea_fresh) == ((9, 10), (5, 10), (0, 0))
    assert exclusive_ranges(solving([(5, 0)], seeds=5)) == []


# ---- mixed tasks ----


@pytest.mark.parametrize(("margin", "answer"), [(0.2, "supported"), (-0.2, "contradicted"), (0.0, "undecided")])
@pytest.mark.parametrize("number", [2, 8])
def test_ahead_on_mixed(number, margin, answer):
    mixed = [condition(i, kind="multi") for i in range(number)]
    others = [condition(number + i) for i in range(3)]
    results = study([*mixed, *others], [margin] * number + [-margin] * 3)
    found = verdict(results, "ahead_on_mixed")
    assert found.answer == answer
    margins = margins_of(results)[:number]
    interval = clustered_interval(margins) if number == 8 else mean_interval(margins.mean(0).tolist())
    assert found.effect == f"EA - DPA {margins.mean():+.3f} (95% interval {interval:+.3f})"
    assert found.n == f"{number} conditions, 16 pairs of seeds each"
    scope = "conditions like these" if number == 8 else "these conditions alone"
    assert found.where.endswith(f"The interval speaks of {scope}.")
    if answer == "supported":
        assert f"EA is ahead on {number} of {number} conditions, DPA on 0" in found.where


def test_conditions_that_disagree_leave_it_open():
    mixed = [condition(i, kind="multi") for i in range(8)]
    found = verdict(study(mixed, [0.3] * 5 + [-0.3] * 3), "ahead_on_mixed")
    assert found.answer == "undecided"
    assert "EA is ahead on: condition 0; condition 1; condition 2; and 2 more." in found.where
    assert "DPA is ahead on: condition 5; condition 6; condition 7." in found.where


def test_only_shared_seeds_count_over_conditions():
    mixed = [condition(i, kind="multi") for i in range(2)]
    whole = study(mixed, [0.2, 0.1])
    part = replace(whole, seeds=whole.seeds.filter((pl.col("condition") != "condition 1") | (pl.col("seed") != 3)))
    rows = np.delete(margins_of(whole), 3, axis=1)
    assert verdict(part, "ahead_on_mixed").effect.startswith(f"EA - DPA {rows.mean():+.3f} (95% interval ")
    apart = whole.seeds.with_columns(
        seed=pl.when(pl.col("condition") == "condition 1").then(pl.col("seed") + 100).otherwise(pl.col("seed"))
    )
    found = verdict(replace(whole, seeds=apart), "ahead_on_mixed")
    assert found.where == "Not tested: the conditions share fewer than 6 pairs of seeds."


# ---- codes of position ----


@pytest.mark.parametrize(
    ("margins", "answer", "where"),
    [
        ([0.2, 0.2, 0.1, 0.1], "supported", "EA is ahead with rope, alibi, DPA with no code."),
        ([0.2, 0.2, 0.0, 0.0], "undecided", "EA is ahead with rope, DPA with no code."),
        ([0.2, 0.2, -0.1, -0.1], "contradicted", "EA is ahead with rope, DPA with alibi."),
        # a difference below the smallest effect is no lead, whatever its p
        ([0.2, 0.2, 0.004, 0.004], "undecided", "EA is ahead with rope, DPA with no code."),
        ([0.2, 0.2, -0.004, -0.004], "undecided", "EA is ahead with rope, DPA with no code."),
        # of two conditions of one code, the mean counts
        ([0.3, -0.1, 0.2, 0.2], "supported", "EA is ahead with rope, alibi, DPA with no code."),
    ],
)
def test_ahead_at_every_position(margins, answer, where):
    conditions = [condition(i, position="rope" if i < 2 else "alibi") for i in range(4)]
    results = study(conditions, margins)
    found = verdict(results, "ahead_at_every_position")
    assert (found.answer, found.where) == (answer, where)
    pooled = margins_of(results)[2:].mean(0)
    assert f"alibi {pooled.mean():+.3f} (95% interval {mean_interval(pooled.tolist()):+.3f}; p " in found.effect
    assert found.n == "4 conditions, 16 pairs of seeds each, 2 codes of position"


def test_positions_are_adjusted_for_their_number():
    # six pairs of one sign: p = 1/32 for one code, 2/32 for two
    conditions = [condition(i, position=name) for i, name in enumerate(("rope", "alibi"))]
    results = study(conditions, [0.2, 0.2], seeds=6)
    assert sign_flip_p(margins_of(results)[0].tolist()) == 1 / 32
    found = verdict(results, "ahead_at_every_position")
    assert found.answer == "undecided"
    assert found.effect.count("p = 0.062") == 2


def test_a_code_without_results_leaves_it_open():
    conditions = [condition(i, position=name) for i, name in enumerate(("rope", "alibi"))]
    results = replace(study(conditions[:1], [0.2]), conditions=conditions)
    found = verdict(results, "ahead_at_every_position")
    assert found.answer == "undecided"
    assert "1 condition not tested" in found.where
    alone = verdict(study(conditions[:1], [0.2]), "ahead_at_every_position")
    assert alone.where == "Not tested: the study has one code of position alone, rope."


# ---- two-sidedness ----


def ablation(accuracies, shifted=None, conditions=2):
    """Mechanism to accuracy, on conditions without a shift, and with one."""
    made = [condition(i, embedding_shift=0.0) for i in range(conditions)]
    moved = [condition(conditions + i, embedding_shift=1.0) for i in range(conditions if shifted else 0)]
    rows = [
        seed_row(each.label, mechanism, seed, accuracy + NOISE[index + 3 * row, seed])
        for row, (each, values) in enumerate(
            [(each, accuracies) for each in made] + [(each, shifted) for each in moved]
        )
        for index, (mechanism, accuracy) in enumerate(values.items())
        for seed in range(SEEDS)
    ]
    return results_of(rows, [*made, *moved], list(accuracies))


TWO, ONE = ([shape[side] for shape in SHAPES] for side in (0, 1))
SIDES = dict.fromkeys(TWO, 0.9) | dict.fromkeys(ONE, 0.6)


def test_every_mechanism_is_of_a_pair_of_one_shape():
    assert sorted([*TWO, *ONE]) == sorted(MECHANISMS)


@pytest.mark.parametrize(
    ("accuracies", "answer"),
    [
        (SIDES, "supported"),
        (dict.fromkeys(TWO, 0.6) | dict.fromkeys(ONE, 0.9), "contradicted"),
        (dict.fromkeys([*TWO, *ONE], 0.7), "undecided"),
        # five pairs of six: as good as certain over seeds, and one mechanism of six is enough to doubt
        (SIDES | {"quartic": 0.3}, "undecided"),
    ],
)
def test_two_sidedness(accuracies, answer):
    results = ablation(accuracies, shifted=dict(zip(accuracies, [0.5] * 6 + [0.7] * 6, strict=True)))
    found = verdict(results, "two_sidedness")
    assert found.answer == answer

    def by_shape(*labels):
        rows = results.seeds.filter(pl.col("condition").is_in(labels))
        means = dict(rows.group_by("mechanism").agg(pl.col("accuracy").mean()).iter_rows())
        return means, [means[two] - means[one] for two, one in SHAPES]

    means, pairs = by_shape("condition 0", "condition 1")
    p = sign_flip_p(pairs)
    said = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    assert found.effect == (
        f"Two-sided - one-sided {np.mean(pairs):+.3f} (95% interval {mean_interval(pairs):+.3f} over pairs; {said})"
    )
    assert f"EA {means['expressive']:.3f} and one-sided EA {means['one_sided']:.3f}, " in found.where
    moved = by_shape("condition 2", "condition 3")[1]
    assert f"With a direction that all embeddings share: {np.mean(moved):+.3f} (95% interval " in found.where
    assert found.n == "6 pairs of mechanisms, 2 conditions, 16 seeds each"


def test_six_pairs_of_one_sign_are_the_fewest_that_show_it():
    assert sign_flip_p([0.3] * 6) == 2 / 64
    seven = ["expressive", "squared", "softmax_abs", "dot_product", "one_sided", "sigmoid", "relu_squared"]
    found = verdict(ablation({name: SIDES[name] for name in seven}), "two_sidedness")
    assert found.where.startswith("Not tested: the claim is about mechanisms, and needs 6 pairs of the same shape")
    assert found.where.endswith("the study has 3.")


def test_two_sidedness_counts_seeds_that_all_mechanisms_have():
    whole = ablation(SIDES)
    part = replace(whole, seeds=whole.seeds.filter((pl.col("mechanism") != "sigmoid") | (pl.col("seed") > 0)))
    assert verdict(part, "two_sidedness").n == "6 pairs of mechanisms, 2 conditions, 15 seeds each"
    fewer = replace(whole, seeds=whole.seeds.filter((pl.col("mechanism") != "sigmoid") | (pl.col("seed") > 10)))
    assert verdict(fewer, "two_sidedness").where == (
        "Not tested: on no condition without a shift of the embeddings all mechanisms share 6 seeds."
    )


# ---- one mechanism under two names ----


def again(differences):
    """DPA under two names: the difference of each condition, the same on all seeds."""
    conditions = [condition(i) for i in range(len(differences))]
    rows = [
        seed_row(made.label, mechanism, seed, 0.6 + (difference if mechanism != "dot_product" else 0))
        for made, difference in zip(conditions, differences, strict=True)
        for mechanism in ("dot_product", "dot_product_again")
        for seed in range(8)
    ]
    return results_of(rows, conditions, ["dot_product", "dot_product_again"])


@pytest.mark.parametrize(
    ("differing", "answer"),
    [(0, "supported"), (2, "supported"), (3, "undecided"), (4, "undecided"), (5, "contradicted")],
)
def test_the_rate_of_false_positives(differing, answer):
    results = again([0.1] * differing + [0.0] * (40 - differing))
    found = verdict(results, "no_difference")
    assert found.answer == answer
    assert (lower_bound(differing, 40) > 0.05) == (answer == "contradicted")
    assert found.effect.startswith(f"False-positive rate {differing / 40:.3f} (95% exact interval ")
    assert f"on {differing} of 40 conditions" in found.where


def test_no_difference_needs_the_second_name():
    assert verdict(make_results(seeds=8), "no_difference").where.startswith(
        "Not tested: the study needs dot_product and"
    )
