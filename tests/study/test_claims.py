"""Verdicts on studies whose answer is known."""

from dataclasses import replace
from typing import get_args

import numpy as np
import polars as pl
import pytest
from scipy import stats

from expressive_attention.nn import MECHANISMS
from expressive_attention.study.claims import ONE_SIDED, TWO_SIDED, exclusive_ranges, verdicts
from expressive_attention.study.config import Claim
from expressive_attention.study.inference import (
    clustered_interval,
    mean_interval,
    range_probability,
    sign_flip_p,
    trend,
)
from expressive_attention.study.statistics import comparisons

from .report_data import LADDER, make_condition, make_results, results_of, seed_row

SEEDS = 12  # with fewer, p of 12 conditions cannot be small enough
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


@pytest.mark.parametrize("claim", get_args(Claim))
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
        ([0.2, 0.0, 0.3], "undecided"),
        ([0.2, -0.2, 0.3], "contradicted"),
    ],
)
def test_at_least_as_good(margins, answer):
    results = study([condition(i) for i in range(3)], margins)
    found = verdict(results, "at_least_as_good")
    assert found.answer == answer
    assert found.n == "3 conditions, 12 pairs of seeds each"
    lowest = comparisons(results)[int(np.argmin(margins))]
    assert f"least certain on {lowest.condition}: {lowest.difference:+.3f} " in found.effect
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
        for seed in range(8)
    ]
    found = verdict(results_of(rows, conditions), "at_least_as_good")
    assert found.answer == "supported"
    assert "no difference is shown on 2" in found.where


def test_at_least_as_good_everywhere_needs_every_condition():
    conditions = [condition(i) for i in range(3)]
    whole = study(conditions, [0.2] * 3)
    part = replace(whole, seeds=whole.seeds.filter((pl.col("condition") != "condition 2") | (pl.col("seed") < 5)))
    found = verdict(part, "at_least_as_good")
    assert found.answer == "undecided"
    assert found.n == "2 conditions, 12 pairs of seeds each"
    assert "1 condition not tested (fewer than 6 pairs of seeds)." in found.where


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
    assert found.n == "10 conditions, 12 pairs of seeds each, 2 models"


def test_too_few_complexities_for_a_slope():
    few = study([condition(i, bits) for i, bits in enumerate(BITS[:6])], np.linspace(0, 0.3, 6))
    found = verdict(few, "lead_grows")
    assert (found.answer, found.effect) == ("undecided", "")
    assert "6 conditions of 1 model with several complexities are too few" in found.where
    same = verdict(study([condition(i) for i in range(8)], [0.1] * 8), "lead_grows")
    assert same.where == "Not tested: no model meets several complexities."


# ---- exclusive range ----


def test_exclusive_range_of_ea():
    results = solving([(10, 10), (10, 1), (10, 0), (1, 0)], bits=[5.0, 10.0, 20.0, 40.0])
    found = verdict(results, "exclusive_range")
    assert found.answer == "supported"
    assert found.where == (
        "EA has 2 conditions to itself, at 10 to 20 bits: condition 1; condition 2. DPA has no condition to itself."
    )
    first, second = range_probability((10, 10), (1, 10)), range_probability((10, 10), (0, 10))
    assert f"{1 - (1 - first) * (1 - second):.3f} (those seen to be), {second:.3f} (the surest: condition 2)" in (
        found.effect
    )
    assert found.n == "4 conditions, 10 seeds each"


@pytest.mark.parametrize(
    ("shares", "answer"),
    [
        ([(10, 10), (10, 10)], "contradicted"),
        ([(0, 0), (2, 1)], "contradicted"),
        ([(1, 10), (0, 9)], "contradicted"),
        # one condition with 10 seeds is not enough
        ([(9, 4)], "undecided"),
        # a share near the limit, ever so often: probably beyond it somewhere, but nowhere seen to be
        ([(8, 4)] * 40, "undecided"),
    ],
)
def test_exclusive_range_otherwise(shares, answer):
    found = verdict(solving(shares), "exclusive_range")
    assert found.answer == answer
    whole = 1 - np.prod([1 - range_probability((ours, 10), (theirs, 10)) for ours, theirs in shares])
    said = "> 0.999" if whole > 0.999 else "< 0.001" if whole < 0.001 else f"{whole:.3f}"
    assert f"to itself: {said} (all conditions)" in found.effect


