"""Five kinds of attention for small models that differ in nothing else, and the training that they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from expressive_attention import expressive_attention
from expressive_attention.nn import SelfAttention, Transformer

__all__ = ["KINDS", "model_of", "train"]

KINDS = ("EA", "EA in a window", "squared", "near and far", "softmax")


class _Windowed(SelfAttention):
    """EA of the last `window` keys alone."""

    window: int

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = self.heads(x)
        log_decay = self._log_decay()
        slopes = None if log_decay is None else -log_decay
        y = expressive_attention(q, k, v, is_causal=True, window_size=(self.window - 1, -1), alibi_slopes=slopes)
        return self.out(y.transpose(-3, -2).flatten(-2))


def model_of(kind: str, seed: int, window: int, **options: Any) -> Transformer:
    """The model of one kind; those of a seed start with the same parameters."""
    torch.manual_seed(seed)
    mechanism = {"squared": "squared", "softmax": "dot_product"}.get(kind, "expressive")
    model = Transformer(mechanism=mechanism, window=window if kind == "near and far" else None, **options)
    if kind == "EA in a window":
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.__class__ = _Windowed
                cast(_Windowed, module).window = window
    return model


def train(model: Transformer, steps: int, rate: float, loss_at: Callable[[int], Tensor]) -> None:
    """AdamW with a short warm-up and a cosine; `loss_at` has the loss of a step, whose number it is given."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * n / steps))
    )
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
