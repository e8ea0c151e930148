"""Intervals, tests and trends of numbers that stand for seeds; docs/statistics.md says which answers what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..config.exclusive import EXCLUSIVE_RANGE

__all__ = [
    "LEVEL",
    "MINIMUM_FOR_INTERVAL",
    "SIGNIFICANCE",
    "SMALLEST_EFFECT",
    "Interval",
    "Trend",
    "clustered_interval",
    "exact_interval",
    "example_error",
    "false_range_probability",
    "finite",
    "holm",
    "log_rank_p",
    "lower_bound",
    "mean_interval",
    "median_steps",
    "restricted_steps",
    "sign_flip_p",
    "slope_within",
    "solve_curve",
    "tau_within",
    "trend",
    "upper_bound",
    "wider",
    "wilson_interval",
]

Array = NDArray[np.float64]

LEVEL = 0.95
SIGNIFICANCE = 0.05
# Chance alone gives n differences one sign with probability 2^(1 - n): n = 6 is the first at which that is rarer
# than 5%.
MINIMUM_FOR_INTERVAL = 6
# A smaller difference in accuracy is no lead, and a mechanism that falls short by less is as good.
SMALLEST_EFFECT = 0.01

_RESAMPLES = 9999
_EXACT_UP_TO = 16  # 2^16 signs are enumerated
_RANDOM_SEED = 240718601
_ROUNDING = 1e-12  # differences of equal accuracies may differ by this


@dataclass(frozen=True)
class Interval:
    """A confidence interval; ``f"{interval:.3f}"`` formats both ends."""

    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.low:{spec}} to {self.high:{spec}}"


# ---- shares ----


@lru_cache(maxsize=4096)
def wilson_interval(successes: int, trials: int) -> Interval:
    """Wilson score interval of a share (Wilson 1927, JASA 22:209-212).

    With p = successes / trials, n = trials and z the normal quantile, the ends are
    ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``.

    Raises:
        ValueError: Unless 0 <= successes <= trials and trials >= 1.
    """
    _check_share(successes, trials)
    ends = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return Interval(float(ends.low), float(ends.high))


@lru_cache(maxsize=4096)
def exact_interval(successes: int, trials: int) -> Interval:
    """Exact interval of a share (Clopper and Pearson 1934, Biometrika 26:404-413): it errs in at most 5% of studies.

    Its ends are those shares at which so many successes or more, or so many or fewer, have a probability of 2.5%.

    Raises:
        ValueError: As `wilson_interval`.
    """
    _check_share(successes, trials)
    ends = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="exact")
    return Interval(float(ends.low), float(ends.high))


def upper_bound(successes: int, trials: int) -> float:
    """The one-sided exact 95% bound of a share: with none of n successes, ``1 - 0.05^(1/n)``.

    Raises:
        ValueError: As `wilson_interval`.
    """
    _check_share(successes, trials)
    return 1.0 if successes == trials else float(stats.beta.ppf(LEVEL, successes + 1, trials - successes))


def lower_bound(successes: int, trials: int) -> float:
    """The one-sided exact 95% bound of a share from below; as `upper_bound`."""
    return 1 - upper_bound(trials - successes, trials)


def false_range_probability(trials: int) -> float:
    """The largest probability with which equal mechanisms show an exclusive range of the first, on so many seeds each.

    The largest, over the share p that both solve, of P(first >= 90%) P(second < 50%).
    """
    reached, missed = EXCLUSIVE_RANGE
    least, most = math.ceil(reached * trials - 1e-9), math.ceil(missed * trials) - 1
    shares = np.linspace(0, 1, 10_001)
    return float((stats.binom.sf(least - 1, trials, shares) * stats.binom.cdf(most, trials, shares)).max())


def _check_share(successes: int, trials: int) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")


# ---- means and paired differences ----


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Bootstrap interval of the mean, bias-corrected and accelerated (BCa; Efron 1987, JASA 82:171-185).

    Two corrections, for what few seeds do to it:

    - Bootstrap intervals of few values are too narrow: they use normal instead of t quantiles and the variance with
      divisor n instead of n - 1. Hesterberg (2015, The American Statistician 69:371-386) widens the level until the
      interval would match the t interval, ``2 Phi(sqrt(n / (n - 1)) t_{n-1}) - 1``. BCa corrects for skewness, not
      for this, and is computed at the widened level.
    - Seeds often tie, most of all at a difference of 0 where both mechanisms solve the task. If fewer than
      `MINIMUM_FOR_INTERVAL` values differ from the most frequent one, all on one side of it, the bootstrap excludes
      that value from 3 or 4 of 16 on, although chance alone gives so few values one sign in more than 5% of
      studies. The interval then reaches to the most frequent value, as the sign-flip test would have it.

    Args:
        values: One number per seed.

    Returns:
        The interval, the same on every call, or None where a bootstrap has nothing to say: fewer than
        `MINIMUM_FOR_INTERVAL` values, or values that are all equal.

    Raises:
        ValueError: If `values` is empty or holds a number that is not finite.
    """
    sample = finite(values, "values")
    if len(sample) < MINIMUM_FOR_INTERVAL or np.ptp(sample) < _ROUNDING:
        return None
    return _bca(tuple(sample.tolist()))


