"""Tensors that are more than memory: who is told of a call, and torch's own causal masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

__all__ = ["as_causality", "listening"]


def listening(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments by which ``__torch_function__`` is told of the call; none: nobody wants to be told.

    Jagged tensors and causal biases are left out. The function knows both, and their own rules would run it without
    a use, or give the type of the mask to the output.
    """
    told = tuple(x for x in arguments if not (_is_causal_bias(x) or _is_jagged(x)))
    return told if has_torch_function(told) else ()


def as_causality(attn_mask: Any, rows: int, keys: int, device: torch.device, alone: bool) -> tuple[Any, str | None]:
    """A mask without `torch.nn.attention.bias.CausalBias`: a plain mask, and a causal alignment.

    Args:
        attn_mask: Any mask. One of another type comes back as it is.
        rows: L of the call.
        keys: S of the call.
        device: Device of the call.
        alone: Whether it is all that says which keys a query sees. If so, it can be no mask, but an alignment.
    """
    if not _is_causal_bias(attn_mask):
        return attn_mask, None
    lower_right = attn_mask.variant.name == "LOWER_RIGHT"
    shape = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
    if alone and shape == (rows, keys):
        return None, "lower_right" if lower_right else "upper_left"
    diagonal = shape[1] - shape[0] if lower_right else 0
    return torch.ones(shape, dtype=torch.bool, device=device).tril(diagonal), None


def _is_causal_bias(x: Any) -> bool:
    # By name: to import the module takes a second.
    return any(
        base.__name__ == "CausalBias" and base.__module__ == "torch.nn.attention.bias" for base in type(x).__mro__
    )


def _is_jagged(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.jagged
