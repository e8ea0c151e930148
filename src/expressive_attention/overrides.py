"""Tensors that are more than memory: who is told of a call, and torch's own causal masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["as_causality", "listening", "takers", "tell"]


# Types whose own rules would run the function without a use, or give the type of a mask to the output: it knows both.
_CAUSAL_BIAS = ("torch.nn.attention.bias", "CausalBias")  # which takes a second to import
_KNOWN = (_CAUSAL_BIAS, ("torch.nested._internal.nested_tensor", "NestedTensor"))


# The last one takes each call of the public functions in their place: a region of `distributed`.
takers: list[Callable[..., Any]] = []


def listening(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments by which ``__torch_function__`` is told of the call; none: nobody wants to be told."""
    told = tuple(x for x in arguments if not any(_is(x, known) for known in _KNOWN))
    return told if has_torch_function(told) else ()


def tell(function: Callable[..., Any], told: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """Return what those who are told of a call make of it."""
    if takers:
        return takers[-1](function, *args, **kwargs)
    return handle_torch_function(function, told, *args, **kwargs)


def as_causality(attn_mask: Any, rows: int, keys: int, device: torch.device, alone: bool) -> tuple[Any, str | None]:
    """A mask without `torch.nn.attention.bias.CausalBias`: a plain mask, and a causal alignment.

    Args:
        attn_mask: Any mask. One of another type comes back as it is.
        rows: L of the call.
        keys: S of the call.
        device: Device of the call.
        alone: Whether it is all that says which keys a query sees. If so, it can be no mask, but an alignment.
    """
    if not _is(attn_mask, _CAUSAL_BIAS):
        return attn_mask, None
    lower_right = attn_mask.variant.name == "LOWER_RIGHT"
    shape = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
    if alone and shape == (rows, keys):
        return None, "lower_right" if lower_right else "upper_left"
    diagonal = shape[1] - shape[0] if lower_right else 0
    return torch.ones(shape, dtype=torch.bool, device=device).tril(diagonal), None


def _is(x: Any, name: tuple[str, str]) -> bool:
    """Whether it is of the class of that module and name."""
    return any((base.__module__, base.__name__) == name for base in type(x).__mro__)
