"""The forward kernel: a tile of rows against its keys; sums are added to and never rescaled.

It runs over all keys of a row, or over a part of them (`SPLIT`), whose sums `decode` adds up.
"""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import is_listed, list_ranges, listed_of, place_of
from .dropout import drop, streams
from .tiles import (
    ALIBI,
    FLOAT,
    NO_MASK,
    add,
    any_of,
    biased,
    cast,
    decay,
    is_finite,
    is_lost,
    key_ranges,
    load_mask,
    load_rows,
    mask_rows,
    product,
    quotient,
    rows_of,
    seen,
    sees,
    weight_of,
)

__all__ = ["forward_kernel"]


@triton.jit
def _add_keys(
    output, total, q, key, value, rows, bias_max, stream, listed, position, exist, key_strides, value_strides,
    mask_stride, scale, band, keys, width, value_width, first, last,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr, BOUNDARY: tl.constexpr,
    LISTED: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Add the keys from `first` to `last` to the sums; at a `BOUNDARY` the rows do not see all of a tile.

    With `listed` blocks, these are steps through them.
    """
    for step in range(first, last, BLOCK_N):
        start = step
        if listed is not None:
            start = place_of(listed[0], step, LISTED[1])
        j = start + tl.arange(0, BLOCK_N)
        inside = j < keys
        k = load_rows(key, j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, q.dtype)
        s = product(q, tl.trans(k), tl.full((q.shape[0], BLOCK_N), 0.0, tl.float32), PRECISION)
        weight = weight_of(s, scale, FORM)
        if MASK == ALIBI and GROUPS == 1 and not BOUNDARY:
            by_row, by_key = decay(rows, position + band[0], j, bias_max, start + BLOCK_N - 1)
            weight = weight * by_row[:, None] * by_key[None, :]
        elif BOUNDARY or MASK != NO_MASK:
            visible = exist[:, None] & inside[None, :]
            if BOUNDARY:
                visible = sees(j[None, :], position[:, None], exist[:, None], keys, band, CAUSAL, WINDOW)
                if listed is not None:
                    visible = visible & is_listed(listed, exist, start, LISTED, BLOCK_N, 1)
            tile = load_mask(rows[:, None], position[:, None] + band[0], j[None, :], mask_stride, visible, MASK)
            weight = tl.where(seen(tile, visible, MASK), biased(weight, tile, bias_max[:, None], MASK), 0.0)
        total += add(weight, 1)
        if stream is not None:
            weight = drop(weight, stream, start, BLOCK_N)
        v = load_rows(value, j.to(tl.int64) * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, WEIGHT)
        output = product(cast(weight * FACTOR, WEIGHT), v, output, PRECISION)
    return output, total


@triton.jit(
    do_not_specialize=[
        "mask_strides", "block_strides", "right", "left", "lower_right", "length", "keys", "kv_heads", "tiles", "span",
        "plane", "share", "threshold", "lowest",
    ]
)  # fmt: skip
def forward_kernel(
    query, key, value, mask, bias_maxima, query_starts, key_starts, key_lengths, seeds, blocks, outputs, normalizers,
    lost, query_strides, key_strides, value_strides, mask_strides, mask_stride, block_strides,
    scale, right, left, lower_right, length, keys, kv_heads, width, value_width, tiles, span, plane,
    share, threshold, grown, lowest,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr,
    SPLIT: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows, key head, sequence and, with `SPLIT`, range of `span` keys.

    With `SPLIT`, sums go to outputs ``(parts, B, Hq, L, Ev)`` and normalizers ``(parts, B, Hq, L)`` of float32, of
    which a part has `plane` rows. A row whose output is not finite has the normalizer NaN, so that `wide_kernel` has a
    second look at it: it may not see what is not finite. Key heads with such rows, or with normalizers that float32
    lost, are told in `lost`, where it is given.
    """
    program, part = tl.program_id(0), tl.program_id(1)
    tile = tiles - 1 - program % tiles  # with a causal mask, the longest first
    sequence, kv_head, batch, first_row, first_key, own_length, own_keys, band, position, head, exist, index = rows_of(
        tile, program // tiles, length, keys, kv_heads, right, left, lower_right, query_starts, key_starts, key_lengths,
        GROUPS, CAUSAL, WINDOW, BLOCK_M,
    )  # fmt: skip
    if query_starts is not None:
        if tile * BLOCK_M >= own_length * GROUPS:
            return
    rows = mask_rows(mask, mask_strides, sequence, head, position)

    offset = head * query_strides[1] + (first_row + position).to(tl.int64) * query_strides[2]
    q = load_rows(
        query + batch * query_strides[0], offset, exist, query_strides[3], width, BLOCK_E, query.dtype.element_ty
    )
    bias_max = tl.full((BLOCK_M,), 0.0, tl.float32)
    if MASK >= FLOAT:
        bias_max = tl.load(bias_maxima + index, mask=exist, other=0.0)

    stream = None
    if seeds is not None:
        heads = kv_heads * GROUPS
        stream = streams(seeds, share, threshold, batch, heads, head, first_row + position)

    start = part * span
    if blocks is None:
        own_keys = tl.minimum(start + span, own_keys)
    last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUPS, own_length - 1)
    first, whole, whole_last, last = key_ranges(
        start, own_keys, tile * BLOCK_M // GROUPS, last_position, band, CAUSAL, WINDOW, MASK, BLOCK_N
    )
    listed = None
    if blocks is not None:
        listed = listed_of(blocks, block_strides, sequence, kv_head, head, position, tile * BLOCK_M, LISTED)
        first, whole, last = list_ranges(listed[0], own_keys, part, tl.num_programs(1), LISTED[1], BLOCK_N)
        whole_last = last
    output = tl.full((BLOCK_M, BLOCK_EV), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    key += batch * key_strides[0] + kv_head * key_strides[1] + first_key.to(tl.int64) * key_strides[2]
    value += batch * value_strides[0] + kv_head * value_strides[1] + first_key.to(tl.int64) * value_strides[2]
    if WINDOW or blocks is not None:
        output, total = _add_keys(
            output, total, q, key, value, rows, bias_max, stream, listed, position, exist, key_strides, value_strides,
            mask_stride, scale, band, own_keys, width, value_width, first, whole,
            CAUSAL, WINDOW, FORM, MASK, True, LISTED, GROUPS, PRECISION, WEIGHT, FACTOR, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
    output, total = _add_keys(
        output, total, q, key, value, rows, bias_max, stream, listed, position, exist, key_strides, value_strides,
        mask_stride, scale, band, own_keys, width, value_width, whole, whole_last,
        CAUSAL, WINDOW, FORM, MASK, False, LISTED, GROUPS, PRECISION, WEIGHT, FACTOR, BLOCK_N, BLOCK_E, BLOCK_EV,
    )  # fmt: skip
    if blocks is None:
        output, total = _add_keys(
            output, total, q, key, value, rows, bias_max, stream, listed, position, exist, key_strides, value_strides,
            mask_stride, scale, band, own_keys, width, value_width, whole_last, last,
            CAUSAL, WINDOW, FORM, MASK, True, LISTED, GROUPS, PRECISION, WEIGHT, FACTOR, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip

    total = tl.where(is_finite(output), total, float("nan"))
    if seeds is not None:
        output = output * grown
    if SPLIT:
        output = output * (1.0 / FACTOR)
        index += part.to(tl.int64) * plane
    else:
        output = quotient(output, (total * FACTOR)[:, None])
    column = tl.arange(0, BLOCK_EV)
    tl.store(
        outputs + index[:, None] * value_width + column[None, :],
        cast(output, outputs.dtype.element_ty),
        mask=exist[:, None] & (column < value_width)[None, :],
    )
    tl.store(normalizers + index, total, mask=exist)
    if lost is not None:
        if any_of(exist & is_lost(total, lowest)):
            tl.store(lost + program // tiles, 1)
