"""NT tasks (Gros, arXiv 2407.18601) seen through noise: several digits together have to tell what one does not."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ..base import IGNORED, Examples, one_in, same_as
from ..sampled import SampledTask, integers
from .nt import NTTask, written

__all__ = ["NoisyTask"]

# The best predictor goes through all starting states, at most this many.
_ENUMERABLE = 1 << 12


class NoisyTask(SampledTask):
    """A sum or difference NT task whose digits are read wrong with a probability; the target is the next true one.

    The sequence x itself goes on undisturbed. In place of a digit x_t the model reads y_t: x_t itself with
    probability 1 - noise, else one of the ``basis - 1`` others, uniformly. The posterior is exact: with all starting
    states s equally probable at first,

        P(s | y_1 ... y_t) ~ (1 - noise)^(t - m_s) (noise / (basis - 1))^m_s

    where m_s is the number of digits at which the sequence from s differs from the context. The best predictor says
    the digit that is most probable under the sum over s.

    Attributes:
        operation: ``"sum"`` or ``"difference"``.
        basis: Number of digits, 2 to 256.
        delay: At least 1; ``basis^delay``, the number of states, is at most 4096.
        noise: Probability that a digit is replaced by another one, between 0 and 1.
        context: Tokens that the model reads, at least `delay`; None: ``3 * delay``.
    """

    revision = 2  # before, training, validation and test shared their examples where there were few states
    kind: Literal["noisy"] = "noisy"  # pyright: ignore[reportIncompatibleVariableOverride]
    operation: Literal["sum", "difference"] = "sum"
    basis: int = Field(default=4, ge=2, le=1 << 8)
    delay: int = Field(default=3, ge=1, le=12)
    noise: float = Field(default=0.1, gt=0, lt=1)
    context: int | None = None

    @model_validator(mode="after")
    def _fits(self) -> NoisyTask:
        if self.context is not None and self.context < self.delay:
            raise ValueError(f"context must be at least delay = {self.delay}, got {self.context}")
        if self.basis**self.delay > _ENUMERABLE:
            raise ValueError(
                f"basis^delay must be at most {_ENUMERABLE}, so that the best predictor can go through all states, "
                f"got {self.basis}^{self.delay}"
            )
        return self

    @cached_property
    def clean(self) -> NTTask:
        """The task without noise."""
        return NTTask(operation=self.operation, basis=self.basis, delay=self.delay, context=self.length)

    @property
    def label(self) -> str:
        context = "" if self.context is None else f", context {self.context}"
        return f"noisy {self.operation}, basis {self.basis}, delay {self.delay}, noise {self.noise!r}{context}"

    @property
    def formula(self) -> str:
        rule = written([self.operation], self.delay, self.basis)
        return f"{rule}; {100 * self.noise:g}% of the digits are read wrong"

    vocab_size = same_as("basis")

    @property
    def length(self) -> int:
        return 3 * self.delay if self.context is None else self.context

    @property
    def problems(self) -> int:
        return self.basis**self.length  # noise makes any digits out of any others

    @property
    def complexity(self) -> float:
        """log2 of the number of states."""
        return self.delay * math.log2(self.basis)

    chance = one_in("basis")

    def draw(self, bits: np.random.Philox, count: int) -> Examples:
        starts = integers(bits, (count, self.delay), self.basis)
        sequences = self.clean.sequences(starts, self.length + 1)
        shape = (count, self.length)
        replaced = (bits.random_raw(math.prod(shape)) >> np.uint64(11)).reshape(shape) * 2.0**-53 < self.noise
        others = sequences[:, :-1] + 1 + integers(bits, shape, self.basis - 1)
        targets = sequences[:, 1:].copy()
        targets[:, : self.delay - 1] = IGNORED
        return Examples(np.where(replaced, others % self.basis, sequences[:, :-1]), targets)

    def probabilities(self, inputs: np.ndarray) -> np.ndarray:
        """Probabilities of each next digit under the best predictor, ``(n, L, basis)``."""
        number = np.arange(self.basis**self.delay)
        starts = np.stack([number // self.basis**i % self.basis for i in range(self.delay)], axis=1)
        sequences = self.clean.sequences(starts, self.length + 1)
        ratio = math.log(self.noise / (self.basis - 1)) - math.log1p(-self.noise)
        found = np.empty((*inputs.shape, self.basis))
        for first in range(0, len(inputs), 128):  # of which all states fit into a few megabytes
            part = slice(first, first + 128)
            logs = np.zeros((len(inputs[part]), len(sequences)))
            for t in range(self.length):
                logs += ratio * (inputs[part, t, None] != sequences[:, t])
                weights = np.exp(logs - logs.max(1, keepdims=True))
                digits = weights @ np.eye(self.basis)[sequences[:, t + 1]]
                found[part, t] = digits / digits.sum(1, keepdims=True)
        return found

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        return self.probabilities(inputs).argmax(-1)

    def ceiling(self, examples: Examples) -> np.ndarray:
        return self.probabilities(examples.inputs).max(-1)
