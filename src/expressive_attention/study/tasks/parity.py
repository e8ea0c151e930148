"""Parity of a bit string, of which self-attention is the less certain the longer the string (Hahn, arXiv 1906.06755).

Two layers can compute it (Chiang and Cholak, arXiv 2202.12172), but training hardly finds that solution. The running
parity is the word problem of the group with two elements (Liu et al., arXiv 2210.10749).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from .base import IGNORED, Examples, always, worded
from .sampled import SampledTask, after_start, integers

__all__ = ["ParityTask"]


class ParityTask(SampledTask):
    """Whether the number of ones so far is odd; all strings of the length are equally probable.

    Attributes:
        context: Number of bits.
        asked: At ``"every"`` position (running parity), or only at the ``"last"``.
        start: Whether a token of its own, number 2, comes before the bits. Without one, a model that sees distances
            alone (RoPE) cannot tell a run of equal bits from a single one.
    """

    kind: Literal["parity"] = "parity"  # pyright: ignore[reportIncompatibleVariableOverride]
    context: int = Field(default=16, ge=1, le=1 << 14)
    asked: Literal["every", "last"] = "every"
    start: bool = False

    @property
    def label(self) -> str:
        kind = "running parity" if self.asked == "every" else "parity"
        return f"{kind}, context {self.context}{', start token' if self.start else ''}"

    formula = worded("is the number of ones so far odd?")

    @property
    def vocab_size(self) -> int:
        return 2 + self.start

    @property
    def length(self) -> int:
        return self.context + self.start

    @property
    def problems(self) -> int:
        return 2**self.context

    @property
    def complexity(self) -> float:
        """log2 of the number of strings."""
        return float(self.context)

    chance = always(0.5)

    def draw(self, bits: np.random.Philox, count: int) -> Examples:
        inputs = integers(bits, (count, self.context), 2)
        inputs = after_start(inputs, 2) if self.start else inputs
        return Examples(inputs, self.solve(inputs))

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        found = inputs.cumsum(1) % 2  # the start is even, too
        found[:, : -1 if self.asked == "last" else int(self.start)] = IGNORED
        return found
