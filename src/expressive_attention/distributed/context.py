"""Attention over sequences that are longer than what one machine holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..backends import dropout
from ..call import Visibility
from ..checks import (
    check_lengths,
    check_log_decay,
    check_mask,
    check_settings,
    check_slopes,
    check_tensors,
    check_types,
    check_window,
)
from ..functional import cast_for_autocast, normalizer_of, with_window
from .all_to_all import all_to_all
from .blocks import Problem
from .links import Links
from .orders import Shards
from .ring import ring
from .states import states

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["METHODS", "context_parallel"]

METHODS = ("ring", "all_to_all", "states")


@overload
def context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    shards: Shards | None = None,
    method: str = "ring",
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "expressive",
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    log_decay: Tensor | None = None,
    return_normalizer: Literal[False] = False,
    timeout: float | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    shards: Shards | None = None,
    method: str = "ring",
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "expressive",
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    log_decay: Tensor | None = None,
    return_normalizer: Literal[True],
    timeout: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    shards: Shards | None = None,
    method: str = "ring",
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "expressive",
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    log_decay: Tensor | None = None,
    return_normalizer: bool = False,
    timeout: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`expressive_attention` of a sequence whose tokens are spread over the ranks of a mesh: context parallelism.

    Every rank of the mesh calls it with its own tokens, in the order of `shards`, and with the same settings. Results
    are those of one machine, to rounding: weights have no maximum, so that partial results over the keys of each rank
    are sums, and merge as sums.

    Args:
        query: ``(B, Hq, L_rank, E)``: the queries of this rank's tokens; float16, bfloat16, float32 or float64.
        key: ``(B, Hkv, L_rank, E)``: its keys.
        value: ``(B, Hkv, L_rank, Ev)``: its values.
        mesh: A DeviceMesh of one dimension, such as ``mesh["cp"]``.
        attn_mask: The rows of this rank, and the keys of all ranks in the order of the sequence: broadcastable to
            ``(B, Hq, L_rank, L)``, bool or a bias of log weights. A mask of one row is the same on all ranks; its
            gradient is that of what this rank computes. Packed sequences take
            a mask with the method ``"ring"`` only.
        dropout_p: Probability of dropping a weight, in [0, 1]. The generator of each rank decides; which weights are
            dropped depends on the method and on the number of ranks.
        is_causal: Query i sees keys up to its own place in its sequence.
        shards: Which tokens each rank has. None: all ranks have as many, of one sequence in zigzag order.
        method: ``"ring"``: keys and values go round, while each rank computes with those that it has. ``"all_to_all"``:
            each rank takes all tokens of some heads; for at least P heads of queries. ``"states"``: with the form
            ``"squared"``, one state for each head travels, of a size that does not depend on L.
        scale: Factor on the dot product; ``1 / sqrt(E)`` if None.
        enable_gqa: Let ``Hq`` be a multiple of ``Hkv``.
        form: ``"expressive"`` or ``"squared"``.
        window_size: ``(left, right)``: how far before and after its place a query sees; -1 is no limit.
        alibi_slopes: ALiBi: ``(Hq,)`` or ``(B, Hq)``, float32, at least 0; the same on all ranks, without a gradient.
        key_lengths: How many tokens of each sequence of the batch exist: ``(B,)`` of int32 or int64, the same on all
            ranks. Not of packed sequences.
        log_decay: Decays of this rank's tokens, ``(B, Hq, L_rank)`` or ``(B, Hkv, L_rank)``, at most 0, with
            `is_causal`. Not with the method ``"ring"``.
        return_normalizer: Also return N.
        timeout: Seconds to wait for another rank, on the CPU. None: as long as the process group says.
        backend: Name of the backend for the pairs of a rank, as of `expressive_attention`.

    Returns:
        Output ``(B, Hq, L_rank, Ev)`` in the dtype of query, of this rank's queries. With `return_normalizer` also N
        ``(B, Hq, L_rank)``. Both are differentiable once; the backward pass communicates, so all ranks have to run it.

    Raises:
        TypeError: An argument is not of the type above.
        ValueError: A dtype, device, shape, number or name does not fit, or the method does not have an argument.
        NotImplementedError: The backend asked for does not support the call.
        ConnectionError: Another rank did not answer.
    """
    check_types(query=query, key=key, value=value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if type(x).__name__ == "DTensor":
            raise TypeError(f"{name} must be this rank's part as a plain tensor, got a DTensor: use its to_local()")
    links = Links(mesh, timeout)
    query, key, value = cast_for_autocast(query, key, value)
    check_tensors(query, key, value)
    check_settings(dropout_p, scale, form, "upper_left", backend)
    check_window(window_size)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    _check_shapes(query, key, value, enable_gqa)
    (batch, heads, rows, width), kv_heads = query.shape, key.shape[1]
    shards = Shards(rows * links.ranks, links.ranks) if shards is None else shards
    _check_shards(shards, links, rows, batch)
    if attn_mask is not None:
        check_mask(attn_mask, query, (batch, heads, rows, shards.length))
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape))
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, query, shards.length)
        if tuple(key_lengths.shape) != (batch,):
            raise ValueError(f"key_lengths must have shape {(batch,)}, got {tuple(key_lengths.shape)}")
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, query, heads)
        if alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes must not require a gradient, which each rank would have a part of")
        alibi_slopes = alibi_slopes.expand(batch, heads) if alibi_slopes.ndim > 1 else alibi_slopes.unsqueeze(0)
    if log_decay is not None:
        check_log_decay(log_decay, query, (batch, heads, rows, rows), kv_heads, bool(is_causal))
        of_heads = heads if log_decay.ndim > 1 and log_decay.shape[-2] == heads else kv_heads
        log_decay = log_decay.expand(batch, of_heads, rows)
    _check_method(
        method,
        {
            "form": form if method == "states" and form != "squared" else None,
            "attn_mask": attn_mask,
            "window_size": None if tuple(window_size) == (-1, -1) else window_size,
            "dropout_p": dropout_p or None,
            "log_decay": log_decay,
            "key_lengths": key_lengths,
            "alibi_slopes": None if is_causal else alibi_slopes,
        },
        packed=len(shards.lengths) > 1,
    )
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    if method == "ring":
        visibility = with_window(Visibility(None, 0 if is_causal else None), window_size)
        seeds = dropout.draw(query) if dropout_p else None
        problem = Problem(
            shards, visibility.left, visibility.right, alibi_slopes, key_lengths, scale, form, dropout_p, seeds, backend
        )
        result = ring(links, problem, query, key, value, attn_mask)
        return (result.output, normalizer_of(result)) if return_normalizer else result.output
    options: dict[str, Any] = {
        "is_causal": bool(is_causal), "scale": scale, "alibi_slopes": alibi_slopes, "key_lengths": key_lengths,
        "log_decay": log_decay, "backend": backend,
    }  # fmt: skip
    if method == "states":
        output, normalizer = states(links, shards, (query, key, value), options)
    else:
        if heads < links.ranks:
            raise ValueError(f'method="all_to_all" needs a head for each of the {links.ranks} ranks, got {heads} heads')
        options |= {"attn_mask": attn_mask, "dropout_p": dropout_p, "form": form, "window_size": tuple(window_size)}
        output, normalizer = all_to_all(links, shards, (query, key, value), options)
    return (output, normalizer) if return_normalizer else output


