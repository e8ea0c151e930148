"""Tests of paired differences, and their adjustment for multiplicity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .estimators import EXACT_UP_TO, RANDOM_SEED, RESAMPLES, ROUNDING, Array, finite

__all__ = ["holm", "sign_flip_p"]


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
    return _sign_flip(tuple(sorted(sample[np.abs(sample) > ROUNDING].tolist())))


@lru_cache(maxsize=8)
def _flips(n: int) -> Array:
    """All ways to choose n signs, or, where these are too many, random ones; one row each."""
    if n <= EXACT_UP_TO:
        negative = np.arange(1 << n)[:, None] >> np.arange(n) & 1
    else:
        negative = np.random.default_rng(RANDOM_SEED).integers(0, 2, (RESAMPLES, n))
    return (1 - 2 * negative).astype(np.float64)


@lru_cache(maxsize=4096)
def _sign_flip(differences: tuple[float, ...]) -> float:
    n = len(differences)
    exact = n <= EXACT_UP_TO
    sums = _flips(n) @ np.array(differences)
    # Equal sums may differ by a rounding error.
    as_far = int((np.abs(sums) >= abs(sum(differences)) - ROUNDING).sum())
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
