"""Training batches, drawn from one stream of random numbers for each seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import TrainingConfig
from ..tasks import IGNORED, Examples, Task
from ..tasks.rng import stream
from .devices import CPU

__all__ = ["Batches"]


# Training sequences are drawn this many steps at a time.
_STEPS_DRAWN = 128


class Batches:
    """Training batches from each seed's own stream, independent of the seeds beside it."""

    def __init__(
        self,
        task: Task,
        seeds: tuple[int, ...],
        training: TrainingConfig,
        device: torch.device = CPU,
        purpose: str = "training",
    ) -> None:
        self.task, self.size, self.device = task, training.batch_size, device
        self.streams = [stream(seed, purpose) for seed in seeds]
        self.before: list[Any] = []  # states of the streams before what is in `drawn` was drawn
        self.drawn: list[tuple[Tensor, Tensor]] = []  # inputs (seeds, batch, L[, C]) and targets, the next one last

    def next(self, active: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs ``(len(active), batch, L)`` or ``(..., C)`` and targets of the next batch of these seeds."""
        if not self.drawn:
            self._fill(active)
        inputs, targets = self.drawn.pop()
        return inputs[active], targets[active]

    def state(self) -> dict[str, Any]:
        """The positions of the streams, in types that JSON has."""
        streams = [
            {**x, "state": {name: part.tolist() for name, part in x["state"].items()}, "buffer": x["buffer"].tolist()}
            for x in self.before
        ]
        return {"streams": streams, "used": _STEPS_DRAWN - len(self.drawn)}

    def restore(self, state: dict[str, Any], active: list[int]) -> None:
        """Restore a state that `state` gave, for these seeds."""
        for bits, x in zip(self.streams, state["streams"], strict=True):
            parts = {name: np.array(part, dtype=np.uint64) for name, part in x["state"].items()}
            whole: Any = {**x, "state": parts, "buffer": np.array(x["buffer"], dtype=np.uint64)}
            bits.state = whole
        self._fill(active)
        del self.drawn[_STEPS_DRAWN - state["used"] :]

    def _fill(self, active: list[int]) -> None:
        self.before = [bits.state for bits in self.streams]
        parts = {i: self.draw(self.streams[i]) for i in active}
        inputs, targets = (
            self._by_step([getattr(parts[i if i in parts else active[0]], name) for i in range(len(self.streams))])
            for name in ("inputs", "targets")
        )
        self.drawn = list(zip(inputs, targets, strict=True))[::-1]

    def _by_step(self, parts: list[np.ndarray]) -> tuple[Tensor, ...]:
        return torch.from_numpy(np.stack(parts)).to(self.device).unflatten(1, (_STEPS_DRAWN, -1)).unbind(1)

    def draw(self, bits: np.random.Philox) -> Examples:
        drawn = self.task.training_examples(bits, _STEPS_DRAWN * self.size)
        without = (drawn.targets == IGNORED).reshape(_STEPS_DRAWN, -1).all(1)
        if without.any():
            raise ValueError(
                f"{self.task.label}: a training batch of {self.size} examples has no target at all, and nothing to "
                "learn; raise training.batch_size, or have the task give more targets"
            )
        return drawn
