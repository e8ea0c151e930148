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

from .call import Call, Result, Upstream, Visibility
from .schema import flatten, flatten_backward, unflatten, unflatten_backward

__all__ = ["register", "replicated"]

_NOT_A_TENSOR: Any = None  # which has no placement


def register(*tensors: Any) -> None:
    """Give the rules to DTensor, once, if one of the tensors is a DTensor.

    This library does not import torch.distributed.tensor, which takes a second: the owner of a DTensor has.
    """
    if any(type(x).__name__ == "DTensor" for x in tensors):
        _register()


def replicated(x: torch.Tensor, like: Any) -> Any:
    """x on every device of the mesh of a DTensor; x itself if `like` is none."""
    if type(like).__name__ != "DTensor":
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


@cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(torch.ops.expressive_attention.attention.default)(_forward)
    register_sharding(torch.ops.expressive_attention.attention_backward.default)(_backward)


def _forward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """Placements of (output, normalizer, bias_max) for those of the arguments, each of one dimension of the mesh."""
    call, _ = unflatten(arguments)
    return [([way.query] * 3, list(flatten(way, _NOT_A_TENSOR))) for way in _ways(call)]


def _backward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """Placements of (dq, dk, dv, dmask, dlog_decay, drelative_bias) for those of the arguments."""
    from torch.distributed.tensor import Partial, Replicate

    call, _, _, upstream = unflatten_backward(arguments)
    rules = []
    for way in _ways(call):
        rows = way.query
        # An argument that is whole everywhere, and used for a part, gets a part of its gradient.
        whole = (way.key, way.attn_mask, way.log_decay, way.relative_bias)
        dkeys, dmask, ddecay, drelative = (Partial() if x == Replicate() != rows else x for x in whole)
        drelative = drelative if upstream.wants_relative else Replicate()
        dmask = dmask if upstream.wants_mask else Replicate()
        results = [rows, dkeys, dkeys, dmask, ddecay or Replicate(), drelative]
        no = _NOT_A_TENSOR
        given = Upstream(rows, None if upstream.normalizer is None else rows, no, no)
        rules.append((results, list(flatten_backward(way, _NOT_A_TENSOR, Result(rows, rows, None), given))))
    return rules


def _ways(call: Call) -> list[Call]:
    """Placements of the tensors of the call, each where the tensor is."""
    from torch.distributed.tensor import Replicate, Shard

    def of(x: Any, dim: int) -> Any:
        if x is None:
            return None
        return Replicate() if dim < 0 or dim >= len(x.shape) or x.shape[dim] == 1 else Shard(dim)

    def way(dim: int, keys: Any) -> Call:
        seen = call.visibility
        members: dict[str, Any] = dict.fromkeys(Visibility._fields)
        members["slopes"] = of(seen.slopes, dim)
        members["key_lengths"] = None if seen.key_lengths is None else Shard(0) if dim == 0 else Replicate()
        members["listed"] = of(seen.listed, dim)
        for name in ("query_starts", "key_starts", "tiles"):
            members[name] = None if getattr(seen, name) is None else Replicate()
        rows: Any = Replicate() if dim < 0 else Shard(dim)
        seeds = None if call.dropout_seeds is None else Replicate()
        settings = (
            _NOT_A_TENSOR,
            _NOT_A_TENSOR,
            _NOT_A_TENSOR,
            seeds,
            of(call.log_decay, dim),
            of(call.relative_bias, dim),
        )
        return Call(rows, keys, keys, of(call.attn_mask, dim), Visibility(**members), *settings)

    ways = [way(-1, Replicate())]
    if call.visibility.query_starts is None:  # all sequences are in one batch
        ways.append(way(0, Shard(0)))
    query: Any = call.query
    heads, kv_heads = query.shape[1], call.key.shape[1]
    if kv_heads == 1:
        ways.append(way(1, Shard(1) if heads == 1 else Replicate()))
    elif heads == kv_heads or _even(kv_heads, query.mesh.shape):
        ways.append(way(1, Shard(1)))
    return ways


def _even(heads: int, mesh: Sequence[int]) -> bool:
    """Whether groups of heads stay whole, whichever dimensions of a mesh they are sharded over."""
    sizes = (math.prod(chosen) for n in range(1, len(mesh) + 1) for chosen in combinations(mesh, n))
    return all(heads % size == 0 for size in sizes if size <= heads)
