"""The trend of differences with complexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .estimators import (
    MINIMUM_FOR_INTERVAL,
    RANDOM_SEED,
    RESAMPLES,
    ROUNDING,
    Array,
    Interval,
    finite,
    matrix,
    percentiles,
    resample,
    widened_level,
)

__all__ = ["Trend", "slope_within", "tau_within", "trend"]


@dataclass(frozen=True)
class Trend:
    """The change of a margin with complexity over conditions, within each group of them.

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
        complexity: Bits, one number per condition.
        margins: ``(conditions, seeds)``, the difference of each pair.
        groups: One number per condition; conditions with the same one, say of the same model, are compared.

    Returns:
        The trend, the same on every call; None if no group has several complexities.

    Raises:
        ValueError: If the lengths differ or a number is not finite.
    """
    values, x, labels = matrix(margins), finite(complexity, "complexity"), np.asarray(groups)
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
        chosen, resampled = resample(values, labels)
        slopes = slope_within(x[chosen], resampled, labels)
        interval = percentiles(slopes[np.isfinite(slopes)], widened_level(len(x), freedom))
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
    return (centred * y).sum(-1) / np.where(spread > ROUNDING, spread, np.nan)


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
    rng = np.random.default_rng(RANDOM_SEED)
    order = np.tile(np.arange(len(y)), (RESAMPLES, 1))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        order[:, members] = rng.permuted(order[:, members], axis=1)
    first, second = _pairs(groups)
    dx = _signs(x, first, second)
    seen = abs(int(dx @ _signs(y, first, second)))
    everyone = np.arange(len(y))
    signs = _signs(y, everyone[:, None], everyone)
    as_far = 0
    for orders in np.array_split(order, RESAMPLES // 64):  # some at a time: there are many pairs
        as_far += int((np.abs(signs[orders[:, first], orders[:, second]] @ dx) >= seen).sum())
    return (1 + as_far) / (1 + RESAMPLES)


def _pairs(groups: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = np.triu_indices(len(groups), 1)
    together = groups[first] == groups[second]
    return first[together], second[together]


def _signs(values: Array, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    difference = values[..., second] - values[..., first]
    return np.sign(np.where(np.abs(difference) < ROUNDING, 0, difference)).astype(np.int64)
