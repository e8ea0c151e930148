"""Induction heads (Fu et al., arXiv 2212.14052; Gu and Dao, arXiv 2312.00752; Olsson et al., arXiv 2209.11895).

A special token comes once among random ones; when it comes again, at the end, the target is the token that followed
it the first time:

    inputs   c  a  !  b  a  c  a  !
    targets  -  -  -  -  -  -  -  b

A transformer learns it with two layers, of which the first looks at the token before (Olsson et al.).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field

from ..base import IGNORED, Examples, same_as, worded
from ..sampled import SampledTask, by_distance, integers

__all__ = ["InductionTask"]


class InductionTask(SampledTask):
    """The special token is ``vocab - 1``; the others, and the place where it stands first, are uniform.

    Attributes:
        context: Tokens that the model reads, the special one at the end among them; at least 3.
        vocab: Number of tokens, the special one among them; at least 3.
    """

    kind: Literal["induction"] = "induction"  # pyright: ignore[reportIncompatibleVariableOverride]
    context: int = Field(default=32, ge=3, le=1 << 14)
    vocab: int = Field(default=16, ge=3, le=1 << 16)

    @property
    def label(self) -> str:
        return f"induction, context {self.context}, vocab {self.vocab}"

    formula = worded("what came after this token before?")
    vocab_size = same_as("vocab")
    length = same_as("context")

    @property
    def problems(self) -> int:
        return (self.context - 2) * (self.vocab - 1) ** (self.context - 2)

    @property
    def complexity(self) -> float:
        """log2 of the number of pairs of a place and a token that stands there."""
        return math.log2((self.context - 2) * (self.vocab - 1))

    @property
    def chance(self) -> float:
        return 1.0 / (self.vocab - 1)

    def draw(self, bits: np.random.Philox, count: int) -> Examples:
        inputs = integers(bits, (count, self.context), self.vocab - 1)
        rows, places = np.arange(count), integers(bits, (count,), self.context - 2)
        inputs[rows, places] = inputs[:, -1] = self.vocab - 1
        targets = np.full(inputs.shape, IGNORED)
        targets[:, -1] = inputs[rows, places + 1]
        return Examples(inputs, targets)

    def _places(self, inputs: np.ndarray) -> np.ndarray:
        """The first place of the special token, ``(n,)``."""
        return (inputs == self.vocab - 1).argmax(1)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        predictions = np.full(inputs.shape, IGNORED)
        predictions[:, -1] = inputs[np.arange(len(inputs)), self._places(inputs) + 1]
        return predictions

    def splits(self, examples: Examples) -> dict[str, np.ndarray]:
        """Groups by position, and by the distance between the two special tokens."""
        distance = np.zeros(examples.inputs.shape, dtype=np.int64)
        distance[:, -1] = self.context - 1 - self._places(examples.inputs)
        return super().splits(examples) | {"distance": by_distance(distance)}
