"""Paired timing: rivals run in turn in one process, so that a drift of the machine's speed affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Spread of rival time / our time over pairs of runs: above 1, ours is faster."""

    median: float
    low: float
    high: float
    ours: float  # median seconds
    rival: float  # median seconds

    @classmethod
    def of(cls, ours: Sequence[float], rival: Sequence[float]) -> Ratio:
        """Make a ratio from the seconds of both, a pair at a time."""
        ratios = [b / a for a, b in zip(ours, rival, strict=True)]
        return cls(
            statistics.median(ratios), min(ratios), max(ratios), statistics.median(ours), statistics.median(rival)
        )

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds(function: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None) -> float:
    """Mean seconds of one call over `repeats` calls; `wait` returns when all started work is done."""
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - start) / repeats


def in_turn(
    functions: Sequence[Callable[[], object]],
    rounds: int = 7,
    least: float = 0.1,
    wait: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Seconds of each function, measured once per round over as many calls as take about `least` seconds."""
    repeats = []
    for function in functions:
        function()  # warm-up: first call allocates and initializes
        repeats.append(max(1, round(least / max(seconds(function, 1, wait), 1e-7))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, number, own in zip(functions, repeats, times, strict=True):
            own.append(seconds(function, number, wait))
    return times


def paired(ours: Callable[[], object], rival: Callable[[], object], pairs: int = 7, least: float = 0.2) -> Ratio:
    """Time both in turn, `pairs` times, each long enough to take about `least` seconds."""
    return Ratio.of(*in_turn([ours, rival], pairs, least))
