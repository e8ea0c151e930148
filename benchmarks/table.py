"""The lines of the benchmark's table, which are printed and written to the JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from timing import Ratio

HEADER = (
    f"{'problem':45} {'':10} {'ms':>9}  {'its time / ours':21} {'of peak':>7} {'error':>6}  goal\n"
    "ms: median; its time / ours: median (least to most); error: as a share of its budget.\n"
    "of peak: of float32 multiply-adds, also for bfloat16; on a GPU, of bfloat16 matrix products; for decode, of the\n"
    "memory's rate."
)
MEMORY_HEADER = "peak memory beyond inputs and outputs, MiB"


@dataclass(frozen=True)
class Row:
    """An implementation on a problem. Our goal is a share of the peak; the goal for a rival is its time over ours.

    Attributes:
        seconds: Median of one call; None if it was not timed, and `note` says why.
        ratio: Its time / our time; None for ours, and if an error check was red.
        share: Share of the measured peak; None if there is none.
        error: Largest error as a share of its budget, red above 1; None if nothing is checked, or not finite.
        goal: Smallest acceptable `value`; None if there is no goal.
    """

    problem: str
    implementation: str
    seconds: float | None = None
    ratio: Ratio | None = None
    share: float | None = None
    error: float | None = None
    goal: float | None = None
    is_ours: bool = False
    note: str = ""

    @property
    def value(self) -> float | None:
        """The number that the goal refers to."""
        if self.is_ours:
            return self.share
        return None if self.ratio is None else self.ratio.median

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, ``not measured`` (there is no peak to compare with), or empty without a goal."""
        if self.goal is None:
            return ""
        if self.value is None:
            return "not measured" if self.is_ours and self.seconds is not None else "missed"
        return "met" if self.value >= self.goal else "missed"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    def line(self, first: bool) -> str:
        """One line of the table; the `first` of a problem has the problem's name."""
        milliseconds = "-" if self.seconds is None else f"{self.seconds * 1e3:.3f}"
        share = "-" if self.share is None else f"{self.share:.0%}"
        error = "-" if self.error is None else f"{self.error:.2f}"
        ratio = "-" if self.ratio is None else str(self.ratio)
        goal = "" if self.goal is None else f">= {self.goal:{'.0%' if self.is_ours else 'g'}} {self.verdict}"
        columns = f"{self.problem if first else '':45} {self.implementation:10} {milliseconds:>9}  {ratio:21}"
        return f"{columns} {share:>7} {error:>6}  {'; '.join(filter(None, (goal, self.note)))}".rstrip()


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of a implementation, forward or forward + backward, at two lengths.

    Attributes:
        shorter: Bytes beyond inputs and outputs at the shorter length.
        longer: Bytes at twice that length.
        goal: Largest acceptable bytes at the longer length; None for the rival itself.
        limit: The goal in words.
        linear: Whether bytes grow at most linearly with the length.
    """

    problem: str
    implementation: str
    shorter: int | None = None
    longer: int | None = None
    error: float | None = None
    goal: int | None = None
    linear: bool | None = None
    is_ours: bool = False
    note: str = ""
    limit: str = ""

    @property
    def verdict(self) -> str:
        """``met`` (within the goal and linear), ``missed``, ``not measured``; empty for the rival."""
        if not self.is_ours:
            return ""
        if self.longer is None or self.goal is None:
            return "not measured"
        return "met" if self.longer <= self.goal and self.linear else "missed"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    def line(self, first: bool) -> str:
        """One line of the table; see `Row.line`."""
        sizes = " ".join(f"{'-' if x is None else f'{x / 2**20:.2f}':>9}" for x in (self.shorter, self.longer))
        error = "-" if self.error is None else f"{self.error:.2f}"
        goal = f"<= {self.limit}, linear {self.verdict}" if self.is_ours else ""
        columns = f"{self.problem if first else '':45} {self.implementation:10} {sizes} {'':19} {error:>6}"
        return f"{columns}  {'; '.join(filter(None, (goal, self.note)))}".rstrip()
