"""Intervals, tests and trends of numbers that stand for seeds; docs/statistics.md says which question each answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..config.declared import EXCLUSIVE_RANGE

__all__ = [
    "EXACT_UP_TO",
    "LEVEL",
    "MINIMUM_FOR_INTERVAL",
    "RANDOM_SEED",
    "RESAMPLES",
    "ROUNDING",
    "SIGNIFICANCE",
    "SMALLEST_EFFECT",
    "Array",
    "Interval",
    "best_of",
    "clustered_interval",
    "exact_interval",
    "example_error",
    "false_range_probability",
    "finite",
    "lower_bound",
    "matrix",
    "mean_interval",
    "percentiles",
    "resample",
    "upper_bound",
    "widened_level",
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

RESAMPLES = 9999
EXACT_UP_TO = 16  # 2^16 signs are enumerated
RANDOM_SEED = 240718601
ROUNDING = 1e-12  # differences of equal accuracies may differ by this


@dataclass(frozen=True)
class Interval:
    """A confidence interval; ``f"{interval:.3f}"`` formats both ends."""

    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.low:{spec}} to {self.high:{spec}}"


def best_of(validation: ArrayLike, accuracy: ArrayLike, among: int = 3) -> float:
    """Mean accuracy of the seed that does best on validation among some seeds, over all choices of so many.

    Sorted by validation, the seed of rank i (from 0) of n is the best in ``C(n - 1 - i, k - 1)`` of the ``C(n, k)``
    choices of k seeds. The first of equal seeds counts as better, and NaN as the worst.

    Args:
        validation: Accuracy on validation sequences, ``(n,)``.
        accuracy: Accuracy on test sequences, likewise.
        among: The number k of seeds.

    Raises:
        ValueError: There are fewer than k seeds.
    """
    ranked = np.nan_to_num(np.asarray(validation, np.float64), nan=-np.inf)
    reached = np.asarray(accuracy, np.float64)
    n = len(ranked)
    if n < among:
        raise ValueError(f"validation must have at least {among} seeds, got {n}")
    choices = np.array([math.comb(n - 1 - rank, among - 1) for rank in range(n)])
    return float(reached[np.argsort(-ranked, kind="stable")] @ choices / math.comb(n, among))


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


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Bootstrap interval of the mean, bias-corrected and accelerated (BCa; Efron 1987, JASA 82:171-185).

    Two corrections are made for small numbers of seeds:

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
    if len(sample) < MINIMUM_FOR_INTERVAL or np.ptp(sample) < ROUNDING:
        return None
    return _bca(tuple(sample.tolist()))


@lru_cache(maxsize=4096)  # figures, tables and sentences all ask for the same intervals
def _bca(values: tuple[float, ...]) -> Interval:
    n = len(values)
    ends = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=widened_level(n, n - 1),
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(RANDOM_SEED),
    ).confidence_interval
    low, high = float(ends.low), float(ends.high)
    ties = (np.abs(np.subtract.outer(values, values)) < ROUNDING).sum(0)
    if ties.max() > 1 and n - ties.max() < MINIMUM_FOR_INTERVAL:
        frequent = values[int(ties.argmax())]
        low, high = min(low, frequent), max(high, frequent)
    return Interval(low, high)


def widened_level(n: int, freedom: int) -> float:
    """The level at which a bootstrap of n units matches the t interval with that many degrees of freedom."""
    quantile = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(n / freedom)
    return float(2 * stats.norm.cdf(quantile) - 1)


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


def wider(value: float, interval: Interval, error: float) -> Interval:
    """An interval over seeds, made to cover another, independent error of the same value as well.

    The distances to its ends and the 95% quantile of the error are added in quadrature (MOVER; Zou and Donner 2008,
    Statistics in Medicine 27:1693-1702), which keeps the skew of the interval.

    Args:
        value: The value that both describe.
        interval: Its interval over seeds.
        error: The other standard error, of a normal distribution.
    """
    reach = stats.norm.ppf((1 + LEVEL) / 2) * error
    return Interval(value - math.hypot(value - interval.low, reach), value + math.hypot(interval.high - value, reach))


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
    values = matrix(margins)
    conditions = len(values)
    if min(values.shape) < MINIMUM_FOR_INTERVAL:
        return None
    _, means = resample(values, np.zeros(conditions, dtype=np.int64))
    return percentiles(means.mean(1), widened_level(conditions, conditions - 1))


def resample(margins: Array, groups: NDArray[Any]) -> tuple[NDArray[np.int64], Array]:
    """Conditions drawn within their groups, and their means over seeds drawn: ``(resamples, conditions)`` each."""
    rng = np.random.default_rng(RANDOM_SEED)
    chosen = np.empty((RESAMPLES, len(margins)), dtype=np.int64)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        chosen[:, members] = rng.choice(members, (RESAMPLES, len(members)))
    seeds = margins.shape[1]
    times_drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    return chosen, np.take_along_axis(times_drawn @ margins.T / seeds, chosen, axis=1)


def percentiles(resampled: Array, level: float) -> Interval:
    """The middle share `level` of values drawn again."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def matrix(margins: ArrayLike) -> Array:
    """Margins as an array ``(conditions, seeds)``."""
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
