"""Paired timing: rivals run in turn in one process, so that a drift of the machine's speed hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Spread of rival time / our time over pairs of runs: above 1, ours is faster."""

    median: float
    low: float
    high: float
    ours: float  # median seconds
    rival: float  # median seconds

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Mean seconds of one call over `repeats` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def paired(ours: Callable[[], object], rival: Callable[[], object], pairs: int = 7, least: float = 0.2) -> Ratio:
    """Time both in turn, `pairs` times, each long enough to take about `least` seconds."""
    repeats = []
    for function in (ours, rival):
        function()  # warm-up: first call allocates and initializes
        repeats.append(max(1, round(least / max(seconds(function, 1), 1e-7))))
    times = [(seconds(ours, repeats[0]), seconds(rival, repeats[1])) for _ in range(pairs)]
    ratios = [b / a for a, b in times]
    return Ratio(
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        ours=statistics.median(a for a, _ in times),
        rival=statistics.median(b for _, b in times),
    )