# torch.compile runs it as it is: what it waits for is not to be traced. As torch.compiler.disable marks it, which takes
# a second to import.
context_parallel._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape (B, H, L_rank, E), got {tuple(x.shape)}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"value must have the batch, heads and tokens of key, {tuple(key.shape[:3])}, got "
                         f"{tuple(value.shape[:3])}")  # fmt: skip
    if (query.shape[0], query.shape[2]) != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key must be of the same sequences and tokens as query, of shape {tuple(query.shape)}, got "
            f"{tuple(key.shape)}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads == 0 or kv_heads == 0 or heads % kv_heads or (heads != kv_heads and not enable_gqa):
        hint = "" if enable_gqa else "; with enable_gqa=True, query may have a multiple"
        raise ValueError(f"query must have the {kv_heads} heads of key, got {heads}{hint}")


def _check_shards(shards: Shards, links: Links, rows: int, batch: int) -> None:
    if not isinstance(shards, Shards):
        raise TypeError(f"shards must be a Shards or None, got {type(shards).__name__}")
    if shards.ranks != links.ranks:
        raise ValueError(f"shards must be of the {links.ranks} ranks of mesh, got {shards.ranks}")
    if shards.size(links.rank) != rows:
        raise ValueError(
            f"query must have the {shards.size(links.rank)} tokens that shards gives to rank {links.rank}, got {rows}"
        )
    if len(shards.lengths) > 1 and batch != 1:
        raise ValueError(f"packed sequences must be in a batch of one, got {batch}")


# The arguments that a method has no form of, by name; "packed": sequences that are packed.
_NOT_OF = {
    "ring": {"log_decay"},
    "all_to_all": set(),
    "states": {"form", "attn_mask", "window_size", "dropout_p", "alibi_slopes", "packed"},
}


def _check_method(method: str, given: dict[str, Any], packed: bool) -> None:
    """Raise an error for arguments that a method cannot have."""
    wrong = [name for name, x in given.items() if x is not None and name in _NOT_OF[method]]
    if "form" in wrong:
        raise ValueError(f'method="states" needs form="squared", got form={given["form"]!r}')
    if wrong:
        causal = " without is_causal" if wrong == ["alibi_slopes"] else ""
        others = [other for other in METHODS if not _NOT_OF[other] & set(wrong)]
        raise ValueError(f"method={method!r} cannot have {' and '.join(wrong)}{causal}; {' and '.join(others)} can")
    if packed:
        if "packed" in _NOT_OF[method]:
            raise ValueError(f"method={method!r} cannot have packed sequences; ring and all_to_all can")
        if given["key_lengths"] is not None:
            raise ValueError("key_lengths must be None for packed sequences, whose lengths are those of shards")
        if given["attn_mask"] is not None and method != "ring":
            raise ValueError('attn_mask must be None for packed sequences, but with method="ring"')
    if method == "states" and given["key_lengths"] is not None and given["log_decay"] is not None:
        raise ValueError('key_lengths and log_decay cannot be combined with method="states"; all_to_all has both')
