"""Expressive attention in C: this module packs tensors into the C struct, ``kernels/`` computes.

Memory is linear in L and S; nothing of the size of a whole tensor is copied, whatever its strides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...call import Call, Gradients, Result, Upstream, accumulation_dtype, differentiated_by_func
from ...masks import repeated_strides
from ..dropout import keep_share, threshold
from . import library
from .layout import BACKWARD, FORWARD, TOKEN

__all__ = ["backward", "declines", "forward", "linear_backward", "linear_forward", "step", "warn_of_fallback"]

# As in kernels/problem.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}
_HALVES = (torch.bfloat16, torch.float16)
_NO_MASK = 5
_NOTHING = (0, 0, 0, 0, 0)
_NO_MEMORY = 1
_DROPPED_TOGETHER = 64  # keys, as KEPT_KEYS in kernels/dropout.h

_warned = False


def declines(call: Call) -> str | None:
    """The reason why this backend declines the call; None: it does not."""
    if not call.query.is_cpu:
        return f"it runs on the CPU, not on {call.query.device.type}"
    if differentiated_by_func():
        return "torch.func and forward-mode derivatives are not implemented"
    if call.log_decay is not None:
        return "decays must be in a mask"
    if call.visibility.query_starts is not None and call.attn_mask is not None:
        return "packed sequences have no mask"
    if call.dropout_p and call.visibility.listed is not None and call.visibility.block_keys % _DROPPED_TOGETHER:
        return f"beside dropout, blocks must have a multiple of {_DROPPED_TOGETHER} keys"
    return library.MISSING


def warn_of_fallback() -> None:
    """Say, once in a process, that calls on the CPU which this backend was to take run on the blockwise one."""
    global _warned  # noqa: PLW0603
    if not _warned and library.MISSING is not None:
        _warned = True
        message = f"expressive attention runs on the blockwise backend: {library.MISSING}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def forward(call: Call) -> Result:
    """Output, normalizer and largest biases."""
    query, value, starts = call.query, call.value, call.visibility.query_starts
    batch, heads, rows, _ = query.shape
    shape = (batch, heads, rows) if starts is None else (rows, heads)
    output = query.new_empty((*shape, value.shape[-1]))
    dtype = query.dtype
    sums = torch.float32 if dtype in _HALVES else dtype
    normalizer = query.new_empty(shape, dtype=sums)
    bias_max = torch.empty_like(normalizer) if call.has_bias else None
    kept = _numbers(call)
    problem = FORWARD.pack(
        *_inputs(call, kept),
        output.data_ptr(),
        normalizer.data_ptr(),
        0 if bias_max is None else bias_max.data_ptr(),
    )
    _run(library.chosen().forward, problem)
    if starts is not None:
        bias_max = None if bias_max is None else _by_head(bias_max)
        return Result(_by_head(output), _by_head(normalizer), bias_max)
    return Result(output, normalizer, bias_max)


def backward(call: Call, result: Result, upstream: Upstream) -> Gradients:
    """Gradients of query, key, value and, if wanted, of the float mask and of biases by distance."""
    query, key, value, mask = call[:4]
    grad_output, grad_normalizer, wants_mask, wants_relative = upstream
    is_packed, relative = call.visibility.query_starts is not None, call.relative_bias
    drelative = None
    if wants_relative and relative is not None:
        drelative = torch.zeros(relative.shape, dtype=torch.float64)
    dmask = _empty_like(mask) if wants_mask and mask is not None else None
    output, normalizer, dq, dk, dv = result.output, result.normalizer, query, key, value
    if is_packed:
        output, normalizer, dq, dk, dv = (_by_row(x) for x in (output, normalizer, dq, dk, dv))
        grad_normalizer = None if grad_normalizer is None else _by_row(grad_normalizer)
    dq, dk, dv = (_empty_like(x) for x in (dq, dk, dv))
    output, normalizer = _contiguous("output", output), _contiguous("normalizer", normalizer)
    grad_normalizer = None if grad_normalizer is None else _contiguous("grad_normalizer", grad_normalizer)
    kept = _numbers(call)
    problem = BACKWARD.pack(
        *_inputs(call, kept),
        output.data_ptr(),
        normalizer.data_ptr(),
        0,
        _address("grad_output", grad_output),
        *grad_output.stride(),
        0 if grad_normalizer is None else grad_normalizer.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        0 if dmask is None else dmask.data_ptr(),
        0,
        *((0, 0, 0, 0) if dmask is None else dmask.shape),
        *((0, 0) if drelative is None else (drelative.data_ptr(), _batch_stride(drelative))),
    )
    _run(library.chosen().backward, problem)
    if is_packed:
        dq, dk, dv = (_by_head(x) for x in (dq, dk, dv))
    if drelative is not None and relative is not None:
        drelative = drelative.flip(-1).to(relative.dtype)
    return Gradients(dq, dk, dv, dmask, None, drelative)


# ---- the squared form in linear time ----


def linear_forward(call: Call, decays: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and normalizer of the squared form by ``kernels/linear.h``; N is NaN where float64 does not hold a row.

    Args:
        call: A call that `backends.linear` does not decline.
        decays: Cumulative log decays ``(B, Hq | Hkv, S)`` of float64, or None.
    """
    query, value = call.query, call.value
    output = query.new_empty((*query.shape[:3], value.shape[-1]))
    normalizer = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    kept = _numbers(call.but(visibility=call.visibility.but(slopes=None)))
    decays = None if decays is None else decays.contiguous()
    problem = FORWARD.pack(*_inputs(call, kept, decays), output.data_ptr(), normalizer.data_ptr(), 0)
    _run(library.chosen().linear, problem)
    return output, normalizer


