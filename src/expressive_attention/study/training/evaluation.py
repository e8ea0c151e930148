"""Measures of an ensemble of models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tasks import IGNORED, Examples, Task
from .devices import CPU

__all__ = ["Prepared", "Scores", "rollouts", "score"]


@dataclass(frozen=True)
class Prepared:
    """Examples as tensors on the model's device.

    Attributes:
        inputs: ``(n, L)`` or ``(n, L, C)``.
        targets: ``(n, L)``.
        scored: Positions ``(n, L)`` that count.
    """

    inputs: Tensor
    targets: Tensor
    scored: Tensor

    @classmethod
    def of(cls, task: Task, examples: Examples, device: torch.device = CPU) -> Prepared:
        """The examples of a task, on a device."""
        arrays = (examples.inputs, examples.targets, task.scored(examples))
        return cls(*(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in arrays))


@dataclass(frozen=True)
class Scores:
    """Scores of each member.

    Attributes:
        accuracy: Share ``(R,)`` of scored targets that are predicted.
        cross_entropy: Mean ``(R,)`` of -ln p(target) over the scored positions, in nats.
        right: Whether the prediction is the target, ``(R, n, L)``; a prediction that is not finite is wrong.
    """

    accuracy: Tensor
    cross_entropy: Tensor
    right: Tensor


@torch.no_grad()
def score(model: nn.Module, examples: Prepared, members: int, batch: int = 128) -> Scores:
    """Score each member of an ensemble, ``(R, n, L)`` to logits ``(R, n, L, V)``, on the same examples.

    It takes as many examples at a time as fit into the cache, and never many logits at once.
    """
    right, losses = [], []
    for inputs, targets in zip(examples.inputs.split(batch), examples.targets.split(batch), strict=True):
        logits = model(inputs.expand(members, *inputs.shape))
        wanted = targets.expand(members, *targets.shape)
        right.append(_predicted(logits) == wanted)
        loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none", ignore_index=IGNORED)
        losses.append(loss.view(wanted.shape))
    all_right, all_losses = torch.cat(right, 1), torch.cat(losses, 1)
    return Scores(
        all_right[:, examples.scored].to(torch.float64).mean(1),
        all_losses[:, examples.scored].to(torch.float64).mean(1),
        all_right,
    )


@torch.no_grad()
def rollouts(
    model: nn.Module, task: Task, examples: Examples, tokens: int, members: int, device: torch.device = CPU
) -> tuple[Tensor, Tensor] | None:
    """Autoregressive continuation: each member reads what it has predicted itself.

    Returns:
        Share ``(R,)`` of the following tokens that are right, and share of rollouts with all of them right; None
        where the task has no rollouts.
    """
    continued = task.continued(examples, tokens)
    if continued is None:
        return None
    prompts, truth = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in continued)
    read = prompts.expand(members, -1, -1)
    predicted = []
    for _ in range(tokens):
        predicted.append(_predicted(model(read[:, :, -task.length :])[:, :, -1]))
        read = torch.cat([read, predicted[-1].clamp(min=0).unsqueeze(-1)], dim=-1)
    right = torch.stack(predicted, dim=-1) == truth
    return right.to(torch.float64).mean((1, 2)), right.all(-1).to(torch.float64).mean(1)


def _predicted(logits: Tensor) -> Tensor:
    """The most likely class; -1, which is no class, where a logit is not finite."""
    return logits.argmax(-1).masked_fill_(~logits.isfinite().all(-1), -1)
