"""Selective copying (Gu and Dao, arXiv 2312.00752, after the denoise task of Jing et al., arXiv 1706.02761).

Tokens are scattered among noise, at places that differ from sequence to sequence, and are to be repeated in their
order at the end, where markers stand:

    inputs   .  b  .  .  a  c  .  |  |  |
    targets  -  -  -  -  -  -  -  b  a  c
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field

from ..base import IGNORED, Examples, same_as, worded
from ..sampled import SampledTask, by_distance, distinct, integers

__all__ = ["SelectiveCopyTask"]


class SelectiveCopyTask(SampledTask):
    """The i-th token that is not noise is the target at the i-th marker.

    Token 0 is noise, token ``vocab - 1`` the marker, and those between are drawn uniformly, with repetition.

    Attributes:
        copied: Number of tokens to repeat.
        noise: Number of noise tokens; 0: plain copying.
        vocab: Number of tokens, noise and marker among them, at least 4.
    """

    kind: Literal["selective_copy"] = "selective_copy"  # pyright: ignore[reportIncompatibleVariableOverride]
    copied: int = Field(default=4, ge=1, le=1 << 10)
    noise: int = Field(default=16, ge=0, le=1 << 14)
    vocab: int = Field(default=16, ge=4, le=1 << 16)

    @property
    def label(self) -> str:
        return f"copy {self.copied} tokens among {self.noise}, vocab {self.vocab}"

    formula = worded("repeat the {copied} tokens that are no noise")
    vocab_size = same_as("vocab")

    @property
    def length(self) -> int:
        return self.noise + 2 * self.copied

    @property
    def problems(self) -> int:
        return (self.vocab - 2) ** self.copied * math.comb(self.noise + self.copied, self.copied)

    @property
    def complexity(self) -> float:
        """log2 of the number of strings to repeat, which is what has to be remembered."""
        return self.copied * math.log2(self.vocab - 2)

    @property
    def chance(self) -> float:
        return 1.0 / (self.vocab - 2)

    def draw(self, bits: np.random.Philox, count: int) -> Examples:
        tokens = 1 + integers(bits, (count, self.copied), self.vocab - 2)
        places = np.sort(distinct(bits, count, self.noise + self.copied, self.copied), axis=1)
        inputs = np.zeros((count, self.length), dtype=np.int64)
        np.put_along_axis(inputs, places, tokens, axis=1)
        inputs[:, -self.copied :] = self.vocab - 1
        targets = np.full(inputs.shape, IGNORED)
        targets[:, -self.copied :] = tokens
        return Examples(inputs, targets)

    def _places(self, inputs: np.ndarray) -> np.ndarray:
        """The places of the tokens to repeat, ``(n, copied)``."""
        return np.argsort(inputs[:, : -self.copied] == 0, axis=1, kind="stable")[:, : self.copied]

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        predictions = np.full(inputs.shape, IGNORED)
        predictions[:, -self.copied :] = np.take_along_axis(inputs, self._places(inputs), axis=1)
        return predictions

    def splits(self, examples: Examples) -> dict[str, np.ndarray]:
        """Groups by position, which is the number of the token, and by the distance from the token to its copy."""
        distance = np.zeros(examples.inputs.shape, dtype=np.int64)
        distance[:, -self.copied :] = np.arange(self.length)[-self.copied :] - self._places(examples.inputs)
        return super().splits(examples) | {"distance": by_distance(distance)}
