"""Multi-query associative recall (MQAR; Arora et al., arXiv 2312.04927).

Key-value pairs come first; later each key comes again, once, and its value is the target there:

    inputs   k1 v1 k2 v2  .  .  k2  .  .  .  k1  .
    targets   -  -  -  -  -  -  v2  -  -  -  v1  -
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ..base import IGNORED, Examples, same_as, worded
from ..sampled import SampledTask, by_distance, distinct, integers

__all__ = ["MQARTask"]


class MQARTask(SampledTask):
    """Several keys have to be looked up in one sequence, each at a place that is not known beforehand.

    As in the paper's code, token 0 is blank, tokens 1 to vocab / 2 - 1 are keys and the others are values; keys and
    values of a sequence all differ. Queries stand in every second position after the pairs; the slots g = 1, 2, ...
    that they take are drawn without replacement with probability ~ g^(power - 1), since in text a bigram that comes
    again mostly does so soon.

    Attributes:
        pairs: Number of keys, and of queries.
        vocab: Number of tokens, even; at least 2 (pairs + 1).
        context: Tokens that the model reads, even, at least ``4 * pairs``; None: ``4 * pairs``.
        power: Power in the distribution of the slots, above 0; 1: uniform.
        filler: The tokens between the queries: ``"blank"``, or ``"random"``, any tokens, keys among them, at which
            nothing is asked.
    """

    kind: Literal["mqar"] = "mqar"  # pyright: ignore[reportIncompatibleVariableOverride]
    pairs: int = Field(default=4, ge=1, le=1 << 10)
    vocab: int = Field(default=64, ge=4, le=1 << 16, multiple_of=2)
    context: int | None = Field(default=None, multiple_of=2)
    power: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    filler: Literal["blank", "random"] = "blank"

    @model_validator(mode="after")
    def _fits(self) -> MQARTask:
        if self.vocab < 2 * (self.pairs + 1):
            raise ValueError(f"vocab must be at least 2 * (pairs + 1) = {2 * (self.pairs + 1)}, got {self.vocab}")
        if self.context is not None and self.context < 4 * self.pairs:
            raise ValueError(f"context must be at least 4 * pairs = {4 * self.pairs}, got {self.context}")
        return self

    @property
    def label(self) -> str:
        context = "" if self.context is None else f", context {self.context}"
        power = "" if self.power == 0.01 else f", power {self.power!r}"
        filler = "" if self.filler == "blank" else f", {self.filler} filler"
        return f"recall of {self.pairs} pairs, vocab {self.vocab}{context}{power}{filler}"

    formula = worded("which value was paired with this key? {pairs} pairs")
    vocab_size = same_as("vocab")

    @property
    def length(self) -> int:
        return 4 * self.pairs if self.context is None else self.context

    @property
    def problems(self) -> int:
        keys, values = self.vocab // 2 - 1, self.vocab // 2
        return math.comb(keys, self.pairs) * math.perm(values, self.pairs)

    @property
    def complexity(self) -> float:
        """log2 of the number of maps from keys to values, which is what has to be remembered."""
        return math.log2(self.problems)

    @property
    def chance(self) -> float:
        """The chance of any value; one of those in the context is right in 1 of `pairs` cases."""
        return 2.0 / self.vocab

    def draw(self, bits: np.random.Philox, count: int) -> Examples:
        half, start = self.vocab // 2, 2 * self.pairs
        keys = 1 + distinct(bits, count, half - 1, self.pairs)
        values = half + distinct(bits, count, half, self.pairs)
        places = start + 2 * self._slots(bits, count)
        inputs = np.zeros((count, self.length), dtype=np.int64)
        inputs[:, 0:start:2], inputs[:, 1:start:2] = keys, values
        np.put_along_axis(inputs, places, keys, axis=1)
        if self.filler == "random":
            inputs = np.where(inputs == 0, integers(bits, inputs.shape, self.vocab), inputs)
        targets = np.full(inputs.shape, IGNORED)
        np.put_along_axis(targets, places, values, axis=1)
        return Examples(inputs, targets)

    def _slots(self, bits: np.random.Philox, count: int) -> np.ndarray:
        """Slots ``(count, pairs)`` from 0, weighted and without replacement (Efraimidis and Spirakis, 2006)."""
        slots = self.length // 2 - self.pairs
        weights = np.arange(1, slots + 1) ** (self.power - 1.0)
        uniform = ((bits.random_raw(count * slots) >> np.uint64(11)) + 0.5) * 2.0**-53
        return np.argsort(-np.log(uniform).reshape(count, slots) / weights, axis=1)[:, : self.pairs]

    def _matches(self, inputs: np.ndarray) -> np.ndarray:
        """Whether each token after the pairs is each of the keys, ``(n, L - 2 * pairs, pairs)``."""
        start = 2 * self.pairs
        return inputs[:, start:, None] == inputs[:, None, 0:start:2]

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        start = 2 * self.pairs
        matches, values = self._matches(inputs), inputs[:, 1:start:2]
        predictions = np.full(inputs.shape, IGNORED)
        predictions[:, start:] = np.where(matches.any(-1), (matches * values[:, None]).sum(-1), IGNORED)
        return predictions

    def splits(self, examples: Examples) -> dict[str, np.ndarray]:
        """Groups by position, and by the distance from a query back to its key in the pairs."""
        start = 2 * self.pairs
        distance = np.zeros(examples.inputs.shape, dtype=np.int64)
        distance[:, start:] = np.arange(start, self.length) - 2 * self._matches(examples.inputs).argmax(-1)
        asked = examples.targets != IGNORED
        return super().splits(examples) | {"distance": by_distance(np.where(asked, distance, 0))}
