"""Intervals and tests against published examples, independent computations, and what they promise in simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from expressive_attention.study.analysis import estimators as inference
from expressive_attention.study.analysis.estimators import (
    Interval,
    best_of,
    clustered_interval,
    exact_interval,
    example_error,
    false_range_probability,
    lower_bound,
    mean_interval,
    upper_bound,
    wider,
    wilson_interval,
)
from expressive_attention.study.analysis.significance import holm, sign_flip_p
from expressive_attention.study.analysis.survival import log_rank_p, median_steps, restricted_steps, solve_curve
from expressive_attention.study.analysis.trend import slope_within, tau_within, trend
from expressive_attention.study.config.declared import alone


@pytest.fixture
def few_resamples(monkeypatch):
    """For simulations, which average over many intervals."""
    monkeypatch.setattr(inference, "RESAMPLES", 999)


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


@pytest.mark.parametrize("n", [6, 7, 8, 16, 64])
def test_mean_interval_of_normal_quantiles_is_the_t_interval(n):
    values = stats.norm.ppf([(i + 0.5) / n for i in range(n)]).tolist()
    half_width = stats.t.ppf(0.975, n - 1) * stats.tstd(values) / n**0.5
    interval = mean_interval(values)
    rel = 0.05 if n >= 8 else 0.1  # resamples of few values are coarse
    assert interval is not None
    assert interval.high == pytest.approx(half_width, rel=rel)
    assert interval.low == pytest.approx(-half_width, rel=rel)


def test_six_values_that_all_differ_give_the_interval_of_any_order():
    values = [0.12, -0.03, 0.02, 0.05, 0.01, 0.04]
    found = [mean_interval(list(order)) for order in (values, values[::-1], sorted(values))]
    assert all(each is not None and each.low > -0.02 and each.high < 0.11 for each in found)
    # where some are alike, the interval reaches to these
    assert mean_interval([0.2, 0.0, 0.0, 0.3, 0.1, 0.4]).low == 0.0


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


# ---- BCa ----


def bca(values, level, resamples=100_000):
    """Efron 1987, formulas 2.3 to 2.5 and 6.6, with random numbers of its own."""
    values = np.array(values)
    n, rng = len(values), np.random.default_rng(7)
    means = np.sort(values[rng.integers(0, n, (resamples, n))].mean(1))
    below = (np.sum(means < values.mean()) + np.sum(means <= values.mean())) / 2 / resamples
    shift = stats.norm.ppf(below)
    deviation = values - values.mean()
    acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = shift + stats.norm.ppf(tail)
        ends.append(np.quantile(means, stats.norm.cdf(shift + z / (1 - acceleration * z))))
    return ends


@pytest.mark.parametrize("seed", range(3))
def test_mean_interval_is_bca_at_the_widened_level(seed):
    values = np.random.default_rng(seed).exponential(size=16)
    level = 2 * stats.norm.cdf(np.sqrt(16 / 15) * stats.t.ppf(0.975, 15)) - 1
    interval = mean_interval(values.tolist())
    width = interval.high - interval.low
    assert (interval.low, interval.high) == pytest.approx(bca(values, level), abs=0.03 * width)


def test_mean_interval_leans_to_the_long_tail():
    values = [0.0, 0.0, 0.01, 0.0, 0.02, 0.0, 0.01, 0.03, 0.0, 0.02, 0.01, 0.6, 0.5, 0.0, 0.01, 0.02]
    interval = mean_interval(values)
    assert interval.high - np.mean(values) > 1.3 * (np.mean(values) - interval.low)


@pytest.mark.parametrize("differing", range(1, 8))
@pytest.mark.parametrize("sign", [1, -1])
def test_mean_interval_of_ties_excludes_0_where_the_sign_flip_test_does(differing, sign):
    values = [0.0] * (16 - differing) + [sign * (0.3 + i / 100) for i in range(differing)]
    interval = mean_interval(values)
    assert (interval.low <= 0 <= interval.high) == (sign_flip_p(values) > 0.05) == (differing < 6)


def test_mean_interval_of_ties_reaches_to_the_most_frequent_value_whatever_it_is():
    values = [1.0] * 13 + [0.5, 0.6, 0.4]
    assert mean_interval(values).high == 1.0


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda rng: rng.normal(0.1, 0.2, 16), 0.1),
        (lambda rng: rng.exponential(0.2, 16), 0.2),
        # seeds of either mechanism that stay stuck, three in ten
        (lambda rng: (0.4 * (rng.random((2, 16)) < 0.3) * [[1], [-1]]).sum(0), 0.0),
        (lambda rng: (rng.random(16) < 0.3) * rng.uniform(0.2, 0.6, 16), 0.12),
    ],
)
def test_mean_interval_covers_the_mean(draw, mean, few_resamples):
    rng = np.random.default_rng(11)
    intervals = [mean_interval(draw(rng).tolist()) for _ in range(300)]
    covered = np.mean([found is not None and found.low <= mean <= found.high for found in intervals])
    assert covered > 0.91  # 0.95 less three standard errors


# ---- sign-flip test ----


def test_sign_flip_of_darwins_maize():
    # Fisher 1935, The Design of Experiments, section 21: cross-fertilized against self-fertilized, in eighths of an
    # inch; 863 of 2^15 sums reach the one seen.
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sum(differences) == 314
    assert sign_flip_p(differences) == 2 * 863 / 2**15


def test_sign_flip_enumerates_all_signs():
    differences = [0.1, -0.2, 0.3, 0.3, 0.5, 0.0, 0.1 + 0.2]
    sums = [abs(sum(np.multiply(signs, differences))) for signs in itertools.product((1, -1), repeat=7)]
    assert sign_flip_p(differences) == np.mean(np.array(sums) >= sum(differences) - 1e-9)


def test_a_sampled_p_counts_the_signs_that_were_seen_and_is_never_0():
    assert sign_flip_p([0.1] * 40) == 1 / 10_000  # 2 of 2^40 choices of signs are as far, and none of 9999


@pytest.mark.parametrize("n", [16, 24])
def test_sign_flip_agrees_with_scipy(n):
    differences = np.random.default_rng(n).normal(0.3, 0.8, n)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**16, rng=np.random.default_rng(0)
    ).pvalue
    assert sign_flip_p(differences.tolist()) == pytest.approx(theirs, abs=1e-12 if n == 16 else 0.01)


@pytest.mark.parametrize(
    ("differences", "p"), [([0.0] * 8, 1.0), ([0.5] * 6, 1 / 32), ([0.0, 0.0, 0.4], 1.0), ([0.2, -0.2], 1.0)]
)
def test_sign_flip_by_hand(differences, p):
    assert sign_flip_p(differences) == p


@pytest.mark.parametrize("n", [6, 12, 20])
def test_sign_flip_rarely_rejects_what_is_true(n, few_resamples):
    rng = np.random.default_rng(n)
    p = [sign_flip_p(rng.standard_t(2, n).tolist()) for _ in range(600)]
    assert np.mean(np.array(p) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)


@pytest.mark.parametrize(("values", "message"), [([], "empty"), ([0.1, float("inf")], "not finite")])
def test_sign_flip_refuses(values, message):
    with pytest.raises(ValueError, match=f"differences .*{message}"):
        sign_flip_p(values)


# ---- several tests ----


def test_holm_by_hand():
    # ascending: 4 x .005, 3 x .01, 2 x .03, then 1 x .04, which may not be below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_rejects_as_the_step_down_procedure_does():
    rng = np.random.default_rng(3)
    for _ in range(200):
        p = rng.random(6) ** 3
        rejected = set()
        for step, index in enumerate(np.argsort(p)):
            if p[index] >= 0.05 / (6 - step):
                break
            rejected.add(index)
        assert {index for index, adjusted in enumerate(holm(p.tolist())) if adjusted < 0.05} == rejected


def test_holm_refuses():
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, 1.5])


# ---- log-rank test ----


def log_rank_by_hand(ours, theirs, steps):
    seen = variance = 0.0
    times = [[steps + 1 if taken is None else taken for taken in group] for group in (ours, theirs)]
    for time in sorted({taken for taken in [*ours, *theirs] if taken is not None}):
        left = [sum(taken >= time for taken in group) for group in times]
        events = [group.count(time) for group in times]
        n, d = sum(left), sum(events)
        seen += events[0] - d * left[0] / n
        variance += 0 if n == 1 else d * left[0] * left[1] * (n - d) / (n**2 * (n - 1))
    return stats.chi2.sf(seen**2 / variance, 1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([300, 500, None, 500, 900], [800, None, None, 2000, 500]),
        ([1000] * 6, [None] * 6),
        ([100, 200, 300], [150, 250, 350]),
    ],
)
def test_log_rank_by_hand(ours, theirs):
    p = log_rank_p(ours, theirs, 2000)
    assert p == pytest.approx(log_rank_by_hand(ours, theirs, 2000))
    assert p == pytest.approx(log_rank_p(theirs, ours, 2000))


@pytest.mark.parametrize("taken", [[None] * 4, [500] * 4])
def test_log_rank_where_nothing_tells_them_apart(taken):
    assert log_rank_p(taken, taken, 2000) == 1.0


def test_log_rank_refuses():
    with pytest.raises(ValueError, match="2100, more than steps=2000"):
        log_rank_p([100], [2100], 2000)


# ---- exclusive range ----


@pytest.mark.parametrize(("solved", "seeds"), [(0, 16), (3, 16), (29, 32), (16, 16)])
def test_exact_bounds_are_where_the_tail_has_the_probability(solved, seeds):
    def at_most(share):
        return sum(math.comb(seeds, k) * share**k * (1 - share) ** (seeds - k) for k in range(solved + 1))

    def at_least(share):
        return 1 - at_most(share) + math.comb(seeds, solved) * share**solved * (1 - share) ** (seeds - solved)

    both = exact_interval(solved, seeds)
    if solved < seeds:
        assert at_most(both.high) == pytest.approx(0.025)
        assert at_most(upper_bound(solved, seeds)) == pytest.approx(0.05)
    if solved > 0:
        assert at_least(both.low) == pytest.approx(0.025)
        assert at_least(lower_bound(solved, seeds)) == pytest.approx(0.05)
    assert (both.low == 0) == (lower_bound(solved, seeds) == 0) == (solved == 0)
    assert (both.high == 1) == (upper_bound(solved, seeds) == 1) == (solved == seeds)


def test_none_of_n_leaves_what_three_over_n_says():
    assert upper_bound(0, 16) == pytest.approx(1 - 0.05 ** (1 / 16))
    assert upper_bound(0, 32) == pytest.approx(0.0894, abs=1e-4)


@pytest.mark.parametrize("share", [(5, 4), (0, 0)])
@pytest.mark.parametrize("function", [exact_interval, upper_bound, lower_bound])
def test_exact_bounds_refuse(share, function):
    with pytest.raises(ValueError, match="successes <= trials"):
        function(*share)


@pytest.mark.parametrize("seeds", [8, 32])
def test_equal_mechanisms_hardly_ever_show_an_exclusive_range(seeds):
    def tail(share, counts):
        return sum(math.comb(seeds, k) * share**k * (1 - share) ** (seeds - k) for k in counts)

    ours = [k for k in range(seeds + 1) if alone((k, seeds), (0, seeds))]
    theirs = [k for k in range(seeds + 1) if alone((seeds, seeds), (k, seeds))]
    largest = max(tail(share, ours) * tail(share, theirs) for share in np.linspace(0, 1, 1001))
    assert false_range_probability(seeds) == pytest.approx(largest, rel=1e-4)
    assert seeds < 32 or largest < 1e-4


# ---- drawing of examples ----


def test_the_error_of_a_mean_is_that_of_its_examples():
    right = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5]
    assert example_error(right, [1] * 6) == pytest.approx(np.std(right, ddof=1) / np.sqrt(6))
    assert example_error([2 * x for x in right], [2] * 6) == pytest.approx(np.std(right, ddof=1) / np.sqrt(6))


def test_the_error_of_a_ratio_is_that_of_many_draws():
    rng = np.random.default_rng(2)
    scored = rng.integers(1, 20, 400)
    right = rng.binomial(scored, rng.beta(4, 2, 400))
    draws = rng.integers(0, 400, (20_000, 400))
    bootstrapped = (right[draws].sum(1) / scored[draws].sum(1)).std()
    assert example_error(right, scored) == pytest.approx(bootstrapped, rel=0.03)


def test_examples_must_be_several_and_of_one_length():
    for right, scored in (([1.0], [1]), ([1.0, 0.0], [1]), ([0.0, 0.0], [0, 0])):
        with pytest.raises(ValueError, match="at least two examples"):
            example_error(right, scored)


def test_two_errors_add_in_quadrature_and_keep_their_skew():
    found = wider(0.5, Interval(0.2, 0.6), 0.1)
    reach = stats.norm.ppf(0.975) * 0.1
    assert (found.low, found.high) == pytest.approx((0.5 - np.hypot(0.3, reach), 0.5 + np.hypot(0.1, reach)))
    assert wider(0.5, Interval(0.2, 0.6), 0.0) == Interval(pytest.approx(0.2), pytest.approx(0.6))
    assert wider(0.5, Interval(0.5, 0.5), 0.1).high == pytest.approx(0.5 + reach)


def test_both_errors_are_covered(few_resamples):
    rng = np.random.default_rng(21)
    covered = []
    for _ in range(300):
        seeds, examples = rng.normal(0, 0.1, 16), rng.normal(0, 1.0, 300)
        right = 0.3 + examples  # of an example, mean over seeds
        values = (seeds + right.mean()).tolist()
        interval = wider(float(np.mean(values)), mean_interval(values), example_error(right, [1] * 300))
        covered.append(interval.low <= 0.3 <= interval.high)
    assert 0.91 < np.mean(covered) < 0.99


# ---- the best of a few seeds ----


@pytest.mark.parametrize("among", [1, 2, 3, 7])
def test_best_of_is_the_mean_over_all_choices(among):
    rng = np.random.default_rng(among)
    validation, accuracy = rng.random((2, 7))
    validation[3] = np.nan  # a seed that diverged
    order = np.nan_to_num(validation, nan=-1)
    expected = np.mean([accuracy[max(each, key=order.__getitem__)] for each in itertools.combinations(range(7), among)])
    assert best_of(validation, accuracy, among) == pytest.approx(expected)
    assert best_of(np.ones(7), accuracy, 7) == accuracy[0]  # of equal seeds, the first
    with pytest.raises(ValueError, match="validation must have at least 8 seeds, got 7"):
        best_of(validation, accuracy, 8)


# ---- time before a task is solved ----


def test_restricted_steps_are_the_area_above_the_curve():
    taken, steps = [300, 500, None, 500, None, 900], 2000
    at, solved = solve_curve(taken, steps)
    area = sum((1 - share) * (after - before) for before, after, share in zip(at, at[1:], solved, strict=False))
    assert np.mean(restricted_steps(taken, steps)) == pytest.approx(area)
    assert restricted_steps(taken, steps) == [300, 500, 2000, 500, 2000, 900]
    with pytest.raises(ValueError, match="more than steps=400"):
        restricted_steps(taken, 400)


# ---- a family of tests ----


def test_holm_in_a_family_counts_all_of_it():
    p = [0.001, 0.004, 0.03]
    assert holm(p, 10) == pytest.approx([0.01, 0.036, 0.24])
    assert holm(p, 2) == holm(p) == pytest.approx([0.003, 0.008, 0.03])


def test_a_family_in_parts_errs_as_seldom_as_it_says():
    """Some of a family are false, in each of three parts; errors are counted over all parts."""
    rng = np.random.default_rng(4)
    wrong = []
    for _ in range(4000):
        true = rng.uniform(size=(3, 6))
        false = rng.uniform(size=(3, 4)) * 1e-5
        rejected = [np.array(holm([*a, *b], 30))[:6] < 0.05 for a, b in zip(true, false, strict=True)]
        wrong.append(np.any(rejected))
    assert np.mean(wrong) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 4000)


# ---- several conditions ----


def test_clustered_interval_draws_conditions_and_seeds():
    margins = np.random.default_rng(5).normal(0.1, 0.2, (8, 10)) + np.linspace(-0.2, 0.2, 8)[:, None]
    rng = np.random.default_rng(6)
    means = [margins[np.ix_(rng.integers(0, 8, 8), rng.integers(0, 10, 10))].mean() for _ in range(20_000)]
    tail = stats.norm.sf(np.sqrt(8 / 7) * stats.t.ppf(0.975, 7))
    interval = clustered_interval(margins)
    expected = np.quantile(means, [tail, 1 - tail])
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.04 * np.ptp(expected))


@pytest.mark.parametrize("between", [0.05, 0.3])
@pytest.mark.parametrize("seed_effect", [0.0, 0.1])
def test_clustered_interval_covers_the_mean(between, seed_effect, few_resamples):
    rng = np.random.default_rng(13)
    covered = []
    for _ in range(300):
        margins = 0.2 + rng.normal(0, between, (8, 1)) + rng.normal(0, seed_effect, 16) + rng.normal(0, 0.25, (8, 16))
        interval = clustered_interval(margins)
        covered.append(interval.low <= 0.2 <= interval.high)
    assert np.mean(covered) > 0.91


@pytest.mark.parametrize("shape", [(5, 16), (16, 5), (1, 16)])
def test_clustered_interval_needs_conditions_and_seeds(shape):
    assert clustered_interval(np.random.default_rng(0).normal(size=shape)) is None


@pytest.mark.parametrize(
    ("margins", "message"), [([0.1, 0.2], "matrix"), ([[]], "matrix"), ([[0.1, float("nan")]], "not finite")]
)
def test_clustered_interval_refuses(margins, message):
    with pytest.raises(ValueError, match=f"margins .*{message}"):
        clustered_interval(margins)


GROUPS = np.repeat([0, 1, 2], [5, 4, 3])


def test_slope_within_is_the_regression_with_an_intercept_per_group():
    rng = np.random.default_rng(1)
    x, y = rng.uniform(5, 40, 12), rng.normal(size=12)
    dummies = (GROUPS[:, None] == np.arange(3)).astype(float)
    expected = np.linalg.lstsq(np.column_stack([x, dummies]), y, rcond=None)[0][0]
    assert slope_within(x, y, GROUPS) == pytest.approx(expected)
    assert np.isnan(slope_within(np.ones(12), y, GROUPS))


def test_tau_within_of_one_group_is_kendalls():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 5, 12).astype(float), rng.integers(0, 4, 12).astype(float)
    assert tau_within(x, y, np.zeros(12, dtype=int)) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_tau_within_counts_pairs_of_one_group_alone():
    # rising in both groups, though falling over all
    x = np.array([1.0, 2, 3, 11, 12, 13])
    y = np.array([11.0, 12, 13, 1, 2, 3])
    groups = np.array([0, 0, 0, 1, 1, 1])
    assert tau_within(x, y, groups) == 1.0
    assert stats.kendalltau(x, y).statistic < 0
    assert tau_within(x, np.zeros(6), groups) == 0.0


def test_trend_of_exact_lines_with_an_intercept_each():
    bits = np.tile([5.0, 10, 20, 40], 3)
    groups = np.repeat([0, 1, 2], 4)
    margins = (0.01 * bits + np.array([-0.5, 0, 0.4])[groups])[:, None] * np.ones(8)
    found = trend(bits.tolist(), margins, groups.tolist())
    assert (found.slope, found.interval.low, found.interval.high) == pytest.approx((0.01, 0.01, 0.01))
    assert (found.tau, found.conditions, found.groups) == (1.0, 12, 3)
    # of 24^3 orders, 2 have a tau as far from 0
    assert found.tau_p < 0.001


def test_tau_p_is_that_of_all_orders():
    rng = np.random.default_rng(4)
    bits, means = np.arange(5.0), rng.normal(size=5) + 0.5 * np.arange(5)
    found = trend(bits.tolist(), means[:, None] * np.ones(6), [0] * 5)
    assert found.tau_p == pytest.approx(stats.kendalltau(bits, means, method="exact").pvalue, abs=0.015)
    assert found.interval is None  # 5 conditions


def test_trend_leaves_out_groups_of_one_complexity():
    rng = np.random.default_rng(8)
    bits, margins = np.linspace(5, 40, 9), rng.normal(0, 0.1, (9, 8))
    alone = trend(bits.tolist(), margins, [0] * 9)
    more = trend([*bits, 20, 20], np.concatenate([margins, np.ones((2, 8))]), [0] * 9 + [1, 2])
    assert more == alone
    assert trend([20, 20], margins[:2], [0, 0]) is None
    assert trend([10, 20], margins[:2], [0, 1]) is None


@pytest.mark.parametrize("between", [0.02, 0.2])
def test_trend_covers_the_slope(between, few_resamples):
    rng = np.random.default_rng(17)
    bits, groups = np.tile(np.linspace(5, 60, 10), 2), np.repeat([0, 1], 10)
    covered, tau_rejects = [], []
    for _ in range(200):
        noise = rng.normal(0, between, (20, 1)) + rng.normal(0, 0.25, (20, 16)) + groups[:, None]
        interval = trend(bits, 0.01 * bits[:, None] + noise, groups).interval
        covered.append(interval.low <= 0.01 <= interval.high)
        tau_rejects.append(trend(bits, noise, groups).tau_p < 0.05)
    assert np.mean(covered) > 0.91
    assert np.mean(tau_rejects) < 0.1


def test_trend_refuses_lengths_that_differ():
    with pytest.raises(ValueError, match="got 2, 3 and 3"):
        trend([1.0, 2.0], np.ones((3, 8)), [0, 0, 0])


@pytest.mark.parametrize(("conditions", "has_interval"), [(6, False), (7, True)])
def test_a_trend_has_an_interval_from_five_degrees_of_freedom(conditions, has_interval):
    margins = np.random.default_rng(0).normal(0.1, 0.1, (conditions, 6))
    found = trend(range(conditions), margins, [0] * conditions)
    assert (found.interval is not None) == has_interval
