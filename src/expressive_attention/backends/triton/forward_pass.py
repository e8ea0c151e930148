"""The forward kernel: a tile of rows against its keys; sums are added to and never rescaled.

It runs over all keys of a row, or over a part of them (`SPLIT`), whose sums `decode` adds up.
"""

# What Triton compiles looks wrong to a checker of Python's types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    FLOAT,
    NO_MASK,
    add,
    cast,
    head_of,
    load_mask,
    load_rows,
    mask_rows,
    masked,
    positions,
    product,
    quotient,
    weight_and_half_slope,
)

__all__ = ["forward_kernel"]


@triton.jit
def _add_keys(
    output, total, q, key, value, rows, peak, position, exist, key_strides, value_strides, mask_stride,
    scale, diagonal, keys, width, value_width, first, last,
    CAUSAL: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr, BOUNDARY: tl.constexpr,
    PRECISION: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Add the keys from `first` to `last` to the sums; at a `BOUNDARY` the rows do not see all of a tile."""
    for start in range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < keys
        k = load_rows(key, j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, q.dtype)
        z = product(q, tl.trans(k), tl.full((q.shape[0], BLOCK_N), 0.0, tl.float32), PRECISION) * scale
        weight, _ = weight_and_half_slope(z, FORM, True)
        if BOUNDARY or MASK != NO_MASK:
            visible = exist[:, None] & inside[None, :]
            if BOUNDARY and CAUSAL:
                visible = visible & (j[None, :] <= position[:, None] + diagonal)
            tile = load_mask(rows[:, None], j[None, :], mask_stride, visible, MASK)
            weight = masked(weight, tile, peak[:, None], visible, MASK)
        total += add(weight, 1)
        v = load_rows(value, j.to(tl.int64) * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, WEIGHT)
        output = product(cast(weight * FACTOR, WEIGHT), v, output, PRECISION)
    return output, total


@triton.jit(do_not_specialize=["mask_strides", "diagonal", "length", "keys", "kv_heads", "tiles", "span"])
def forward_kernel(
    query, key, value, mask, peaks, outputs, normalizers,
    query_strides, key_strides, value_strides, mask_strides, mask_stride,
    scale, diagonal, length, keys, kv_heads, width, value_width, tiles, span,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows, key head, batch and, with `SPLIT`, range of `span` keys.

    With `SPLIT`, sums go to outputs ``(parts, B, Hq, L, Ev)`` and normalizers ``(parts, B, Hq, L)`` of float32.
    """
    program, part = tl.program_id(0), tl.program_id(1)
    tile = tiles - 1 - program % tiles  # with a causal mask, the longest first
    batch, kv_head = head_of(program // tiles, kv_heads)
    position, member, exist = positions(tile, length, GROUPS, BLOCK_M)
    head = kv_head * GROUPS + member
    index = (batch * kv_heads * GROUPS + head) * length + position
    rows = mask_rows(mask, mask_strides, batch, head, position)

    offset = head * query_strides[1] + position.to(tl.int64) * query_strides[2]
    q = load_rows(
        query + batch * query_strides[0], offset, exist, query_strides[3], width, BLOCK_E, query.dtype.element_ty
    )
    peak = tl.full((BLOCK_M,), 0.0, tl.float32)
    if MASK == FLOAT:
        peak = tl.load(peaks + index, mask=exist, other=0.0)

    first = part * span
    keys = tl.minimum(first + span, keys)
    last = keys
    whole = last  # tiles up to here have only keys that all rows see
    if CAUSAL:
        last = tl.minimum(last, tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUPS, length - 1) + diagonal + 1)
        whole = tl.minimum(last, tile * BLOCK_M // GROUPS + diagonal + 1)
    whole = first + tl.maximum(whole - first, 0) // BLOCK_N * BLOCK_N

    output = tl.full((BLOCK_M, BLOCK_EV), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    output, total = _add_keys(
        output, total, q, key, value, rows, peak, position, exist, key_strides, value_strides, mask_stride,
        scale, diagonal, keys, width, value_width, first, whole,
        CAUSAL, FORM, MASK, False, PRECISION, WEIGHT, FACTOR, BLOCK_N, BLOCK_E, BLOCK_EV,
    )  # fmt: skip
    output, total = _add_keys(
        output, total, q, key, value, rows, peak, position, exist, key_strides, value_strides, mask_stride,
        scale, diagonal, keys, width, value_width, whole, last,
        CAUSAL, FORM, MASK, True, PRECISION, WEIGHT, FACTOR, BLOCK_N, BLOCK_E, BLOCK_EV,
    )  # fmt: skip

    if SPLIT:
        output = output * (1.0 / FACTOR)
        index += part.to(tl.int64) * (tl.num_programs(0) // tiles) * GROUPS * length
    else:
        output = quotient(output, (total * FACTOR)[:, None])
    column = tl.arange(0, BLOCK_EV)
    tl.store(
        outputs + index[:, None] * value_width + column[None, :],
        cast(output, outputs.dtype.element_ty),
        mask=exist[:, None] & (column < value_width)[None, :],
    )
    tl.store(normalizers + index, total, mask=exist)
