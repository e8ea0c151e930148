"""NT tasks: integer sequences with a delayed recurrence (Gros, arXiv 2407.18601).

    x_t = (x_{t-1} + x_{t-delay}) mod basis     (sum)
    x_t = (x_{t-1} - x_{t-delay}) mod basis     (difference)
    x_t = (x_{t-1} * x_{t-delay}) mod basis     (product; digits 1 to basis - 1 of a prime basis)

started from `delay` random digits. Basis 2 is the delayed XOR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import model_validator

from .recurrence import Recurrence

__all__ = ["NTTask", "combined", "written"]

Operation = Literal["sum", "difference", "product"]
_SIGNS = {"sum": "+", "difference": "\N{MINUS SIGN}", "product": "\N{MULTIPLICATION SIGN}"}  # of formulas for people


def combined(operation: Operation, last: np.ndarray, delayed: np.ndarray, basis: int) -> np.ndarray:
    """The digit that follows from the last and the delayed one."""
    if operation == "product":
        return last * delayed % basis
    return (last + delayed if operation == "sum" else last - delayed) % basis


def written(operations: Sequence[Operation], delay: int | str, basis: int) -> str:
    """The rule as people write it; where there are several operations, any of them."""
    sign = " or ".join(_SIGNS[operation] for operation in operations)
    return f"x(t) = x(t \N{MINUS SIGN} 1) {sign} x(t \N{MINUS SIGN} {delay}), mod {basis}"


class NTTask(Recurrence):
    """x_t = (x_{t-1} + x_{t-delay}) mod basis, or with another operation.

    Attributes:
        operation: ``"sum"``, ``"difference"`` or ``"product"``.
        basis: Number of digits, at least 2; for products, a prime of at least 3.
        delay: At least 1.
        context: Tokens that the model reads, at least `delay`; None: ``delay + 1``.
    """

    kind: Literal["nt"] = "nt"  # pyright: ignore[reportIncompatibleVariableOverride]
    operation: Operation = "sum"

    @model_validator(mode="after")
    def _products_stay_above_0(self) -> NTTask:
        if self.operation == "product" and not _is_odd_prime(self.basis):
            raise ValueError(f"basis must be a prime of at least 3 where operation is product, got {self.basis}")
        return self

    @property
    def label(self) -> str:
        return f"{self.operation}, basis {self.basis}, delay {self.delay}{self.with_context}"

    @property
    def formula(self) -> str:
        return written([self.operation], self.delay, self.basis)

    @property
    def lowest(self) -> int:
        return 1 if self.operation == "product" else 0

    def following(self, states: np.ndarray) -> np.ndarray:
        return combined(self.operation, states[:, -1], states[:, 0], self.basis)


def _is_odd_prime(n: int) -> bool:
    return n > 2 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