def linear_backward(
    call: Call, decays: Tensor | None, upstream: Upstream
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and decays, as keys have them, by ``kernels/linear_backward.h``.

    Rows that float64 does not hold have NaN for the gradient of their query, and give nothing to those of keys.
    """
    query, key, value = call[:3]
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and decays is not None and decays.shape[1] != key.shape[1]:
        # Heads that share keys, but no state: each has its own gradients of them.
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        dq, dk, dv, ddecay = linear_backward(call.but(key=key, value=value), decays, upstream)
        return dq, dk.unflatten(1, (-1, groups)).sum(2), dv.unflatten(1, (-1, groups)).sum(2), ddecay
    of_exists = torch.empty_like if call.visibility.key_lengths is None else torch.zeros_like
    dq = _empty_like(query)
    dk, dv = (of_exists(x, memory_format=torch.contiguous_format) for x in (key, value))
    grad_output, grad_normalizer, *_ = upstream
    grad_normalizer = None if grad_normalizer is None else _contiguous("grad_normalizer", grad_normalizer)
    decays = None if decays is None else decays.contiguous()
    ddecay = None if decays is None else torch.zeros_like(decays)
    kept = _numbers(call.but(visibility=call.visibility.but(slopes=None)))
    problem = BACKWARD.pack(
        *_inputs(call, kept, decays),
        0,
        0,
        0,
        _address("grad_output", grad_output),
        *grad_output.stride(),
        0 if grad_normalizer is None else grad_normalizer.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        0,
        0 if ddecay is None else ddecay.data_ptr(),
        *(0, 0, 0, 0),
        *(0, 0),
    )
    _run(library.chosen().linear_backward, problem)
    return dq, dk, dv, ddecay


def step(
    sums: Tensor, moment: Tensor, query: Tensor, pair: tuple[Tensor, Tensor] | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add one token to states of the squared form, in place, and then answer queries, by ``kernels/step.h``.

    Args:
        sums: ``(B, H, E (E + 1) / 2, Ev)``, contiguous, of float32 or float64.
        moment: ``(B, H, E (E + 1) / 2)``, contiguous, of float64.
        query: ``(B, Hq, E)``, Hq a multiple of H, or 0.
        pair: Key ``(B, H, E)`` and value ``(B, H, Ev)`` of the token; None: none is added.
        factor: ``(B, H)`` of float64, by which the states are multiplied before; None: they are not.

    Returns:
        The output ``(B, Hq, Ev)`` in the dtype of `sums`, and N ``(B, Hq)`` of a scale of 1, in float64.
    """
    query = _contiguous("query", query.to(sums.dtype))
    key, value = (None, None) if pair is None else (_contiguous("key", x.to(sums.dtype)) for x in pair)
    factor = None if factor is None else factor.contiguous()
    output = query.new_empty((*query.shape[:2], sums.shape[3]))
    normalizer = moment.new_empty(query.shape[:2])
    problem = TOKEN.pack(
        torch.get_num_threads(),
        sums.dtype == torch.float64,
        sums.shape[0] * sums.shape[1],
        query.shape[1] // sums.shape[1],
        query.shape[2],
        sums.shape[3],
        _address("sums", sums),
        _address("moment", moment),
        *(0 if x is None else x.data_ptr() for x in (key, value, factor)),
        query.data_ptr(),
        output.data_ptr(),
        normalizer.data_ptr(),
    )
    _run(library.chosen().step, problem)
    if key is not None:
        torch.autograd.graph.increment_version([sums, moment])  # a graph that has saved them must know
    return output, normalizer


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Numbers(NamedTuple):
    """Starts of packed sequences, lengths, slopes, seeds, biases by distance and blocks as the library reads them."""

    starts: Tensor | None
    key_starts: Tensor | None
    lengths: Tensor | None
    slopes: Tensor | None
    seeds: Tensor | None
    relative: Tensor | None
    listed: Tensor | None
    tiles: Tensor | None


def _inputs(call: Call, kept: _Numbers, decays: Tensor | None = None) -> tuple[float, ...]:
    """The members of ``ea_problem`` from the first to the decays; the caller keeps the tensors beside the call."""
    query, key, value, mask, visibility, scale, form, dropout_p, *_ = call
    starts, key_starts, lengths, slopes, seeds, relative, listed, tiles = kept
    left, right, lower_right, *_ = visibility
    batch, heads, rows, width = query.shape
    _, kv_heads, keys, value_width = value.shape
    return (
        torch.get_num_threads(),
        _DTYPES[query.dtype],
        _NO_MASK if mask is None else _DTYPES[mask.dtype],
        form == "squared",
        right is not None,
        right or 0,
        left is not None,
        left or 0,
        lower_right,
        batch,
        heads,
        kv_heads,
        rows,
        keys,
        width,
        value_width,
        scale,
        *((0, 0, 0) if starts is None or key_starts is None else _starts(starts, key_starts)),
        0 if lengths is None else lengths.data_ptr(),
        *((0, 0) if slopes is None else (slopes.data_ptr(), 0 if slopes.shape[0] == 1 else heads)),
        *((*_NOTHING, 0) if relative is None else _by_distance(relative)),
        *((0, 1.0, 0, 0) if seeds is None else _dropout(dropout_p, seeds, batch)),
        *(_NOTHING if listed is None else (listed.data_ptr(), *repeated_strides(listed))),
        visibility.block_rows,
        visibility.block_keys,
        0 if tiles is None else tiles.data_ptr(),
        _address("query", query),
        *query.stride(),
        _address("key", key),
        *key.stride(),
        _address("value", value),
        *value.stride(),
        *(_NOTHING if mask is None else (_address("attn_mask", mask), *repeated_strides(mask))),
        *((0, *_NOTHING) if decays is None else (decays.shape[1], decays.data_ptr(), *decays.stride(), 0)),
    )


def _address(name: str, x: Tensor) -> int:
    """Where the memory of an argument begins. Raises ValueError if it does not reach as far as its elements."""
    memory = x.untyped_storage().nbytes()
    if memory != x.nbytes or x.storage_offset():  # it does not have its memory to itself
        _check_memory(name, x, memory)
    return x.data_ptr()


def _check_memory(name: str, x: Tensor, memory: int) -> None:
    size, start = x.itemsize, x.storage_offset() * x.itemsize
    end = size + sum([(n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)]) * size
    if start + end > memory and x.numel():
        raise ValueError(
            f"the memory of {name} was freed or is too small: shape {tuple(x.shape)} with strides {x.stride()} needs "
            f"{end} bytes from byte {start} on, and {memory} are there"
        )


def _contiguous(name: str, x: Tensor) -> Tensor:
    """The numbers of an argument, one after the other."""
    _address(name, x)
    return x.contiguous()


def _numbers(call: Call) -> _Numbers:
    seen, seeds = call.visibility, call.dropout_seeds
    return _Numbers(
        None if seen.query_starts is None else _integers("cu_seqlens_q", seen.query_starts),
        None if seen.key_starts is None else _integers("cu_seqlens_k", seen.key_starts),
        None if seen.key_lengths is None else _integers("key_lengths", seen.key_lengths),
        None if seen.slopes is None else _contiguous("alibi_slopes", seen.slopes),
        None if seeds is None else _contiguous("dropout_seeds", seeds),
        # From keys far before a query to those far after it, as it reads them.
        None if call.relative_bias is None else call.relative_bias.flip(-1).contiguous(),
        None if seen.listed is None else _contiguous("block_mask", seen.listed),
        None if seen.tiles is None else _contiguous("block_mask", seen.tiles),
    )


def _integers(name: str, x: Tensor) -> Tensor:
    return _contiguous(name, x).to(torch.int64)


def _starts(starts: Tensor, key_starts: Tensor) -> tuple[int, int, int]:
    return starts.shape[0] - 1, starts.data_ptr(), key_starts.data_ptr()


def _by_distance(relative: Tensor) -> tuple[int, ...]:
    return relative.data_ptr(), _batch_stride(relative), relative.shape[2], 0, 1, relative.shape[2] // 2 + 1


def _batch_stride(relative: Tensor) -> int:
    return 0 if relative.shape[0] == 1 else relative.shape[1] * relative.shape[2]


def _by_row(x: Tensor) -> Tensor:
    """``(1, H, T, ...)`` of packed sequences as ``(T, H, ...)``."""
    return x.squeeze(0).transpose(0, 1)


def _by_head(x: Tensor) -> Tensor:
    """The reverse of `_by_row`."""
    return x.transpose(0, 1).unsqueeze(0)


def _dropout(dropout_p: float, seeds: Tensor, batch: int) -> tuple[float, ...]:
    return threshold(dropout_p), keep_share(dropout_p), seeds.data_ptr(), max(1, batch // seeds.shape[0])


def _run(kernel: Callable[[bytes], int], problem: bytes) -> None:
    if kernel(problem) == _NO_MEMORY:
        raise MemoryError("expressive attention ran out of memory")
