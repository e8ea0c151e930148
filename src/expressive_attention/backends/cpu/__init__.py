"""Expressive attention in C: this module packs tensors into the C struct, ``kernels/`` computes.

Memory is linear in L and S; nothing of the size of a whole tensor is copied, whatever its strides.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..pattern import Pattern
from ..problem import Problem, accumulation_dtype, empty_peak
from . import library
from .layout import BACKWARD, FORWARD

__all__ = ["backward", "forward", "supports", "takes", "warn_of_fallback"]

# As in kernels/problem.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}
_NO_MASK = 5
_NOTHING = (0, 0, 0, 0, 0)

_warned = False


def supports(problem: Problem) -> str | None:
    """The reason why this backend declines `problem`; None: it does not."""
    if problem.device != "cpu":
        return f"it runs on the CPU, not on {problem.device}"
    if problem.dropout_p:
        return "dropout is not implemented"
    if problem.differentiated_by_func:
        return "torch.func and forward-mode derivatives are not implemented"
    return library.MISSING


def warn_of_fallback() -> None:
    """Say, once in a process, that calls on the CPU which this backend was to take run on the blockwise one."""
    global _warned  # noqa: PLW0603
    if not _warned and library.MISSING is not None:
        _warned = True
        message = f"expressive attention runs on the blockwise backend: {library.MISSING}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def takes(pattern: Pattern) -> bool:
    """Whether this backend knows all that a pattern asks for."""
    return pattern.slopes is None and pattern.query_starts is None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    pattern: Pattern,
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalizer and peak, as `reference.forward`."""
    batch, heads, rows, _ = query.shape
    output = torch.empty((batch, heads, rows, value.shape[-1]), dtype=query.dtype, device="cpu")
    normalizer = torch.empty((batch, heads, rows), dtype=accumulation_dtype(query.dtype), device="cpu")
    peak = empty_peak(normalizer, attn_mask)
    lengths = _lengths(pattern)
    _run(
        library.chosen().forward,
        FORWARD.pack(
            *_inputs(query, key, value, attn_mask, pattern, scale, form, lengths),
            output.data_ptr(),
            normalizer.data_ptr(),
            peak.data_ptr(),
        ),
    )
    return output, normalizer, peak


def backward(
    grad_output: Tensor,
    grad_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    normalizer: Tensor,
    pattern: Pattern,
    scale: float,
    form: str,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, where `mask_gradient`, of the float mask, as `blockwise.backward`."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (query, key, value))
    dmask = attn_mask.new_empty(attn_mask.shape) if mask_gradient and attn_mask is not None else None
    for name, x in (("output", output), ("normalizer", normalizer), ("grad_normalizer", grad_normalizer)):
        if x is not None:
            _address(name, x)
    output, normalizer = output.contiguous(), normalizer.contiguous()
    grad_normalizer = None if grad_normalizer is None else grad_normalizer.contiguous()
    upstream = _address("grad_output", grad_output)
    lengths = _lengths(pattern)
    _run(
        library.chosen().backward,
        BACKWARD.pack(
            *_inputs(query, key, value, attn_mask, pattern, scale, form, lengths),
            output.data_ptr(),
            normalizer.data_ptr(),
            0,
            upstream,
            *grad_output.stride(),
            0 if grad_normalizer is None else grad_normalizer.data_ptr(),
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            0 if dmask is None else dmask.data_ptr(),
            0,
            *((0, 0, 0, 0) if dmask is None else dmask.shape),
        ),
    )
    return dq, dk, dv, dmask


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    pattern: Pattern,
    scale: float,
    form: str,
    lengths: Tensor | None,
) -> tuple[float, ...]:
    """The members of ``ea_problem`` from the first to the mask; `lengths` are `_lengths`, which the caller keeps."""
    batch, heads, rows, width = query.shape
    _, kv_heads, keys, value_width = value.shape
    return (
        torch.get_num_threads(),
        _DTYPES[query.dtype],
        _NO_MASK if mask is None else _DTYPES[mask.dtype],
        form == "squared",
        pattern.right is not None,
        pattern.right or 0,
        pattern.left is not None,
        pattern.left or 0,
        pattern.lower_right,
        batch,
        heads,
        kv_heads,
        rows,
        keys,
        width,
        value_width,
        scale,
        0 if lengths is None else lengths.data_ptr(),
        _address("query", query),
        *query.stride(),
        _address("key", key),
        *key.stride(),
        _address("value", value),
        *value.stride(),
        *(_NOTHING if mask is None else (_address("attn_mask", mask), *_mask_strides(mask))),
        *_NOTHING,
    )


def _address(name: str, x: Tensor) -> int:
    """Where the memory of an argument begins. Raises ValueError if it does not reach as far as its elements."""
    end = x.nbytes
    if not x.is_contiguous():
        end = (
            x.itemsize + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) * x.itemsize
        )
    memory = x.untyped_storage().nbytes()
    if end + x.storage_offset() * x.itemsize > memory and x.numel():
        raise ValueError(
            f"the memory of {name} was freed or is too small: shape {tuple(x.shape)} with strides {x.stride()} needs "
            f"{end} bytes from byte {x.storage_offset() * x.itemsize} on, and {memory} are there"
        )
    return x.data_ptr()


def _lengths(pattern: Pattern) -> Tensor | None:
    """The lengths of keys as the library reads them."""
    if pattern.key_lengths is None:
        return None
    _address("key_lengths", pattern.key_lengths)
    return pattern.key_lengths.to(torch.int64).contiguous()


def _mask_strides(mask: Tensor) -> tuple[int, ...]:
    """Strides that repeat the dimensions of size one."""
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def _run(kernel, problem: bytes) -> None:
    if kernel(problem):
        raise MemoryError("expressive attention ran out of memory")
