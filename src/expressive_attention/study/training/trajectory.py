"""The evaluations of one seed during its training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.schema import TrainingConfig

__all__ = ["Trajectory"]


@dataclass
class Trajectory:
    """The evaluations of one seed, and conclusions from them."""

    training: TrainingConfig
    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    cross_entropy: float = math.nan  # of the last evaluation
    diverged_at: int | None = None

    @property
    def streak(self) -> int:
        """Number of evaluations at the end that reach the accuracy of a solved task."""
        count = 0
        for value in reversed(self.accuracies):
            if value < self.training.solved_accuracy:
                break
            count += 1
        return count

    @property
    def solved(self) -> bool:
        """Whether the last evaluations reach the accuracy of a solved task."""
        return self.diverged_at is None and self.streak >= self.training.solved_evaluations

    @property
    def ended(self) -> bool:
        """Whether further training would be useless."""
        return self.diverged_at is not None

    def add(self, step: int, loss: float, value: float, cross_entropy: float = math.nan) -> None:
        """Record an evaluation, unless the seed has ended."""
        if self.ended:
            return
        self.steps.append(step)
        self.losses.append(loss)
        self.accuracies.append(value)
        self.cross_entropy = cross_entropy
        if not math.isfinite(loss):
            self.diverged_at = step
