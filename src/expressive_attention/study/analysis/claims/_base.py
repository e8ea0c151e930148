"""The parts that the tests of several claims share: answers, counted conditions, and their words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...runs.results import StudyResults
from ...words import plural
from ..comparisons import BASELINE, MINIMUM_CONTEXTS, MINIMUM_PREDICTIONS, Comparison, comparisons
from ..estimators import (
    LEVEL,
    MINIMUM_FOR_INTERVAL,
    SIGNIFICANCE,
    SMALLEST_EFFECT,
    Interval,
    clustered_interval,
    mean_interval,
)
from ..wording import mechanism_name

__all__ = [
    "AHEAD",
    "CANDIDATE",
    "OVER",
    "SHOWN",
    "UNTESTED",
    "Answer",
    "Declared",
    "UntestableError",
    "conditions_led",
    "in_bits",
    "interval_of",
    "is_tested",
    "lead_counts",
    "listed",
    "margins_of",
    "over_conditions",
    "probability",
    "sample_size",
    "side_of_zero",
    "span_of",
    "tested_comparisons",
]


CANDIDATE = "expressive"
SHOWN = 3  # conditions named in a sentence
FEW = f"fewer than {MINIMUM_FOR_INTERVAL} pairs of seeds"
UNTESTED = f"{FEW}, or too small a test"


@dataclass(frozen=True)
class Answer:
    """The part of a `Verdict` that depends on the results."""

    answer: str
    where: str
    effect: str
    n: str


@dataclass(frozen=True)
class Declared:
    """The part of a `Verdict` that is settled before a study runs."""

    question: str
    test: str
    evidence: str
    judge: Callable[[StudyResults], Answer]


class UntestableError(Exception):
    """The results do not allow the test; the message says why, `n` what there is."""

    def __init__(self, reason: str, n: str) -> None:
        super().__init__(reason)
        self.n = n


@dataclass(frozen=True)
class OverConditions:
    """A mean over conditions; ``f"{over}"`` gives it with its interval.

    Attributes:
        mean: Mean of the conditions' means.
        interval: Its interval; without spread, the mean itself.
        scope: A sentence on the conditions that the interval speaks of.
    """

    mean: float
    interval: Interval
    scope: str

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({LEVEL:.0%} interval {self.interval:+.3f})"


def over_conditions(margins: NDArray[np.float64]) -> OverConditions:
    """The mean margin of a matrix ``(conditions, seeds)``."""
    mean = float(margins.mean())
    if len(margins) >= MINIMUM_FOR_INTERVAL:
        interval, scope = clustered_interval(margins), "The interval speaks of conditions like these."
    else:
        interval, scope = mean_interval(margins.mean(0).tolist()), "The interval speaks of these conditions alone."
    return OverConditions(mean, interval or Interval(mean, mean), scope)


def tested_comparisons(results: StudyResults) -> list[Comparison]:
    """EA against DPA on the conditions with enough pairs of seeds, of which there is at least one."""
    for mechanism in (CANDIDATE, BASELINE):
        if mechanism not in results.mechanisms:
            raise UntestableError(f"{mechanism_name(mechanism)} is not in the study", sample_size([]))
    found = [found for found in comparisons(results) if found.candidate.mechanism == CANDIDATE]
    tested = [each for each in found if is_tested(each)]
    if not tested:
        raise UntestableError(f"{UNTESTED} on every condition", sample_size(found))
    return tested


def is_tested(found: Comparison) -> bool:
    """Whether EA is compared with DPA on a condition that is counted."""
    return found.candidate.mechanism == CANDIDATE and found.p is not None


def margins_of(compared: Sequence[Comparison]) -> NDArray[np.float64]:
    """Differences ``(conditions, seeds)`` of the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(found.seeds) for found in compared)))
    if len(seeds) < MINIMUM_FOR_INTERVAL:
        raise UntestableError(f"the conditions share {FEW}", sample_size(compared))
    rows = [dict(zip(found.seeds, found.differences, strict=True)) for found in compared]
    return np.array([[row[seed] for seed in seeds] for row in rows])


def interval_of(found: Comparison) -> Interval:
    """Interval of the difference; without spread, the common difference itself."""
    return found.interval or Interval(found.difference, found.difference)


def conditions_led(compared: Sequence[Comparison], mechanism: str) -> list[str]:
    """Labels of the conditions on which the mechanism is ahead."""
    return [found.condition for found in compared if found.leader == mechanism]


def side_of_zero(interval: Interval) -> str:
    """The answer of an interval: it lies above 0, below 0, or holds it."""
    return "supported" if interval.low > 0 else "contradicted" if interval.high < 0 else "undecided"


def lead_counts(compared: Sequence[Comparison]) -> str:
    """A sentence with the numbers of conditions on which EA and DPA are ahead."""
    ahead, behind = len(conditions_led(compared, CANDIDATE)), len(conditions_led(compared, BASELINE))
    neither = sum(found.verdict == "neither learned" for found in compared)
    return (
        f"EA is ahead on {ahead} of {plural(len(compared), 'condition')}, DPA on {behind}; no difference is shown "
        f"on {len(compared) - ahead - behind - neither}."
    ) + (f" On {neither} neither learned." if neither else "")


def sample_size(compared: Sequence[Comparison]) -> str:
    """Numbers of conditions and of pairs of seeds, in words."""
    if not compared:
        return "0 conditions"
    pairs = span_of([len(found.differences) for found in compared])
    return f"{plural(len(compared), 'condition')}, {pairs} pairs of seeds each"


def span_of(numbers: Sequence[int]) -> str:
    """``"16"``, or ``"8 to 16"``."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def in_bits(complexities: NDArray[np.float64]) -> str:
    """Complexities in words: ``"4 to 12.5 bits"``."""
    low, high = complexities.min(), complexities.max()
    return f"{low:.3g} bits" if low == high else f"{low:.3g} to {high:.3g} bits"


def probability(p: float) -> str:
    """A probability in words, never 0 or 1, which no number of seeds gives."""
    return "> 0.999" if p > 0.999 else "< 0.001" if p < 0.001 else f"{p:.3f}"


def listed(labels: Sequence[str]) -> str:
    """The first few labels, which hold commas."""
    shown = "; ".join(labels[:SHOWN])
    more = len(labels) - SHOWN
    return f"{shown}; and {more} more" if more > 0 else shown


AHEAD = (
    "A mechanism is ahead on a condition if the sign-flip test of the mean paired difference in accuracy gives p < "
    f"{SIGNIFICANCE}, adjusted by Holm's method over the declared family, and the mean is at least {SMALLEST_EFFECT}. "
    f"Counted are conditions with {MINIMUM_PREDICTIONS} scored predictions on {MINIMUM_CONTEXTS} contexts never seen "
    "in training"
)
OVER = (
    f"The {LEVEL:.0%} bootstrap interval of the mean paired difference over conditions (drawn again with their seeds; "
    f"with fewer than {MINIMUM_FOR_INTERVAL}, seeds alone) lies above 0: supported; below 0: contradicted."
)
