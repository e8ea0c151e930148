"""Checks of arguments, before any work: each error names the argument, what came and what is accepted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .blocks import is_block_mask
from .forms import check_form

__all__ = [
    "ALIGNMENTS",
    "check_blocks",
    "check_dense",
    "check_lengths",
    "check_log_decay",
    "check_mask",
    "check_relative",
    "check_settings",
    "check_slopes",
    "check_starts",
    "check_tensors",
    "check_tracing",
    "check_types",
    "check_window",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALIGNMENTS = ("upper_left", "lower_right")


def check_tracing() -> None:
    """Raise NotImplementedError within torch.jit.trace."""
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace cannot record expressive attention; use torch.compile or torch.export"
        )


def check_types(**tensors: object) -> None:
    """All of the arguments are tensors."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_dense(name: str, x: Tensor) -> None:
    """A tensor of plain memory: neither sparse, nested nor in a layout of a library."""
    if x.is_nested or x.layout is not torch.strided:
        kind = f"layout {x.layout}" if not x.is_nested else f"a nested tensor of layout {x.layout}"
        raise ValueError(f"{name} must be dense, of layout torch.strided, got {kind}")


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, names: tuple[str, str, str] = ("query", "key", "value"), rows: int = -2
) -> None:
    """Query, key and value, of these names, fit; `rows` is the dimension that counts them."""
    q, k, v = names
    dtype, device = query.dtype, query.device
    for name, x in zip(names, (query, key, value), strict=True):
        if x.is_nested or x.layout is not torch.strided:
            check_dense(name, x)
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of {q}, {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on the device of {q}, {device}, got {x.device}")
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(x.shape)}")
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    if of_query[-1] == 0:
        raise ValueError(f"{q} must have a head dimension E of at least 1, got shape {tuple(of_query)}")
    if of_key[-1] != of_query[-1]:
        raise ValueError(f"{k} must have the head dimension E = {of_query[-1]} of {q}, got shape {tuple(of_key)}")
    if of_value[rows] != of_key[rows]:
        raise ValueError(f"{v} must have the length S = {of_key[rows]} of {k}, got shape {tuple(of_value)}")


def check_settings(
    dropout_p: float,
    scale: float | None,
    form: str,
    causal_alignment: str,
    backend: str | None,
    scale_name: str = "scale",
) -> None:
    """The numbers and names of a call."""
    # Tuples of types: torch.compile of torch 2.6 does not trace `int | float`.
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"{scale_name} must be a float or None, got {type(scale).__name__}")
    if scale is not None and not -math.inf < scale < math.inf:  # math.isfinite takes no torch.SymFloat
        raise ValueError(f"{scale_name} must be finite, got {scale}")
    check_form(form)
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {ALIGNMENTS}, got {causal_alignment!r}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {tuple(BACKENDS)} or None, got {backend!r}")


