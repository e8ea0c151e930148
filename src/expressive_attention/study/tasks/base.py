"""What the study asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

__all__ = ["Task"]


class Task(BaseModel, ABC):
    """A family of token sequences whose next token is to be predicted.

    Sequences are integer arrays ``(n, length + 1)``: the model reads the first `length` tokens, and predicts
    each next one. Predictions count at the positions `scored`, where the context determines the answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name, e.g. ``"sum, basis 16, delay 5"``."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of different tokens."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of tokens that the model reads."""

    @property
    @abstractmethod
    def scored(self) -> slice:
        """Positions in [0, length) whose next token the context determines."""

    @abstractmethod
    def training_sequences(self, bits: np.random.Philox, count: int) -> np.ndarray:
        """The next `count` training sequences of a stream, ``(count, length + 1)``."""

    @abstractmethod
    def held_out_sequences(self, count: int, purpose: str) -> np.ndarray:
        """Up to `count` sequences for ``"validation"`` or ``"test"``, the same for every seed.

        The two purposes never share a sequence where the task has enough of them.
        """

    @abstractmethod
    def windows(self, sequences: np.ndarray) -> np.ndarray:
        """Identifiers ``(n, scored)`` of the contexts that determine the scored tokens."""

    @abstractmethod
    def continued(self, sequences: np.ndarray, digits: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts ``(n, p)`` and their true continuations ``(n, digits)``, for rollouts."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What an accuracy is worth here; keys as in `study.results.Condition`."""