@lru_cache(maxsize=4096)  # figures, tables and sentences all ask for the same intervals
def _bca(values: tuple[float, ...]) -> Interval:
    n = len(values)
    ends = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=_widened_level(n, n - 1),
        n_resamples=_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(_RANDOM_SEED),
    ).confidence_interval
    low, high = float(ends.low), float(ends.high)
    ties = (np.abs(np.subtract.outer(values, values)) < _ROUNDING).sum(0)
    if n - ties.max() < MINIMUM_FOR_INTERVAL:
        frequent = values[int(ties.argmax())]
        low, high = min(low, frequent), max(high, frequent)
    return Interval(low, high)


def _widened_level(n: int, freedom: int) -> float:
    """The level at which a bootstrap of n units matches the t interval with that many degrees of freedom."""
    quantile = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(n / freedom)
    return float(2 * stats.norm.cdf(quantile) - 1)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean paired difference, by the sign-flip permutation test (Fisher 1935).

    Had the mechanisms no effect, each difference could as well have the other sign. p is the share of all 2^n ways
    to choose signs whose mean is as far from 0 as the one seen. Differences of 0 have no sign and drop out. More
    than 16 are sampled with 9999 random choices m, ``p = (1 + #{as far}) / (1 + m)``, the same on every call.

    Args:
        differences: One per pair of seeds.

    Raises:
        ValueError: If `differences` is empty or holds a number that is not finite.
    """
    sample = finite(differences, "differences")
    return _sign_flip(tuple(sorted(sample[np.abs(sample) > _ROUNDING].tolist())))


@lru_cache(maxsize=8)
def _flips(n: int) -> Array:
    """All ways to choose n signs, or, where these are too many, random ones; one row each."""
    if n <= _EXACT_UP_TO:
        negative = np.arange(1 << n)[:, None] >> np.arange(n) & 1
    else:
        negative = np.random.default_rng(_RANDOM_SEED).integers(0, 2, (_RESAMPLES, n))
    return (1 - 2 * negative).astype(np.float64)


@lru_cache(maxsize=4096)
def _sign_flip(differences: tuple[float, ...]) -> float:
    n = len(differences)
    exact = n <= _EXACT_UP_TO
    sums = _flips(n) @ np.array(differences)
    # Equal sums may differ by a rounding error.
    as_far = int((np.abs(sums) >= abs(sum(differences)) - _ROUNDING).sum())
    return as_far / len(sums) if exact else (1 + as_far) / (1 + len(sums))


def holm(p: Sequence[float], family: int = 0) -> list[float]:
    """Adjusted p of several tests, such that few false alarms hold over all (Holm 1979, Scand. J. Stat. 6:65-70).

    The i-th smallest of m becomes ``max_{j <= i} min(1, (m - j + 1) p_(j))``. Rejecting where this is below 0.05
    rejects a true null hypothesis with probability below 0.05 over all tests, whatever their dependence.

    Where the tests are some of a larger family, m is the size of the family, and the bound holds over all of it, with
    the others treated in the same way: when a part first rejects a true hypothesis, its j - 1 tests before were false
    ones, so that at most m - j + 1 are true, and that p is below 0.05 over their number.

    Args:
        p: One per test.
        family: Number of tests in the family, where these are not all of it.

    Returns:
        In the same order.

    Raises:
        ValueError: If a p is not between 0 and 1.
    """
    raw = np.asarray(p, dtype=np.float64)
    if not ((raw >= 0) & (raw <= 1)).all():
        raise ValueError(f"p must be between 0 and 1, got {list(p)}")
    order = raw.argsort(kind="stable")
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(raw[order] * (max(family, len(raw)) - np.arange(len(raw)))))
    return adjusted.tolist()


# ---- steps to solve ----


def solve_curve(steps_to_solve: Sequence[int | None], steps: int) -> tuple[list[float], list[float]]:
    """Share of seeds that have solved the task, against optimizer steps (Kaplan and Meier 1958, JASA 53:457-481).

    Unsolved seeds are censored at `steps`. A seed that diverged earlier is too: it can no longer solve
    the task, and censoring it when it diverged would credit it with the fate of the others.

    Args:
        steps_to_solve: One entry per seed, None where the seed did not solve the task.
        steps: Optimizer steps after which the unsolved were given up.

    Returns:
        Steps, starting at 0 and ending at `steps`, and the share solved from each step on.

    Raises:
        ValueError: If there are no seeds, or one took more than `steps`.
    """
    share = stats.ecdf(_censored(steps_to_solve, steps)).cdf
    at, reached = [0.0, *share.quantiles.tolist()], [0.0, *share.probabilities.tolist()]
    if at[-1] < steps:
        at, reached = [*at, float(steps)], [*reached, reached[-1]]
    return at, reached


def median_steps(steps_to_solve: Sequence[int | None], steps: int) -> float | None:
    """Steps by which at least half of the seeds had solved the task, None if fewer than half did.

    Args:
        steps_to_solve: As in `solve_curve`.
        steps: As in `solve_curve`.
    """
    at, reached = solve_curve(steps_to_solve, steps)
    return next((step for step, share in zip(at, reached, strict=True) if share >= 0.5), None)


def log_rank_p(ours: Sequence[int | None], theirs: Sequence[int | None], steps: int) -> float:
    """Two-sided p of a difference in steps to solve, by the log-rank test (Mantel 1966).

    At each step t at which d of n unsolved seeds solve the task, n_1 of these n being ours, ours are expected to be
    ``d n_1 / n`` of them; the sum of seen minus expected is compared with its hypergeometric variance. The pairing
    of seeds is not used.

    Args:
        ours: Steps to solve of one mechanism's seeds, None where unsolved, censored as in `solve_curve`.
        theirs: Of the other mechanism's seeds.
        steps: Optimizer steps after which the unsolved were given up, the same for both.

    Returns:
        p; 1 where nothing tells the two apart, as where no seed solved the task.

    Raises:
        ValueError: As `solve_curve`.
    """
    with np.errstate(invalid="ignore"):  # 0 / 0
        p = stats.logrank(_censored(ours, steps), _censored(theirs, steps)).pvalue
    return 1.0 if np.isnan(p) else float(p)


def restricted_steps(steps_to_solve: Sequence[int | None], steps: int) -> list[float]:
    """Steps that each seed spends without having solved the task, of `steps`: an unsolved one spends all.

    Their mean is the area above `solve_curve`, the restricted mean survival time (Royston and Parmar 2013, BMC Medical
    Research Methodology 13:152): it speaks of all seeds, where a median of the solved ones compares survivors.

    Args:
        steps_to_solve: As in `solve_curve`.
        steps: As in `solve_curve`.
    """
    _censored(steps_to_solve, steps)
    return [float(steps if taken is None else taken) for taken in steps_to_solve]


def _censored(steps_to_solve: Sequence[int | None], steps: int) -> Any:
    if not steps_to_solve:
        raise ValueError("steps_to_solve is empty")
    if any(taken is not None and taken > steps for taken in steps_to_solve):
        raise ValueError(f"steps_to_solve holds {max(filter(None, steps_to_solve))}, more than steps={steps}")
    times = [steps if taken is None else taken for taken in steps_to_solve]
    return stats.CensoredData.right_censored(times, [taken is None for taken in steps_to_solve])


# ---- drawing of test examples ----


def example_error(right: Sequence[float], scored: Sequence[int]) -> float:
    """Standard error of an accuracy, or of a difference of accuracies, by the drawing of the test examples.

    With x_i right predictions, or differences of them, of the w_i that count in example i of n, and r = sum x / sum w:
    ``sqrt(n / (n - 1) sum (x_i - r w_i)^2) / sum w``, the error of a ratio (Cochran 1977, Sampling Techniques, 2.11).
    Predictions within an example may depend on one another.

    Args:
        right: One per example, mean over seeds.
        scored: Predictions that count in each.

    Raises:
        ValueError: With fewer than two examples.
    """
    x, w = finite(right, "right"), finite(scored, "scored")
    if len(x) != len(w) or len(x) < 2 or w.sum() <= 0:
        raise ValueError(f"right and scored must hold at least two examples each, got {len(x)} and {len(w)}")
    residuals = x - x.sum() / w.sum() * w
    return float(np.sqrt(len(x) / (len(x) - 1) * (residuals**2).sum()) / w.sum())


def wider(value: float, interval: Interval | None, error: float) -> Interval:
    """An interval over seeds, made to cover another, independent error of the same value as well.

    The distances to its ends and the 95% quantile of the error are added in quadrature (MOVER; Zou and Donner 2008,
    Statistics in Medicine 27:1693-1702), which keeps the skew of the interval.

    Args:
        value: The value that both are about.
        interval: Over seeds; None: they do not differ.
        error: The other standard error, of a normal distribution.
    """
    reach = stats.norm.ppf((1 + LEVEL) / 2) * error
    known = interval or Interval(value, value)
    return Interval(value - math.hypot(value - known.low, reach), value + math.hypot(known.high - value, reach))


# ---- several conditions ----


def clustered_interval(margins: ArrayLike) -> Interval | None:
    """Bootstrap interval of the mean margin over conditions and seeds, both of which are drawn again.

    Each resample draws conditions, then seeds. All conditions of a study run the same seeds, and a seed's random
    numbers are the same in all of them, so that one draw of seeds serves all conditions drawn (Owen 2007, Ann. Appl.
    Stat. 1:386-411). The interval speaks of conditions like these; it is somewhat too wide where conditions do not
    differ. Its level is widened as in `mean_interval`, with conditions as units.

    Args:
        margins: ``(conditions, seeds)``, the difference of each pair.

    Returns:
        The interval, the same on every call; None for fewer than `MINIMUM_FOR_INTERVAL` conditions or seeds.

    Raises:
        ValueError: If `margins` is no matrix of finite numbers.
    """
    values = _matrix(margins)
    conditions = len(values)
    if min(values.shape) < MINIMUM_FOR_INTERVAL:
        return None
    _, means = _resampled(values, np.zeros(conditions, dtype=np.int64))
    return _percentiles(means.mean(1), _widened_level(conditions, conditions - 1))


@dataclass(frozen=True)
class Trend:
    """How a margin changes with complexity over conditions, within each group of them.

    Attributes:
        slope: Least-squares slope per unit of complexity, with an intercept for each group.
        interval: Its bootstrap interval, None where too few conditions or seeds are left (see `trend`).
        tau: Kendall's tau-b over the pairs of conditions in one group.
        tau_p: Its two-sided permutation p.
        conditions: Number of conditions that tell: those of groups with several complexities.
        groups: Number of such groups.
    """

    slope: float
    interval: Interval | None
    tau: float
    tau_p: float
    conditions: int
    groups: int


def trend(complexity: Sequence[float], margins: ArrayLike, groups: Sequence[int]) -> Trend | None:
    """Trend of the margin with complexity: slope and rank correlation within groups.

    The interval of the slope comes from the bootstrap of `clustered_interval`: conditions are drawn within their
    group, then seeds. With k conditions in g groups the level is widened for k - g - 1 degrees of freedom, of which
    `MINIMUM_FOR_INTERVAL` - 1 have to be left. The slope is a mean over conditions and reacts to a few large margins;
    tau knows only which of two margins is larger. Its p is from 9999 random orders of the margins in each group.

    Args:
        complexity: In bits, one per condition.
        margins: ``(conditions, seeds)``, the difference of each pair.
        groups: One number per condition; conditions with the same one, say of the same model, are compared.

    Returns:
        The trend, the same on every call; None if no group has several complexities.

    Raises:
        ValueError: If the lengths differ or a number is not finite.
    """
    values, x, labels = _matrix(margins), finite(complexity, "complexity"), np.asarray(groups)
    if not len(values) == len(x) == len(labels):
        raise ValueError(
            f"complexity, margins and groups must have one entry per condition, got {len(x)}, {len(values)} and "
            f"{len(labels)}"
        )
    tells = np.array([np.ptp(x[labels == label]) > 0 for label in labels])
    if not tells.any():
        return None
    values, x, labels = values[tells], x[tells], labels[tells]
    means = values.mean(1)
    number = len(np.unique(labels))
    freedom = len(x) - number - 1
    interval = None
    if freedom >= MINIMUM_FOR_INTERVAL - 1 and values.shape[1] >= MINIMUM_FOR_INTERVAL:
        chosen, resampled = _resampled(values, labels)
        slopes = slope_within(x[chosen], resampled, labels)
        interval = _percentiles(slopes[np.isfinite(slopes)], _widened_level(len(x), freedom))
    return Trend(
        slope=float(slope_within(x, means, labels)),
        interval=interval,
        tau=tau_within(x, means, labels),
        tau_p=_tau_p(x, means, labels),
        conditions=len(x),
        groups=number,
    )


def slope_within(x: Array, y: Array, groups: NDArray[Any]) -> Array:
    """Least-squares slope with an intercept for each group, ``sum (x - mean_g x) y / sum (x - mean_g x)^2``.

    Args:
        x: ``(..., conditions)``.
        y: ``(..., conditions)``.
        groups: ``(conditions,)``.

    Returns:
        Slopes ``(...)``; NaN where no group has several x.
    """
    member = (groups[:, None] == np.unique(groups)).astype(np.float64)
    centred = x - x @ (member / member.sum(0)) @ member.T
    spread = (centred**2).sum(-1)
    return (centred * y).sum(-1) / np.where(spread > _ROUNDING, spread, np.nan)


def tau_within(x: Array, y: Array, groups: NDArray[Any]) -> float:
    """Kendall's tau-b (Kendall 1938, Biometrika 30:81-93; ties 1945, 33:239-251) over pairs in one group.

    ``sum sign(dx) sign(dy) / sqrt(#{dx != 0} #{dy != 0})``; 0 if no pair differs in both.

    Args:
        x: ``(conditions,)``.
        y: ``(conditions,)``.
        groups: ``(conditions,)``.
    """
    first, second = _pairs(groups)
    dx, dy = _signs(x, first, second), _signs(y, first, second)
    untied = np.abs(dx).sum() * np.abs(dy).sum()
    return float((dx * dy).sum() / np.sqrt(untied)) if untied else 0.0


def _tau_p(x: Array, y: Array, groups: NDArray[Any]) -> float:
    """Share of random orders of y within groups whose tau is as far from 0."""
    rng = np.random.default_rng(_RANDOM_SEED)
    order = np.tile(np.arange(len(y)), (_RESAMPLES, 1))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        order[:, members] = rng.permuted(order[:, members], axis=1)
    first, second = _pairs(groups)
    dx = _signs(x, first, second)
    seen = abs(int(dx @ _signs(y, first, second)))
    everyone = np.arange(len(y))
    signs = _signs(y, everyone[:, None], everyone)
    as_far = 0
    for orders in np.array_split(order, _RESAMPLES // 64):  # some at a time: there are many pairs
        as_far += int((np.abs(signs[orders[:, first], orders[:, second]] @ dx) >= seen).sum())
    return (1 + as_far) / (1 + _RESAMPLES)


def _pairs(groups: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = np.triu_indices(len(groups), 1)
    together = groups[first] == groups[second]
    return first[together], second[together]


def _signs(values: Array, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    difference = values[..., second] - values[..., first]
    return np.sign(np.where(np.abs(difference) < _ROUNDING, 0, difference)).astype(np.int64)


def _resampled(margins: Array, groups: NDArray[Any]) -> tuple[NDArray[np.int64], Array]:
    """Conditions drawn within their groups, and their means over seeds drawn: ``(resamples, conditions)`` each."""
    rng = np.random.default_rng(_RANDOM_SEED)
    chosen = np.empty((_RESAMPLES, len(margins)), dtype=np.int64)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        chosen[:, members] = rng.choice(members, (_RESAMPLES, len(members)))
    seeds = margins.shape[1]
    times_drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=_RESAMPLES)
    return chosen, np.take_along_axis(times_drawn @ margins.T / seeds, chosen, axis=1)


def _percentiles(resampled: Array, level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _matrix(margins: ArrayLike) -> Array:
    values = np.asarray(margins, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"margins must be a matrix (conditions, seeds), got the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("margins holds a number that is not finite")
    return values


def finite(values: Sequence[float | None], name: str) -> Array:
    """The values as an array, or an error that names them.

    Raises:
        ValueError: If there are none, or one is not a finite number.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a number that is not finite: {list(values)}")
    return array
