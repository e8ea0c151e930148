"""Composition of permutations: the word problem of the symmetric group, the standard probe of state tracking.

For 5 and more elements the group is not solvable, and the problem is complete for NC^1 (Barrington, 1989): unless
TC^0 = NC^1, no transformer of fixed depth solves it at every length (Merrill et al., arXiv 2404.08819), but one whose
depth grows with the logarithm of the length does (Liu et al., arXiv 2210.10749).
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field

from .base import IGNORED, Examples, one_in, worded
from .sampled import SampledTask, after_start, integers

__all__ = ["PermutationTask"]


class PermutationTask(SampledTask):
    """One token per element of S_degree, and at each position the product of all so far is to be said.

    Tokens number the permutations in lexicographic order, 0 being the identity. The first one acts first: the target
    at position t is g_t o ... o g_1, with (g o h)(i) = g(h(i)).

    Attributes:
        degree: Number of things that are permuted, 2 to 6.
        context: Number of permutations, at least 2; at the first of them the target is the token itself.
        start: Whether a token of its own, the last number, comes before them. Without one, a model that sees distances
            alone (RoPE) cannot tell a run of equal permutations from a single one.
    """

    kind: Literal["permutation"] = "permutation"  # pyright: ignore[reportIncompatibleVariableOverride]
    degree: int = Field(default=5, ge=2, le=6)
    context: int = Field(default=8, ge=2, le=1 << 14)
    start: bool = False

    @property
    def label(self) -> str:
        return f"permutations of {self.degree}, context {self.context}{', start token' if self.start else ''}"

    formula = worded("the order of {degree} things after all swaps so far")

    @property
    def elements(self) -> int:
        """Number of permutations."""
        return math.factorial(self.degree)

    @property
    def vocab_size(self) -> int:
        return self.elements + self.start

    @property
    def length(self) -> int:
        return self.context + self.start

    @property
    def problems(self) -> int:
        return self.elements**self.context

    @property
    def complexity(self) -> float:
        """log2 of the number of sequences, as for the parity; the state is one of ``factorial(degree)``."""
        return self.context * math.log2(self.elements)

    chance = one_in("elements")

    def draw(self, bits: np.random.Philox, count: int) -> Examples:
        inputs = integers(bits, (count, self.context), self.elements)
        inputs = after_start(inputs, self.elements) if self.start else inputs
        return Examples(inputs, self.solve(inputs))

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        products = _products(self.degree)
        found = inputs.copy()
        found[:, : int(self.start)] = IGNORED
        for t in range(1 + self.start, inputs.shape[1]):
            found[:, t] = products[inputs[:, t], found[:, t - 1]]
        return found


@lru_cache(maxsize=8)
def _products(degree: int) -> np.ndarray:
    """Number of g o h, by the numbers of g and h, ``(degree!, degree!)``."""
    elements = np.array(list(itertools.permutations(range(degree))))
    powers = degree ** np.arange(degree)[::-1]  # a permutation's digits as a number: ascending, as the order is
    composed = elements[:, elements]  # [g, h, i] = g(h(i))
    return np.searchsorted(elements @ powers, composed @ powers)
