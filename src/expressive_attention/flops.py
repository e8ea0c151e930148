"""How many floating-point operations the operators count in `torch.utils.flop_counter`: as many as SDPA's."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .blocks import pairs_of_blocks
from .call import Call
from .schema import unflatten

__all__ = ["register"]


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


def _forward(*arguments: Any, **_: Any) -> int:
    """Scores and output: two products."""
    call, _backend = unflatten(arguments)
    return 2 * _pairs(call) * (call.query.shape[-1] + call.value.shape[-1])


def _backward(*arguments: Any, **_: Any) -> int:
    """Scores again and the gradients of query and key; those of weights and value: five products."""
    call, _backend = unflatten(arguments)
    return 2 * _pairs(call) * (3 * call.query.shape[-1] + 2 * call.value.shape[-1])


def _pairs(call: Call) -> int:
    """The pairs of a query and a key of all heads, hidden ones too, but for those of blocks that are not listed."""
    batch, heads, rows, _ = call.query.shape
    seen = call.visibility
    listed = seen.listed
    if listed is not None and type(listed) is Tensor and not listed.is_meta:
        pairs = pairs_of_blocks(listed, seen.block_rows, seen.block_keys, rows, call.key.shape[2])
        return int(pairs) * batch // listed.shape[0] * heads // listed.shape[1]
    starts, key_starts = seen.query_starts, seen.key_starts
    if starts is None or key_starts is None:
        return batch * heads * rows * call.key.shape[2]
    if type(starts) is not Tensor or starts.is_meta:  # traced, without numbers
        return heads * (starts.shape[0] - 1) * seen.longest_query * seen.longest_key
    return heads * int((starts.diff() * key_starts.diff()).sum())
