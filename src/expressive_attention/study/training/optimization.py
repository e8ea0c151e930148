"""The optimizer, its learning rate, and one step of all seeds."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import TrainingConfig
from ..tasks import IGNORED

__all__ = ["learning_rate_factor", "make_optimizer", "train_step"]


def learning_rate_factor(step: int, training: TrainingConfig) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, then constant or a cosine to 0."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    if training.schedule == "constant":
        return 1.0
    progress = (step - training.warmup) / max(1, training.steps - training.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, learning_rate: float, training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration asks for."""
    parameters = list(model.parameters())
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, learning_rate, momentum=training.momentum, weight_decay=training.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        parameters, learning_rate, betas=training.betas, weight_decay=training.weight_decay, fused=True
    )


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, gradient_clip: float | None
) -> Tensor:
    """One step of every member; their losses ``(R,)``, the mean cross-entropy over the positions with a target."""
    optimizer.zero_grad()
    logits = model(inputs)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
    counts = (targets != IGNORED).flatten(1).sum(1).clamp(min=1)
    losses = losses.view(len(targets), -1).sum(1) / counts
    losses.sum().backward()
    if gradient_clip is not None:
        _clip(list(model.parameters()), gradient_clip)
    optimizer.step()
    return losses.detach()


def _clip(parameters: list[nn.Parameter], limit: float) -> None:
    """Scale each member's gradient to a norm of at most `limit`."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *(1,) * (g.ndim - 1)))
