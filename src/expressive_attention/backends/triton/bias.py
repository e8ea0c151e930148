"""Kernels for float masks: the largest bias of each row, and the gradient of the mask."""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import drop, streams
from .tiles import (
    ALIBI,
    FLOAT,
    add,
    biased,
    cast,
    head_of,
    key_ranges,
    largest,
    load_mask,
    load_rows,
    load_stats,
    mask_rows,
    nothing_lost,
    product,
    rows_of,
    seen,
    sees,
    sequence_of,
    unit,
    weight_of,
    wide_parts,
    wide_weight_and_half_derivative,
)
from .wide import lost_rows

__all__ = ["bias_gradient_kernel", "bias_max_kernel"]


@triton.jit(do_not_specialize=["mask_strides", "right", "left", "lower_right", "length", "keys", "kv_heads", "tiles"])
def bias_max_kernel(
    mask, bias_maxima, query_starts, key_starts, key_lengths, mask_strides, mask_stride,
    right, left, lower_right, length, keys, kv_heads, tiles,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest bias that each row sees, as `masks.row_bias_max`."""
    program = tl.program_id(0)
    tile = program % tiles
    sequence, _kv_head, _batch, _row, _key, own_length, own_keys, band, position, head, exist, index = rows_of(
        tile, program // tiles, length, keys, kv_heads, right, left, lower_right, query_starts, key_starts, key_lengths,
        GROUPS, CAUSAL, WINDOW, BLOCK_M,
    )  # fmt: skip
    rows = mask_rows(mask, mask_strides, sequence, head, position)
    if MASK == ALIBI:
        place = position + band[0]
        lowest, highest = position * 0, position * 0 + own_keys - 1
        if CAUSAL:
            highest = tl.minimum(highest, position + band[1])
        if WINDOW:
            lowest = tl.maximum(lowest, position + band[2])
        nearest = tl.minimum(tl.maximum(place, lowest), highest)
        bias_max = tl.where(lowest <= highest, -tl.load(rows) * tl.abs(place - nearest).to(tl.float32), 0.0)
    else:
        last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUPS, own_length - 1)
        first, _whole, _end, last = key_ranges(
            0, own_keys, tile * BLOCK_M // GROUPS, last_position, band, CAUSAL, WINDOW, MASK, BLOCK_N
        )
        bias_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for start in range(first, last, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)[None, :]
            visible = sees(j, position[:, None], exist[:, None], own_keys, band, CAUSAL, WINDOW)
            bias = load_mask(rows[:, None], j, j, mask_stride, visible, FLOAT)
            bias_max = tl.maximum(bias_max, largest(bias, 1))
        bias_max = tl.where(bias_max == float("-inf"), 0.0, bias_max)
    tl.store(bias_maxima + index, bias_max, mask=exist)


@triton.jit(
    do_not_specialize=[
        "mask_strides",
        "mask_batches",
        "mask_heads",
        "mask_queries",
        "mask_keys",
        "scale_exponent",
        "right",
        "left",
        "lower_right",
        "length",
        "keys",
        "heads",
        "batches",
        "share",
        "threshold",
    ]
)
def bias_gradient_kernel(
    query, key, value, mask, bias_maxima, key_lengths, seeds, grad_output, stats, lost, gradient,
    query_strides, key_strides, value_strides, grad_strides, mask_strides, mask_stride,
    mask_batches, mask_heads, mask_queries, mask_keys,
    scale, scale_exponent, right, left, lower_right, length, keys, heads, batches, width, value_width,
    share, threshold, grown,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """dbias_ij = w_ij (dO_i . v_j / N_i - shift_i) of a tile of the mask, summed over all that it is repeated for.

    One program per tile of the mask ``(B | 1, Hq | 1, L | 1, S | 1)``; it runs over the batches, heads, rows
    (`ONE_ROW`) and keys (`ONE_KEY`) that share the tile, in order.
    """
    TYPE: tl.constexpr = tl.float32 if WIDE else query.dtype.element_ty
    if WIDE:
        if nothing_lost(lost, batches * (heads // GROUPS)):
            return
    tile_m, tile_n = tl.program_id(1), tl.program_id(2)
    mask_batch, mask_head = head_of(tl.program_id(0), mask_heads)
    first_batch, last_batch = mask_batch, mask_batch + 1
    if mask_batches == 1:
        last_batch = mask_batch + batches
    first_head, last_head = mask_head, mask_head + 1
    if mask_heads == 1:
        last_head = mask_head + heads
    first_row, last_row = tile_m * BLOCK_M, tl.minimum((tile_m + 1) * BLOCK_M, length)
    if ONE_ROW:
        first_row, last_row = tile_m * 0, length
    first_key, last_key = tile_n * BLOCK_N, tl.minimum((tile_n + 1) * BLOCK_N, keys)
    if ONE_KEY:
        first_key, last_key = tile_n * 0, keys

    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for batch in range(first_batch, last_batch):
        _batch, _row, _key, _length, _room, own_keys, band = sequence_of(
            batch, length, keys, right, left, lower_right, None, None, key_lengths, CAUSAL, WINDOW
        )
        for head in range(first_head, last_head):
            start_row, stop_row = first_row, last_row
            if WIDE:
                if tl.load(lost + batch * (heads // GROUPS) + head // GROUPS) == 0:
                    stop_row = start_row
            for row in range(start_row, stop_row, BLOCK_M):
                position = row + tl.arange(0, BLOCK_M)
                exist = position < length
                index = (batch * heads + head) * length + position
                if WIDE:
                    exist, row_exponent = lost_rows(stats, index, exist)
                _inverse, coefficient, shift, _dn = load_stats(stats, index, exist, WIDE)
                bias_max = tl.load(stats + index * 8 + 5 if WIDE else bias_maxima + index, mask=exist, other=0.0)
                rows = mask_rows(mask, mask_strides, batch, head, position)
                q = load_rows(
                    query + batch * query_strides[0] + head * query_strides[1],
                    position.to(tl.int64) * query_strides[2], exist, query_strides[3], width, BLOCK_E, TYPE,
                )  # fmt: skip
                do = load_rows(
                    grad_output + batch * grad_strides[0] + head * grad_strides[1],
                    position.to(tl.int64) * grad_strides[2], exist, grad_strides[3], value_width, BLOCK_EV, TYPE,
                )  # fmt: skip
                start_key, stop_key = first_key, tl.minimum(last_key, own_keys)
                if CAUSAL:
                    stop_key = tl.minimum(stop_key, tl.minimum(row + BLOCK_M, length) + band[1])
                if WINDOW:
                    start_key += tl.maximum(row + band[2] - first_key, 0) // BLOCK_N * BLOCK_N
                for start in range(start_key, stop_key, BLOCK_N):
                    j = start + tl.arange(0, BLOCK_N)
                    inside = j < own_keys
                    k = load_rows(
                        key + batch * key_strides[0] + head // GROUPS * key_strides[1],
                        j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, TYPE,
                    )  # fmt: skip
                    v = load_rows(
                        value + batch * value_strides[0] + head // GROUPS * value_strides[1],
                        j.to(tl.int64) * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, TYPE,
                    )  # fmt: skip
                    zero = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
                    if WIDE:
                        unit_q, q_exponent = unit(q)
                        unit_k, k_exponent = unit(k)
                        z = product(unit_q, tl.trans(unit_k), zero, PRECISION) * scale
                        u, r, c = wide_parts(z, q_exponent[:, None] + k_exponent[None, :] + scale_exponent, FORM)
                    else:
                        weight = weight_of(product(q, tl.trans(k), zero, PRECISION), scale, FORM)
                    visible = sees(j[None, :], position[:, None], exist[:, None], own_keys, band, CAUSAL, WINDOW)
                    tile = load_mask(rows[:, None], j[None, :], j[None, :], mask_stride, visible, FLOAT)
                    if WIDE:
                        weight, _ = wide_weight_and_half_derivative(
                            u, r, c, tile, row_exponent[:, None], bias_max[:, None], FLOAT
                        )
                    else:
                        weight = biased(weight, tile, bias_max[:, None], FLOAT)
                    of_values = product(do, tl.trans(v), zero, PRECISION)
                    if seeds is not None:
                        stream = streams(seeds, share, threshold, batch, heads, head + position * 0, position)
                        of_values = drop(of_values, stream, start, BLOCK_N) * grown
                    g = of_values * coefficient[:, None] - shift[:, None]
                    sums += tl.where(seen(tile, visible, FLOAT), weight * g, 0.0)

    place_m, place_n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_ROW:
        sums = tl.broadcast_to(add(sums, 0)[None, :], (BLOCK_M, BLOCK_N))
    if ONE_KEY:
        sums = tl.broadcast_to(add(sums, 1)[:, None], (BLOCK_M, BLOCK_N))
    inside = (place_m < mask_queries)[:, None] & (place_n < mask_keys)[None, :]
    place = (mask_batch * mask_heads + mask_head) * mask_queries + place_m
    place = gradient + place[:, None] * mask_keys + place_n[None, :]
    if WIDE:
        sums += cast(tl.load(place, mask=inside, other=0.0), tl.float32)
    tl.store(place, cast(sums, gradient.dtype.element_ty), mask=inside)
