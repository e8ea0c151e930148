"""Linear recurrences modulo the basis, of which sum and difference NT tasks are the simplest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from .recurrence import Recurrence

__all__ = ["LinearTask"]


class LinearTask(Recurrence):
    """x_t = (a_1 x_{t-1} + a_2 x_{t-2} + ... + a_delay x_{t-delay}) mod basis.

    Attributes:
        coefficients: a_1 to a_delay; the last one is not a multiple of `basis`.
        basis: Number of digits, at least 2.
        delay: Number of coefficients; need not be given.
        context: Tokens that the model reads, at least `delay`; None: ``delay + 1``.
    """

    kind: Literal["linear"] = "linear"  # pyright: ignore[reportIncompatibleVariableOverride]
    coefficients: Annotated[tuple[int, ...], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _delay_is_the_number_of_coefficients(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("coefficients"), (list, tuple)):
            coefficients = tuple(values["coefficients"])  # a list is not one to a strict model
            return {"delay": len(coefficients), **values, "coefficients": coefficients}
        return values

    @model_validator(mode="after")
    def _coefficients_fit(self) -> LinearTask:
        if len(self.coefficients) != self.delay:
            raise ValueError(f"delay must be the number of coefficients, {len(self.coefficients)}, got {self.delay}")
        if self.coefficients[-1] % self.basis == 0:
            raise ValueError(f"coefficients must end with one that is not 0 mod basis, got {list(self.coefficients)}")
        return self

    @property
    def label(self) -> str:
        terms = " ".join(str(a) for a in self.coefficients)
        return f"linear {terms}, basis {self.basis}{self.with_context}"

    @property
    def formula(self) -> str:
        terms = " + ".join(
            f"{'' if a == 1 else a} x(t \N{MINUS SIGN} {delay})".strip()
            for delay, a in enumerate(self.coefficients, 1)
            if a
        )
        return f"x(t) = {terms}, mod {self.basis}"

    def following(self, states: np.ndarray) -> np.ndarray:
        return states[:, ::-1] @ np.array(self.coefficients, dtype=np.int64) % self.basis