def check_mask(attn_mask: Tensor, query: Tensor, scores: tuple[int, ...]) -> None:
    """A mask, for scores of that shape."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor or None, got {type(attn_mask).__name__}")
    check_dense("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in _DTYPES:
        raise ValueError(
            f"attn_mask must be bool (True: the key takes part) or floating (a bias in log-weight space), "
            f"got {attn_mask.dtype}"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the device of query, {query.device}, got {attn_mask.device}")
    shape = tuple(attn_mask.shape)
    fits = len(shape) <= len(scores) and all(
        size in (1, wanted) for size, wanted in zip(shape, scores[len(scores) - len(shape) :], strict=True)
    )
    if not fits:
        raise ValueError(f"attn_mask must be broadcastable to (..., Hq, L, S) = {scores}, got shape {shape}")


def check_blocks(block_mask: Any, query: Tensor, scores: tuple[int, ...]) -> None:
    """A BlockMask of torch, for scores of the shape ``(..., Hq, L, S)``."""
    if not is_block_mask(block_mask):
        raise TypeError(
            f"block_mask must be a torch.nn.attention.flex_attention.BlockMask or None, got {type(block_mask).__name__}"
        )
    counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
    if indices.device != query.device:
        raise ValueError(f"block_mask must be on the device of query, {query.device}, got {indices.device}")
    *batch, heads, rows, keys = scores
    block_rows, block_keys = block_mask.BLOCK_SIZE
    of_blocks = (-(-rows // block_rows), -(-keys // block_keys))
    shape = tuple(indices.shape)
    fits = len(shape) == 4 and shape[0] in (1, math.prod(batch)) and shape[1] in (1, heads) and shape[2:] == of_blocks
    if not fits or tuple(counts.shape) != shape[:3]:
        raise ValueError(
            f"block_mask must have kv_indices of shape (B | 1, Hq | 1, blocks of queries, blocks of keys) with "
            f"{of_blocks[0]} x {of_blocks[1]} blocks of {block_rows} x {block_keys} for {math.prod(batch)} x {heads} "
            f"heads of {rows} queries and {keys} keys, got {shape}"
        )
    lists = [(counts, indices), (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)]
    for number, listed in lists:
        if number is None or listed is None or not (_is_readable(number) and _is_readable(listed)):
            continue
        counted = torch.arange(shape[3]) < number.unsqueeze(-1)
        if bool(
            (number < 0).any() | (number > shape[3]).any() | (((listed < 0) | (listed >= shape[3])) & counted).any()
        ):
            raise ValueError(f"block_mask must list blocks of keys from 0 to {shape[3] - 1}, got others")


def check_window(window_size: tuple[int, int]) -> None:
    """A pair of sizes, -1 for no limit."""
    try:
        left, right = window_size
        fits = all(isinstance(size, int) and not isinstance(size, bool) and size >= -1 for size in (left, right))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"window_size must be two integers (left, right), each at least 0, or -1 for no limit, got {window_size!r}"
        )


def check_slopes(alibi_slopes: Tensor, query: Tensor, heads: int) -> None:
    """Slopes of ALiBi, of so many heads in their last dimension."""
    check_types(alibi_slopes=alibi_slopes)
    check_dense("alibi_slopes", alibi_slopes)
    if alibi_slopes.dtype != torch.float32:
        raise ValueError(f"alibi_slopes must be float32, got {alibi_slopes.dtype}")
    if alibi_slopes.device != query.device:
        raise ValueError(
            f"alibi_slopes must be on the device of the queries, {query.device}, got {alibi_slopes.device}"
        )
    if alibi_slopes.ndim == 0 or alibi_slopes.shape[-1] != heads:
        raise ValueError(
            f"alibi_slopes must have the {heads} heads of the queries in its last dimension, got shape "
            f"{tuple(alibi_slopes.shape)}"
        )
    if _is_readable(alibi_slopes) and bool((alibi_slopes < 0).any()):
        raise ValueError(f"alibi_slopes must be at least 0, got {float(alibi_slopes.min())}")


def _check_bias(name: str, bias: Tensor, query: Tensor) -> None:
    """Biases that are no mask: dense, floating, on the device of query."""
    check_types(**{name: bias})
    check_dense(name, bias)
    if bias.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {bias.device}")


def check_log_decay(log_decay: Tensor, query: Tensor, scores: tuple[int, ...], kv_heads: int, is_causal: bool) -> None:
    """Log decays of the keys of a causal call, whose scores have the shape ``(..., Hq, L, S)``."""
    _check_bias("log_decay", log_decay, query)
    *batch, heads, _, keys = scores
    shape = tuple(log_decay.shape)
    wanted = (*(tuple(batch)[len(batch) - max(0, len(shape) - 2) :]), heads, keys)
    fits = 0 < len(shape) <= len(wanted) and all(
        size in (1, kv_heads, heads) if at == -2 else size in (1, wanted[at])
        for at, size in ((i - len(shape), size) for i, size in enumerate(shape))
    )
    if not fits:
        raise ValueError(
            f"log_decay must be broadcastable to (..., H, S) = {(*batch, heads, keys)}, or have the {kv_heads} heads "
            f"of key, got shape {shape}"
        )
    if not is_causal:
        raise ValueError("log_decay needs is_causal=True: weights decay from a key to the queries after it")
    if _is_readable(log_decay) and log_decay.numel() and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay must be at most 0, got {float(log_decay.max())}")


def check_relative(relative_bias: Tensor, query: Tensor, scores: tuple[int, ...]) -> None:
    """Biases by distance, for scores of the shape ``(..., Hq, L, S)``."""
    _check_bias("relative_bias", relative_bias, query)
    *batch, heads, rows, keys = scores
    shape, least = tuple(relative_bias.shape), 2 * max(rows, keys, 1) - 1
    wanted = (*batch, heads)
    of_heads = shape[:-1]
    fits = len(of_heads) <= len(wanted) and all(
        size in (1, want) for size, want in zip(of_heads, wanted[len(wanted) - len(of_heads) :], strict=True)
    )
    if not shape or not fits or shape[-1] < least or shape[-1] % 2 == 0:
        raise ValueError(
            f"relative_bias must be broadcastable to {wanted} before its last dimension, which is 2 M - 1, odd, for M "
            f"of at least the {max(rows, keys)} rows or keys, got shape {shape}"
        )


def check_lengths(name: str, lengths: Tensor, query: Tensor, most: int) -> None:
    """Numbers of keys that exist, from 0 to `most`."""
    _check_integers(name, lengths, query)
    if _is_readable(lengths) and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= most:
        raise ValueError(
            f"{name} must be from 0 to the {most} keys there are, got {int(lengths.min())} to {int(lengths.max())}"
        )


def check_starts(name: str, starts: Tensor, query: Tensor, rows: int, longest_name: str, longest: int) -> None:
    """Where sequences start, of `rows` vectors that hold them, of which none is longer than `longest`."""
    _check_integers(name, starts, query)
    if starts.ndim != 1 or len(starts) < 2:
        raise ValueError(f"{name} must have shape (B + 1,) for B >= 1 sequences, got {tuple(starts.shape)}")
    if not isinstance(longest, (int, torch.SymInt)):
        raise TypeError(f"{longest_name} must be an int, got {type(longest).__name__}")
    if isinstance(longest, int) and longest < 0:
        raise ValueError(f"{longest_name} must be at least 0, got {longest}")
    if not _is_readable(starts):
        return
    numbers = starts.tolist()
    lengths = [b - a for a, b in itertools.pairwise(numbers)]
    if numbers[0] != 0 or min(lengths) < 0 or numbers[-1] > rows:
        raise ValueError(
            f"{name} must start at 0, never fall, and end at the {rows} rows there are or before, got {numbers}"
        )
    if max(lengths) > longest:
        raise ValueError(f"{longest_name} must be at least the {max(lengths)} of the longest sequence, got {longest}")


def _check_integers(name: str, x: Tensor, query: Tensor) -> None:
    check_types(**{name: x})
    check_dense(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.device != query.device:
        raise ValueError(f"{name} must be on the device of the queries, {query.device}, got {x.device}")


def _is_readable(x: Tensor) -> bool:
    """Whether its numbers are at hand: reading those of a GPU would wait for it, and a traced tensor has none."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )
