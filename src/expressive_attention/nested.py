"""Jagged nested tensors, as packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_lengths, check_tensors
from .functional import cast_for_autocast, expressive_attention, match_heads
from .varlen import expressive_attention_varlen

__all__ = ["nested_attention"]


def nested_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_lengths: Tensor | None,
    return_normalizer: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`expressive_attention` of jagged nested tensors ``(B, H, j, E)``, where j differs in the batch.

    Results are jagged as the query is. The `options` are those that `expressive_attention_varlen` has by the same name.
    """
    inputs = {"query": query, "key": key, "value": value}
    _check(inputs)
    if query.ndim > 3 and all(_ragged_dim(x) == 1 for x in inputs.values()):
        return _of_ragged_heads(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, key_lengths=key_lengths,
            return_normalizer=return_normalizer, **options,
        )  # fmt: skip
    if attn_mask is not None:
        raise ValueError("attn_mask must be None for jagged nested tensors; is_causal and window_size are taken")
    for name, x in inputs.items():
        if _ragged_dim(x) != x.ndim - 2:
            raise ValueError(
                f"{name} must be ragged in its last dimension but one, (B, H, j, E), got shape {tuple(x.shape)}"
            )
    if not _same_lengths(key, value):
        raise ValueError("value must have the lengths of key, got others")

    # All sequences one after the other: (H, T, E).
    (q, starts, rows), (k, key_starts, _), (v, _, _) = (_packed(x) for x in inputs.values())
    q, k, v = cast_for_autocast(q, k, v)
    check_tensors(q, k, v)
    heads, kv_heads = match_heads(q, k, v, enable_gqa)
    q, k, v = q.expand(heads, -1, -1), k.expand(kv_heads, -1, -1), v.expand(kv_heads, -1, -1)
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, q, k.shape[1])
        if key_lengths.shape not in ((), (1,), (query.shape[0],)):
            raise ValueError(
                f"key_lengths must be broadcastable to {(query.shape[0],)}, got {tuple(key_lengths.shape)}"
            )
        key_lengths = key_lengths.expand(query.shape[0])
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    results = expressive_attention_varlen(
        q, k, v, starts, key_starts, query._max_seqlen, key._max_seqlen,
        softmax_scale=scale, causal=is_causal, seqused_k=key_lengths, return_normalizer=True, **options,
    )  # fmt: skip
    output, normalizer = results[0].transpose(0, 1), results[1]
    if rows is not None:
        total = query.values().shape[-2]
        output, normalizer = (
            x.new_zeros((heads, total, *x.shape[2:])).index_copy(1, rows, x) for x in (output, normalizer)
        )
    leading = (heads,) if query.ndim == 4 else query.shape[1:-2]
    output, normalizer = (_as(query, x.reshape(*leading, *x.shape[1:])) for x in (output, normalizer))
    return (output, normalizer) if return_normalizer else output


def _of_ragged_heads(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *, key_lengths: Tensor | None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ``(B, j, L, E)``: batches whose sequences are of one length are a dense problem of all heads."""
    if key_lengths is not None or options["alibi_slopes"] is not None:
        raise ValueError("key_lengths and alibi_slopes must be None for nested tensors that are ragged in their heads")
    for name, x in (("key", key), ("value", value)):
        if not _same_lengths(query, x):
            raise ValueError(f"{name} must have the heads of query in each part of the batch, got others")
    if attn_mask is not None and attn_mask.layout is torch.jagged:
        attn_mask = attn_mask.values()
    results = expressive_attention(query.values(), key.values(), value.values(), attn_mask, **options)
    if isinstance(results, Tensor):
        return _as(query, results)
    return _as(query, results[0]), _as(query, results[1])


def _check(inputs: dict[str, Tensor]) -> None:
    """All of them are nested, with as many dimensions and parts."""
    first, like = next(iter(inputs.items()))
    for name, x in inputs.items():
        if x.layout is not torch.jagged:
            other = next(name for name, x in inputs.items() if x.layout is torch.jagged)
            raise ValueError(f"{name} must be a jagged nested tensor as {other} is, got layout {x.layout}")
        if x.ndim != like.ndim or x.shape[0] != like.shape[0]:
            raise ValueError(
                f"{name} must have the {like.ndim} dimensions and the {like.shape[0]} parts of {first}, got shape "
                f"{tuple(x.shape)}"
            )
        if x.ndim > 4 and x.shape[1:-2] != like.shape[1:-2]:
            raise ValueError(f"{name} must have the leading dimensions of {first}, got shape {tuple(x.shape)}")


def _ragged_dim(x: Any) -> int:
    return x._ragged_idx


def _same_lengths(a: Any, b: Any) -> bool:
    """Whether two nested tensors are ragged alike, be it by the same offsets or by equal ones."""
    if a.shape[_ragged_dim(a)] == b.shape[_ragged_dim(b)]:
        return True
    mine, others = (x.offsets().diff() if x.lengths() is None else x.lengths() for x in (a, b))
    return torch.equal(mine, others)


def _packed(x: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values ``(H, T, E)``, where each sequence starts in them, and, if it has holes, which of its rows they are."""
    values, starts, lengths = x.values(), x.offsets(), x.lengths()
    values = values.reshape(-1, *values.shape[-2:])
    if lengths is None:
        return values, starts, None
    ends = lengths.cumsum(0)
    first = starts[:-1] - (ends - lengths)
    rows = torch.arange(int(ends[-1]), device=values.device) + first.repeat_interleave(lengths)
    return values[:, rows], torch.nn.functional.pad(ends, (1, 0)), rows


def _as(like: Any, values: Tensor) -> Tensor:
    """Values as a nested tensor, with the offsets of another one."""
    return torch.nested.nested_tensor_from_jagged(
        values, like.offsets(), like.lengths(), _ragged_dim(like), like._maybe_min_seqlen, like._maybe_max_seqlen
    )
