"""Arithmetic modulo a prime from part of its table: grokking (Power et al., arXiv 2201.02177).

The model reads ``a o b =`` and is to say the result. It is trained on a fixed part of all pairs (a, b) and tested on
the others. With weight decay, accuracy there may rise long after the training pairs are known by heart.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from .base import IGNORED, Examples, Task, always, one_in
from .rng import stream
from .sampled import integers

__all__ = ["ModularAdditionTask"]

_SIGNS = {
    "add": "+",
    "subtract": "\N{MINUS SIGN}",
    "multiply": "\N{MULTIPLICATION SIGN}",
    "divide": "\N{DIVISION SIGN}",
}


class ModularAdditionTask(Task):
    """a + b = ? modulo a number, or with another operation.

    Tokens below `modulus` are numbers; the last two are the operation and the equals sign, at which the answer is the
    target. Training draws its pairs uniformly with replacement. Half of the others are for validation and half for
    test. Which pairs are trained on is the same for every seed, and a larger fraction contains a smaller one.

    Attributes:
        modulus: 2 to 1024; for division, a prime.
        operation: ``"add"``, ``"subtract"``, ``"multiply"`` or ``"divide"`` (by b other than 0).
        training_fraction: Share of the pairs that are trained on.
    """

    kind: Literal["modular_addition"] = "modular_addition"  # pyright: ignore[reportIncompatibleVariableOverride]
    modulus: int = Field(default=97, ge=2, le=1 << 10)
    operation: Literal["add", "subtract", "multiply", "divide"] = "add"
    training_fraction: float = Field(default=0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> ModularAdditionTask:
        if self.operation == "divide" and any(self.modulus % d == 0 for d in range(2, math.isqrt(self.modulus) + 1)):
            raise ValueError(f"modulus must be a prime where operation is divide, got {self.modulus}")
        if not 1 <= self.training_pairs <= self.pairs - 2:
            raise ValueError(
                f"training_fraction must leave a pair to train on and two others of {self.pairs}, "
                f"got {self.training_fraction}"
            )
        return self

    @property
    def label(self) -> str:
        part = "" if self.training_fraction == 0.5 else f", trained on {self.training_fraction!r}"
        return f"{self.operation} mod {self.modulus}{part}"

    @property
    def formula(self) -> str:
        return f"a {_SIGNS[self.operation]} b = ?, mod {self.modulus}"

    @property
    def vocab_size(self) -> int:
        return self.modulus + 2

    length = always(4)

    @property
    def pairs(self) -> int:
        """Number of pairs (a, b)."""
        return self.modulus * (self.modulus - (self.operation == "divide"))

    @property
    def training_pairs(self) -> int:
        """Number of pairs that are trained on."""
        return round(self.training_fraction * self.pairs)

    @property
    def complexity(self) -> float:
        """log2 of the number of pairs."""
        return math.log2(self.pairs)

    chance = one_in("modulus")

    @cached_property
    def _order(self) -> np.ndarray:
        """All pairs ``(pairs, 2)`` in a fixed random order, the ones to train on first."""
        raw = stream(0, f"order of pairs: {self.operation} mod {self.modulus}").random_raw(self.pairs)
        lowest = int(self.operation == "divide")
        a, b = np.divmod(np.argsort(raw, kind="stable"), self.modulus - lowest)
        return np.stack([a, b + lowest], axis=1)

    def _examples(self, pairs: np.ndarray) -> Examples:
        inputs = np.empty((len(pairs), 4), dtype=np.int64)
        inputs[:, [0, 2]] = pairs
        inputs[:, 1], inputs[:, 3] = self.modulus, self.modulus + 1
        return Examples(inputs, self.solve(inputs))

    def training_examples(self, bits: np.random.Philox, count: int) -> Examples:
        return self._examples(self._order[integers(bits, (count,), self.training_pairs)])

    def held_out_examples(self, count: int, purpose: str) -> Examples:
        first = self.training_pairs + ("validation", "test").index(purpose)
        return self._examples(self._order[first::2][:count])

    @property
    def fixed_data(self) -> bool:
        return True

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        a, b = inputs[:, 0], inputs[:, 2]
        if self.operation == "divide":
            result = a * np.array([0] + [pow(n, -1, self.modulus) for n in range(1, self.modulus)])[b]
        else:
            result = {"add": a + b, "subtract": a - b, "multiply": a * b}[self.operation]
        predictions = np.full(inputs.shape, IGNORED)
        predictions[:, -1] = result % self.modulus
        return predictions

    def splits(self, examples: Examples) -> dict[str, np.ndarray]:
        """Groups by position and, where a o b = b o a, by whether the reversed pair is trained on."""
        found = super().splits(examples)
        if self.operation in ("subtract", "divide"):
            return found
        a, b = examples.inputs[:, 0], examples.inputs[:, 2]
        trained = self._order[: self.training_pairs] @ (self.modulus, 1)
        mirrored = np.where(a == b, -1, np.isin(b * self.modulus + a, trained))
        return found | {"mirrored": np.broadcast_to(mirrored[:, None], examples.targets.shape)}

    def group_name(self, split: str, group: int) -> str:
        if split == "mirrored":
            return f"b, a {'trained on' if group else 'held out'}"
        return super().group_name(split, group)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"held_out": 1 - self.training_pairs / self.pairs}
