"""Tasks whose examples are drawn independently of one another from one distribution."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np

from .base import IGNORED, Examples, Task
from .recurrences.recurrence import mixed
from .rng import stream

__all__ = ["SampledTask", "after_start", "by_distance", "distinct", "integers", "prefix_identifiers"]

# One of this many inputs is for validation alone, and one for test alone.
_SHARES = 16

# With fewer different inputs than this, all serve for everything.
_ENOUGH = 256

# Held-out examples are picked from this many at a time, so that a larger set begins with a smaller one.
_DRAWN = 4096


class SampledTask(Task):
    """Examples are drawn at random, and a hash of the inputs tells those for training, validation and test apart.

    One in 16 inputs is for validation and one for test, unless there are fewer than 256 different ones. The targets do
    not depend on the hash, so each part follows the distribution of the task.
    """

    @property
    @abstractmethod
    def problems(self) -> int:
        """Number of different inputs, or a lower bound of it."""

    @abstractmethod
    def draw(self, bits: np.random.Philox, count: int) -> Examples:
        """The next `count` examples of a stream, for whatever purpose."""

    def training_examples(self, bits: np.random.Philox, count: int) -> Examples:
        return self._picked(bits, count, range(2, _SHARES))

    def held_out_examples(self, count: int, purpose: str) -> Examples:
        share = ("validation", "test").index(purpose)
        return self._picked(stream(0, f"held out, {purpose}: {self.label}"), count, [share], _DRAWN)

    def _picked(
        self, bits: np.random.Philox, count: int, shares: Iterable[int], at_a_time: int | None = None
    ) -> Examples:
        """The first `count` examples of these shares; drawn are as many as are missing, or `at_a_time`."""
        parts, missing = [self.draw(bits, 0)], count
        while missing > 0:
            drawn = self.draw(bits, at_a_time or missing)
            if self.problems >= _ENOUGH:
                drawn = drawn[np.isin(_share(drawn.inputs), list(shares))]
            parts.append(drawn[:missing])
            missing -= len(parts[-1])
        return Examples(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("inputs", "targets")))

    def contexts(self, examples: Examples) -> np.ndarray:
        """The tokens up to each position, from the first that is asked on: a held-out input begins like others."""
        asked = (examples.targets != IGNORED).any(0)
        return prefix_identifiers(examples.inputs)[:, asked.argmax() :]

    def group_name(self, split: str, group: int) -> str:
        if split == "distance":
            return f"distance {2**group} to {2 * 2**group - 1}" if group else "distance 1"
        return super().group_name(split, group)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"held_out": 2 / _SHARES if self.problems >= _ENOUGH else 0.0}


def integers(bits: np.random.Philox, shape: tuple[int, ...], below: int) -> np.ndarray:
    """Integers from 0 to ``below - 1``, uniform and independent, int64."""
    return (bits.random_raw(math.prod(shape)) % np.uint64(below)).astype(np.int64).reshape(shape)


def distinct(bits: np.random.Philox, count: int, below: int, number: int) -> np.ndarray:
    """Rows ``(count, number)`` of different integers from 0 to ``below - 1``; all orders are equally probable."""
    raw = bits.random_raw(count * number).reshape(count, number)
    found = np.empty((count, number), dtype=np.int64)
    for i in range(number):
        rank = (raw[:, i] % np.uint64(below - i)).astype(np.int64)  # among those not taken
        taken = np.sort(found[:, :i], axis=1)
        found[:, i] = rank + (taken - np.arange(i) <= rank[:, None]).sum(1)
    return found


def after_start(tokens: np.ndarray, start: int) -> np.ndarray:
    """The tokens ``(n, L)`` after a column of `start`, ``(n, L + 1)``."""
    return np.pad(tokens, ((0, 0), (1, 0)), constant_values=start)


def prefix_identifiers(inputs: np.ndarray) -> np.ndarray:
    """A hash, uint64, of the tokens ``(n, L)`` up to each position."""
    found = inputs.T.astype(np.uint64, order="C")  # (L, n): a position's tokens side by side
    last = np.zeros(len(inputs), dtype=np.uint64)
    for tokens in found:
        last = tokens[:] = mixed(last + tokens)
    return found.T


def by_distance(distance: np.ndarray) -> np.ndarray:
    """Groups of a split by ``"distance"``: 0 for 1, 1 for 2 and 3, 2 for 4 to 7, ...; -1 where it is below 1."""
    return np.frexp(np.maximum(distance, 0))[1].astype(np.int64) - 1


def _share(inputs: np.ndarray) -> np.ndarray:
    return (prefix_identifiers(inputs)[:, -1] % np.uint64(_SHARES)).astype(np.int64)
