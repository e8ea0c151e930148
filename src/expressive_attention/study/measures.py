"""What is measured on an ensemble of models."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .tasks import Task

__all__ = ["accuracy", "rollouts", "windows_seen"]


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, sequences: Tensor, members: int) -> Tensor:
    """Share ``(R,)`` of scored next tokens that each member predicts; one that is not finite is wrong.

    Args:
        model: Ensemble, tokens ``(R, n, L)`` to logits ``(R, n, L, V)``.
        task: Says which positions count.
        sequences: ``(n, L + 1)``, the same for every member.
        members: R.
    """
    logits = model(sequences[:, :-1].expand(members, -1, -1))[:, :, task.scored]
    right = _predicted(logits) == sequences[:, 1:][:, task.scored]
    return right.to(torch.float64).mean((1, 2))


@torch.no_grad()
def rollouts(model: nn.Module, task: Task, sequences: np.ndarray, digits: int, members: int) -> tuple[Tensor, Tensor]:
    """Autoregressive continuation: each member reads what it has predicted itself.

    Returns:
        Share ``(R,)`` of the following digits that are right, and share of rollouts with all of them right.
    """
    prompts, truth = (torch.from_numpy(np.ascontiguousarray(x)) for x in task.continued(sequences, digits))
    tokens = prompts.expand(members, -1, -1)
    predicted = []
    for _ in range(digits):
        predicted.append(_predicted(model(tokens[:, :, -task.length :])[:, :, -1]))
        tokens = torch.cat([tokens, predicted[-1].clamp(min=0).unsqueeze(-1)], dim=-1)
    right = torch.stack(predicted, dim=-1) == truth
    return right.to(torch.float64).mean((1, 2)), right.all(-1).to(torch.float64).mean(1)


def windows_seen(task: Task, training: list[np.ndarray], test: np.ndarray) -> float:
    """Share of the test windows that also occur in the training sequences."""
    windows = task.windows(test)
    seen = np.unique(np.concatenate([task.windows(part).ravel() for part in training]))
    return float(np.isin(windows, seen).mean())


def _predicted(logits: Tensor) -> Tensor:
    """The most likely token; -1, which is none, where a logit is not finite."""
    return logits.argmax(-1).masked_fill_(~logits.isfinite().all(-1), -1)