def test_dpas_own_range_is_told():
    found = verdict(solving([(1, 10), (0, 9)], bits=[8.0, 8.0]), "exclusive_range")
    assert "DPA has 2 conditions to itself, at 8 bits: condition 0; condition 1." in found.where
    assert "; that DPA has one: " in found.effect


def test_exclusive_ranges_of_single_conditions():
    results = solving([(9, 4), (9, 5), (8, 4), (4, 9)], bits=[1.0, 2.0, 3.0, 4.0])
    found = exclusive_ranges(results)
    assert [each.owner for each in found] == ["expressive", None, None, "dot_product"]
    assert [each.complexity for each in found] == [1.0, 2.0, 3.0, 4.0]
    assert found[0].ea == found[3].dpa == range_probability((9, 10), (4, 10))
    assert found[0].dpa == found[3].ea == range_probability((4, 10), (9, 10))
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
    assert found.n == f"{number} conditions, 12 pairs of seeds each"
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
    assert found.n == "4 conditions, 12 pairs of seeds each, 2 codes of position"


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


SIDES = dict.fromkeys(TWO_SIDED, 0.9) | dict.fromkeys(ONE_SIDED, 0.6)


def test_every_mechanism_has_a_side():
    assert sorted([*TWO_SIDED, *ONE_SIDED]) == sorted(MECHANISMS)


@pytest.mark.parametrize(
    ("accuracies", "answer"),
    [
        (SIDES, "supported"),
        (dict.fromkeys(TWO_SIDED, 0.6) | dict.fromkeys(ONE_SIDED, 0.9), "contradicted"),
        (dict.fromkeys([*TWO_SIDED, *ONE_SIDED], 0.7), "undecided"),
    ],
)
def test_two_sidedness(accuracies, answer):
    results = ablation(accuracies, shifted=dict(zip(accuracies, [0.5] * 3 + [0.7] * 4, strict=True)))
    found = verdict(results, "two_sidedness")
    assert found.answer == answer

    def means_of(*labels):
        rows = results.seeds.filter(pl.col("condition").is_in(labels))
        means = dict(rows.group_by("mechanism").agg(pl.col("accuracy").mean()).iter_rows())
        return means, np.mean([means[name] for name in TWO_SIDED]) - np.mean([means[name] for name in ONE_SIDED])

    means, difference = means_of("condition 0", "condition 1")
    assert found.effect.startswith(f"Two-sided - one-sided {difference:+.3f} (95% interval ")
    assert f"Mean accuracies: EA {means['expressive']:.3f}, " in found.where
    assert f"DPA {means['dot_product']:.3f}" in found.where
    shifted = means_of("condition 2", "condition 3")[1]
    assert f"With a direction that all embeddings share: {shifted:+.3f} (95% interval " in found.where
    assert found.n == "2 conditions, 12 seeds of 7 mechanisms each"


def test_two_sidedness_counts_seeds_that_all_mechanisms_have():
    whole = ablation(SIDES)
    part = replace(whole, seeds=whole.seeds.filter((pl.col("mechanism") != "sigmoid") | (pl.col("seed") > 0)))
    assert verdict(part, "two_sidedness").n == "2 conditions, 11 seeds of 7 mechanisms each"
    fewer = replace(whole, seeds=whole.seeds.filter((pl.col("mechanism") != "sigmoid") | (pl.col("seed") > 6)))
    assert verdict(fewer, "two_sidedness").where == (
        "Not tested: on no condition without a shift of the embeddings all mechanisms share 6 seeds."
    )
