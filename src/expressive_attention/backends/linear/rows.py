"""Rows that a state does not hold: their pairs are multiplied, with a mask, by a backend that has no state.

A state in float64 does not hold a row whose query is all but orthogonal to all keys, and no state holds a query that
is not finite. They are few, or else all pairs of the call are multiplied at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import call as calls
from ...call import Backend, Call, Upstream, Visibility, accumulation_dtype

__all__ = ["are_few", "multiply", "multiply_backward"]

# The share of rows above which the whole call costs less, which skips pairs that are not seen.
_FEW = 0.25

# Pairs of rows and keys whose mask is in memory at a time.
_PAIRS = 1 << 24


class _Part(NamedTuple):
    """Some rows of a query head, the call of them alone, and where their decays come from."""

    batch: int
    head: int
    kv_head: int
    state: int
    rows: Tensor
    call: Call


def are_few(rows: Tensor) -> bool:
    """Whether it costs less to multiply the pairs of these rows ``(B, Hq, L)`` than those of all."""
    return int(rows.sum()) <= _FEW * rows.numel()


def multiply(
    call: Call, decays: Tensor | None, rows: Tensor, output: Tensor, normalizer: Tensor, backend: Backend
) -> None:
    """Write output and normalizer of these rows.

    Args:
        call: The call.
        decays: Its cumulative log decays ``(B, Hq | Hkv, S)``, or None.
        rows: Which, ``(B, Hq, L)`` of bool.
        output: ``(B, Hq, L, Ev)``.
        normalizer: ``(B, Hq, L)``.
        backend: The one that multiplies pairs.
    """
    for part in _parts(call, decays, rows):
        found = calls.forward(backend, part.call)
        total = found.normalizer if found.bias_max is None else found.normalizer * torch.exp(found.bias_max)
        output[part.batch, part.head, part.rows] = found.output[0, 0].to(output.dtype)
        normalizer[part.batch, part.head, part.rows] = total[0, 0].to(normalizer.dtype)


def multiply_backward(
    call: Call,
    decays: Tensor | None,
    rows: Tensor,
    upstream: Upstream,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor | None],
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of query, key, value and cumulative decays, as keys have them, with these rows.

    Args:
        call: The call.
        decays: As in `multiply`.
        rows: As in `multiply`.
        upstream: The gradients of what the call returned.
        gradients: The gradients from all other rows; those of the queries of these rows are overwritten.
        backend: As in `multiply`.
    """
    dtype = accumulation_dtype(call.query.dtype)
    dq, dk, dv, dc = gradients
    dk, dv = dk.to(dtype), dv.to(dtype)
    for part in _parts(call, decays, rows):
        b, head, kv_head, state, own, each = part
        found = calls.forward(backend, each)
        do = upstream.output[b, head, own][None, None].to(dtype)
        dn = None if upstream.normalizer is None else upstream.normalizer[b, head, own][None, None].to(dtype)
        if dn is not None and found.bias_max is not None:
            dn = dn * torch.exp(found.bias_max)
        of = calls.backward(backend, each, found, Upstream(do, dn, dc is not None))
        dq[b, head, own] = of.query[0, 0].to(dq.dtype)
        dk[b, kv_head] += of.key[0, 0]
        dv[b, kv_head] += of.value[0, 0]
        if dc is not None and of.attn_mask is not None:
            dc[b, state] -= of.attn_mask[0, 0].sum(0).to(dc.dtype)
    return dq, dk.to(call.query.dtype), dv.to(call.query.dtype), dc


def _parts(call: Call, decays: Tensor | None, rows: Tensor) -> Iterator[_Part]:
    """Calls of the rows of each head, with what they see in a mask, in the dtype of sums."""
    (_, heads, length, _), kv_heads, keys = call.query.shape, call.key.shape[1], call.key.shape[2]
    dtype = accumulation_dtype(call.query.dtype)
    states = kv_heads if decays is None else decays.shape[1]
    seen = call.visibility.but(slopes=None)
    lengths = seen.key_lengths
    for b, head in rows.any(-1).nonzero().tolist():
        kv_head, state = head * kv_heads // heads, head * states // heads
        key, value = (x[b : b + 1, kv_head : kv_head + 1].to(dtype) for x in (call.key, call.value))
        for own in rows[b, head].nonzero().squeeze(-1).split(max(1, _PAIRS // max(1, keys))):
            keep = seen.mask_of(own, call.query, call.key)
            keep = keep[b if keep.shape[0] > 1 else 0, 0]
            mask = keep
            if decays is not None:
                place = seen.places(own, length, keys)[0]
                place = place[b if place.shape[0] > 1 else 0, 0, :, 0]
                last = keys - 1 if lengths is None else int(lengths[b]) - 1
                of_state = decays[b, state]
                bias = of_state[place.clamp(min=0).clamp(max=max(0, last))].unsqueeze(1) - of_state
                mask = bias.to(dtype).masked_fill(~keep, -torch.inf)
            query = call.query[b, head, own][None, None].to(dtype)
            alone = Call(query, key, value, mask[None, None], Visibility(), call.scale, call.form)
            yield _Part(b, head, kv_head, state, own, alone)
