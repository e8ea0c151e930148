"""Parity of a bit string, of which self-attention is the less certain the longer the string (Hahn, arXiv 1906.06755).

Two layers can compute it (Chiang and Cholak, arXiv 2202.12172), but training hardly finds that solution. The running
parity is the word problem of the group with two elements (Liu et al., arXiv 2210.10749).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from .base import IGNORED, Examples, always, one_in, same_as, worded
from .sampled import SampledTask, integers, prefix_identifiers

__all__ = ["ParityTask"]


class ParityTask(SampledTask):
    """Whether the number of ones so far is odd; all strings of the length are equally probable.

    Attributes:
        context: Number of bits.
        asked: At ``"every"`` position (running parity), or only at the ``"last"``.
    """

    kind: Literal["parity"] = "parity"  # pyright: ignore[reportIncompatibleVariableOverride]
    context: int = Field(default=16, ge=1, le=1 << 14)
    asked: Literal["every", "last"] = "every"

    @property
    def label(self) -> str:
        return f"{'running parity' if self.asked == 'every' else 'parity'}, context {self.context}"

    formula = worded("is the number of ones so far odd?")
    vocab_size = always(2)
    length = same_as("context")

    @property
    def problems(self) -> int:
        return 2**self.context

    @property
    def complexity(self) -> float:
        """log2 of the number of strings."""
        return float(self.context)

    chance = one_in("vocab_size")

    def draw(self, bits: np.random.Philox, count: int) -> Examples:
        inputs = integers(bits, (count, self.context), 2)
        return Examples(inputs, self.solve(inputs))

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        found = inputs.cumsum(1) % 2
        if self.asked == "last":
            found[:, :-1] = IGNORED
        return found

    def contexts(self, examples: Examples) -> np.ndarray:
        """The string up to each position that is asked: a held-out string begins like others."""
        found = prefix_identifiers(examples.inputs)
        return found if self.asked == "every" else found[:, -1:]
