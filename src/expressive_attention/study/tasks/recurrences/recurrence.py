"""Sequences in which the digit `delay` steps back, and those since, determine the next one."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field, model_validator
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from ..base import IGNORED, Examples, Task, one_in, same_as
from ..rng import stream

__all__ = ["Recurrence", "mixed"]

# Spaces up to this size are enumerated.
_ENUMERABLE = 1 << 20

# One of this many starting states is held out of training, in spaces of at least twice as many states.
_HELD_OUT = 8

# Training sequences with up to so many states never pass through one that is held out; in longer ones too few starts
# would be left.
_AVOIDED = 4


class Recurrence(Task):
    """x_t = F(x_{t-delay}, ..., x_{t-1}), started from `delay` random digits.

    The last `delay` digits are the state, and a sequence walks through the cycles that F makes of the states.

    Attributes:
        basis: Number of digits, at least 2.
        delay: At least 1.
        context: Tokens that the model reads, at least `delay`; None: ``delay + 1``.
    """

    basis: int = Field(ge=2, le=1 << 16)
    delay: int = Field(ge=1, le=1 << 10)
    context: int | None = None

    @model_validator(mode="after")
    def _context_holds_the_delay(self) -> Recurrence:
        if self.context is not None and self.context < self.delay:
            raise ValueError(f"context must be at least delay = {self.delay}, got {self.context}")
        return self

    @abstractmethod
    def following(self, states: np.ndarray) -> np.ndarray:
        """The next digit ``(n,)`` after the last `delay` ones ``(n, delay)``."""

    @property
    def lowest(self) -> int:
        """The lowest digit of a starting state; F must not lead below it."""
        return 0

    @property
    def with_context(self) -> str:
        """The end of the label: the context, where it is not the usual one."""
        return "" if self.context is None else f", context {self.context}"

    vocab_size = same_as("basis")

    @property
    def length(self) -> int:
        return self.delay + 1 if self.context is None else self.context

    @property
    def choices(self) -> int:
        """Number of digits that a starting state is made of."""
        return self.basis - self.lowest

    @property
    def state_space(self) -> int:
        """Number of states: choices^delay."""
        return self.choices**self.delay

    # ---- sequences ----

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Sequences ``(n, length)`` that begin with the digits `starts` ``(n, delay)``."""
        x = np.empty((len(starts), max(length, self.delay)), dtype=np.int64)
        x[:, : self.delay] = starts
        for t in range(self.delay, length):
            x[:, t] = self.following(x[:, t - self.delay : t])
        return x[:, :length]

    def training_examples(self, bits: np.random.Philox, count: int) -> Examples:
        return self._examples(self.training_starts(bits, count))

    def held_out_examples(self, count: int, purpose: str) -> Examples:
        return self._examples(self.held_out_starts(count, purpose))

    def _examples(self, starts: np.ndarray) -> Examples:
        sequences = self.sequences(starts, self.length + 1)
        targets = sequences[:, 1:].copy()
        targets[:, : self.delay - 1] = IGNORED
        return Examples(sequences[:, :-1], targets)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        predictions = np.full(inputs.shape, IGNORED)
        for t in range(self.delay, inputs.shape[1] + 1):
            predictions[:, t - 1] = self.following(inputs[:, t - self.delay : t])
        return predictions

    def contexts(self, examples: Examples) -> np.ndarray:
        states = np.lib.stride_tricks.sliding_window_view(examples.inputs, self.delay, axis=1)
        return self._identifiers(states)

    def continued(self, examples: Examples, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        prompts = examples.inputs[:, : self.delay]
        return prompts, self.sequences(prompts, self.delay + tokens)[:, self.delay :]

    # ---- starting states ----

    def training_starts(self, bits: np.random.Philox, count: int) -> np.ndarray:
        """The next `count` starting states ``(count, delay)`` of a stream, none of which is held out.

        Nor do their sequences lead to a state that is, where they are short.
        """
        starts = self._digits(bits, count)
        while (held := self._leads_to_held_out(starts)).any():
            starts[held] = self._digits(bits, int(held.sum()))
        return starts

    def held_out_starts(self, count: int, purpose: str) -> np.ndarray:
        """Up to `count` starting states for a purpose."""
        index = ("validation", "test").index(purpose)
        starts = self._held_out_starts(2 * count)
        if self._threshold() is not None:  # else every state serves for both
            starts = starts[index::2]
        return starts[:count]

    def _digits(self, bits: np.random.Philox, count: int) -> np.ndarray:
        raw = bits.random_raw(count * self.delay).reshape(count, self.delay)
        return (raw % np.uint64(self.choices)).astype(np.int64) + self.lowest

    def _identifiers(self, states: np.ndarray) -> np.ndarray:
        """A uint64 per state ``(..., delay)``: its number in base `choices`, modulo 2^64."""
        powers = np.array([pow(self.choices, i, 1 << 64) for i in range(self.delay)], dtype=np.uint64)
        return ((states - self.lowest).astype(np.uint64) * powers).sum(-1, dtype=np.uint64)

    # ---- which states are held out ----

    def _threshold(self) -> np.uint64 | None:
        """States whose hash lies below it are held out; None: the space is too small."""
        return _held_out_threshold(self)  # pyright: ignore[reportArgumentType]: frozen, so hashable

    def _is_held_out(self, starts: np.ndarray) -> np.ndarray:
        threshold = self._threshold()
        if threshold is None:
            return np.zeros(len(starts), dtype=bool)
        return mixed(self._identifiers(starts)) < threshold

    def _leads_to_held_out(self, starts: np.ndarray) -> np.ndarray:
        """Whether a training sequence must not start here."""
        held = self._is_held_out(starts)
        if not _avoids_held_out(self):  # pyright: ignore[reportArgumentType]: frozen, so hashable
            return held
        sequences = self.sequences(starts, self.length)
        for t in range(1, self.length - self.delay + 1):
            held |= self._is_held_out(sequences[:, t : t + self.delay])
        return held

    def _held_out_starts(self, count: int) -> np.ndarray:
        """Up to `count` different starting states that training never uses, in a fixed random order."""
        if self.state_space <= _ENUMERABLE:
            states = self._all_states()
            if self._threshold() is not None:
                states = states[self._is_held_out(states)]
            order = np.argsort(mixed(mixed(self._identifiers(states))), kind="stable")
            return states[order[:count]]
        bits = stream(0, f"held out: {self.label}")
        found = np.empty((0, self.delay), dtype=np.int64)
        while len(found) < count:
            drawn = self._digits(bits, _HELD_OUT * count)
            found = np.concatenate([found, drawn[self._is_held_out(drawn)]])
            _, first = np.unique(found, axis=0, return_index=True)
            found = found[np.sort(first)]
        return found[:count]

    def _all_states(self) -> np.ndarray:
        number = np.arange(self.state_space, dtype=np.int64)
        return np.stack([number // self.choices**i % self.choices for i in range(self.delay)], axis=1) + self.lowest

    # ---- what a number is worth ----

    def cycles(self) -> dict[int, int] | None:
        """Number of cycles of each length that the recurrence makes of the states; None: too many to enumerate."""
        if self.state_space > _ENUMERABLE:
            return None
        return dict(_cycles(self))  # pyright: ignore[reportArgumentType]: frozen, so hashable

    @property
    def complexity(self) -> float:
        return self.delay * math.log2(self.choices)

    chance = one_in("choices")

    def facts(self) -> dict[str, Any]:
        held_out = 0.0
        if self._threshold() is not None:
            held_out = self.state_space // _HELD_OUT / self.state_space
        return super().facts() | {
            "state_space": self.state_space,
            "cycles": _cycles_in_words(self.cycles()),
            "held_out": held_out,
        }


@lru_cache(maxsize=64)
def _held_out_threshold(task: Recurrence) -> np.uint64 | None:
    if task.state_space < 2 * _HELD_OUT:
        return None
    if task.state_space > _ENUMERABLE:
        return np.uint64((1 << 64) // _HELD_OUT)
    hashes = np.sort(mixed(np.arange(task.state_space, dtype=np.uint64)))
    return hashes[task.state_space // _HELD_OUT]


@lru_cache(maxsize=64)
def _avoids_held_out(task: Recurrence) -> bool:
    """Whether training sequences can avoid all states that are held out, with at least half of the starts left."""
    states = task.length - task.delay + 1
    if task._threshold() is None or not 1 < states <= _AVOIDED:
        return False
    starts = task._digits(stream(0, "starts that lead to held-out states"), 1 << 14)
    held, sequences = task._is_held_out(starts), task.sequences(starts, task.length)
    left = ~held
    for t in range(1, states):
        left &= ~task._is_held_out(sequences[:, t : t + task.delay])
    return 2 * int(left.sum()) >= int((~held).sum())


@lru_cache(maxsize=64)
def _cycles(task: Recurrence) -> tuple[tuple[int, int], ...]:
    states = task._all_states()
    following = task._identifiers(task.sequences(states, task.delay + 1)[:, 1:]).astype(np.int64)
    on_cycle = np.arange(task.state_space)
    while len(image := np.unique(following[on_cycle])) < len(on_cycle):  # states without a past drop out
        on_cycle = image
    n = task.state_space
    graph = csr_array((np.ones(len(on_cycle)), (on_cycle, following[on_cycle])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    lengths = np.unique(component[on_cycle], return_counts=True)[1]
    return tuple(sorted(Counter(lengths.tolist()).items()))


def _cycles_in_words(cycles: dict[int, int] | None) -> str:
    if cycles is None:
        return "not enumerated"
    total = sum(cycles.values())
    shown = list(cycles.items()) if len(cycles) <= 6 else [*list(cycles.items())[:3], *list(cycles.items())[-2:]]
    parts = [f"{count} of length {length}" for length, count in shown]
    if len(shown) < len(cycles):
        parts.insert(3, "...")
    return f"{total} ({', '.join(parts)})"


def mixed(x: np.ndarray) -> np.ndarray:
    """A hash of uint64 numbers: the finalizer of SplitMix64 (Steele et al., 2014), a bijection."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
