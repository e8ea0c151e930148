"""How many floating-point operations the operators count in `torch.utils.flop_counter`: as many as SDPA's."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .backends.pattern import Pattern

__all__ = ["register"]

_SIZE = len(Pattern._fields)


def register() -> None:
    """Give the formulas to the counters of torch, now and for those to come.

    To import torch's module takes longer than to import this library, and it may be imported later: so whoever runs
    the operators calls this where a counter may be active.
    """
    counters = sys.modules.get("torch.utils.flop_counter")
    if counters is None:
        return
    packets = torch.ops.expressive_attention
    if packets.attention not in counters.flop_registry:
        counters.register_flop_formula(packets.attention, get_raw=True)(_forward)
        counters.register_flop_formula(packets.attention_backward, get_raw=True)(_backward)
    for mode in _get_current_dispatch_mode_stack():
        counter: Any = getattr(mode, "counter", mode)
        if isinstance(counter, counters.FlopCounterMode):
            for packet in (packets.attention, packets.attention_backward):
                counter.flop_registry.setdefault(packet, counters.flop_registry[packet])


def _forward(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any, **_: Any) -> int:
    """Scores and output: two products."""
    return 2 * _pairs(query, key, Pattern(*rest[:_SIZE])) * (query.shape[-1] + value.shape[-1])


def _backward(
    grad_output: Tensor, grad_normalizer: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, output: Tensor, normalizer: Tensor, *rest: Any, **_: Any,
) -> int:  # fmt: skip
    """Scores again and the gradients of query and key; those of weights and value: five products."""
    return 2 * _pairs(query, key, Pattern(*rest[:_SIZE])) * (3 * query.shape[-1] + 2 * value.shape[-1])


def _pairs(query: Tensor, key: Tensor, pattern: Pattern) -> int:
    """The pairs of a query and a key of all heads, hidden ones too."""
    batch, heads, rows, _ = query.shape
    starts, key_starts = pattern.query_starts, pattern.key_starts
    if starts is None or key_starts is None:
        return batch * heads * rows * key.shape[2]
    if type(starts) is not Tensor or starts.is_meta:  # traced, without numbers
        return heads * (starts.shape[0] - 1) * pattern.longest_query * pattern.longest_key
    return heads * int((starts.diff() * key_starts.diff()).sum())
