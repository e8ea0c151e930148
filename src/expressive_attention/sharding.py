"""How the operators run on `torch.distributed.tensor.DTensor`: sharded on the batch, sharded on heads, or replicated.

DTensor redistributes inputs that are sharded otherwise, such as on the sequence, to the cheapest of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Any

import torch

from .backends.pattern import Pattern

__all__ = ["register"]

_SIZE = len(Pattern._fields)


def register(*tensors: Any) -> None:
    """Give the rules to DTensor, once, if one of the tensors is a DTensor.

    This library does not import torch.distributed.tensor, which takes a second: the owner of a DTensor has.
    """
    if any(type(x).__name__ == "DTensor" for x in tensors):
        _register()


@cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(torch.ops.expressive_attention.attention.default)(_forward)
    register_sharding(torch.ops.expressive_attention.attention_backward.default)(_backward)


def _forward(query: Any, key: Any, value: Any, attn_mask: Any, *rest: Any) -> list[tuple[list[Any], list[Any]]]:
    """Placements of (output, normalizer, peak) for those of the arguments, each of one dimension of the mesh."""
    rules = []
    for way in _ways(query, key, attn_mask, Pattern(*rest[:_SIZE])):
        rows, keys, mask, pattern = way
        rules.append(([rows] * 3, [rows, keys, keys, mask, *pattern, *_none(rest[_SIZE:])]))
    return rules


def _backward(
    grad_output: Any, grad_normalizer: Any, query: Any, key: Any, value: Any, attn_mask: Any, output: Any,
    normalizer: Any, *rest: Any,
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    """Placements of (dq, dk, dv, dmask) for those of the arguments."""
    from torch.distributed.tensor import Partial, Replicate

    rules = []
    mask_gradient = rest[-1]
    for rows, keys, mask, pattern in _ways(query, key, attn_mask, Pattern(*rest[:_SIZE])):
        # An argument that is whole everywhere, and used for a part, gets a part of its gradient.
        dkeys, dmask = (Partial() if x == Replicate() != rows else x for x in (keys, mask))
        rules.append(
            (
                [rows, dkeys, dkeys, dmask if mask_gradient else Replicate()],
                [
                    rows, None if grad_normalizer is None else rows, rows, keys, keys, mask, rows, rows, *pattern,
                    *_none(rest[_SIZE:]),
                ],
            )
        )  # fmt: skip
    return rules


def _ways(query: Any, key: Any, attn_mask: Any, pattern: Pattern) -> list[tuple[Any, Any, Any, list[Any]]]:
    """Placements of query, of key and value, of the mask and of the members of the pattern."""
    from torch.distributed.tensor import Replicate, Shard

    def of(x: Any, dim: int) -> Any:
        if x is None:
            return None
        return Replicate() if dim < 0 or dim >= len(x.shape) or x.shape[dim] == 1 else Shard(dim)

    def way(dim: int, keys: Any) -> tuple[Any, Any, Any, list[Any]]:
        members = dict.fromkeys(Pattern._fields)
        members["slopes"] = of(pattern.slopes, dim)
        members["key_lengths"] = None if pattern.key_lengths is None else Shard(0) if dim == 0 else Replicate()
        for name in ("query_starts", "key_starts"):
            members[name] = None if getattr(pattern, name) is None else Replicate()
        return Replicate() if dim < 0 else Shard(dim), keys, of(attn_mask, dim), list(members.values())

    ways = [way(-1, Replicate())]
    if pattern.query_starts is None:  # all sequences are in one batch
        ways.append(way(0, Shard(0)))
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 1:
        ways.append(way(1, Shard(1) if heads == 1 else Replicate()))
    elif heads == kv_heads or _even(kv_heads, query.mesh.shape):
        ways.append(way(1, Shard(1)))
    return ways


def _even(heads: int, mesh: Sequence[int]) -> bool:
    """Whether groups of heads stay whole, whichever dimensions of a mesh they are sharded over."""
    sizes = (math.prod(chosen) for n in range(1, len(mesh) + 1) for chosen in combinations(mesh, n))
    return all(heads % size == 0 for size in sizes if size <= heads)


def _none(arguments: Sequence[Any]) -> list[None]:
    return [None] * len(arguments)
