"""Calls on devices that need not be there."""

from types import SimpleNamespace
from typing import Any

import torch

from expressive_attention.call import Call, Visibility


def call_on(device: str, dtype: torch.dtype = torch.float32, head_dim: int = 8, dropout_p: float = 0.0) -> Call:
    """A call whose tensors have a device, a dtype and a shape, and nothing else."""
    x: Any = SimpleNamespace(
        device=torch.device(device), is_cpu=device == "cpu", dtype=dtype, shape=(1, 1, 1, head_dim)
    )
    return Call(x, x, x, None, Visibility(), 1.0, "expressive", dropout_p)


def declined_by_func(backend: Any, call: Call) -> str | None:
    """Why a backend declines the call inside of a function whose derivative torch.func takes."""
    reasons = []

    def function(x: torch.Tensor) -> torch.Tensor:
        reasons.append(backend.declines(call))
        return x.sum()

    torch.func.grad(function)(torch.ones(1))
    return reasons[0]
