"""Rows whose weights left float32's range, computed once more: scores of any size, as in `reference`.

Vectors of query and key are brought to length one and a row of scores to a largest entry of one, by powers of two:
``z_ij = 2^r_i y_ij``. The weights are then ``w_ij = 4^r_i y_ij^2 / (1 + 4^r_i y_ij^2)``, of which the power before the
fraction is left to the end. Nearly always there are no such rows, and a program returns at once.
"""

# What Triton compiles looks wrong to a checker of Python's types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    BOOL,
    EXPRESSIVE,
    FLOAT,
    add,
    any_of,
    cast,
    exponent_of,
    head_of,
    is_lost,
    key_ranges,
    largest,
    load_mask,
    load_rows,
    mask_rows,
    masked,
    positions,
    product,
    quotient,
    scaled,
    sees,
    sequence_of,
    unit,
    visible_keys,
    wide_weight_and_half_slope,
)

__all__ = ["wide_kernel"]

_LOWEST = tl.constexpr(-(2**20))  # below every exponent


@triton.jit(
    do_not_specialize=[
        "mask_strides", "lowest", "scale_exponent", "right", "left", "lower_right", "length", "keys", "kv_heads",
        "tiles", "plane",
    ]
)  # fmt: skip
def wide_kernel(
    query, key, value, mask, peaks, query_starts, key_starts, key_lengths, outputs, normalizers,
    grad_output, grad_normalizer, stats, lost,
    query_strides, key_strides, value_strides, grad_strides, mask_strides, mask_stride,
    scale, scale_exponent, lowest, right, left, lower_right, length, keys, kv_heads, width, value_width, tiles, plane,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Output and normalizer of the lost rows; with `BACKWARD`, their numbers, as of `backward_pass.row_kernel`.

    These are four planes here: r is the last, the normalizer is that of w / 4^r, and the slope that by y. The numbers
    of other rows are 0. `lost` tells of every key head whether it has such rows.
    """
    program = tl.program_id(0)
    tile = program % tiles
    sequence, kv_head = head_of(program // tiles, kv_heads)
    batch, first_row, first_key, own_length, _room, own_keys, band = sequence_of(
        sequence, length, keys, right, left, lower_right, query_starts, key_starts, key_lengths, CAUSAL, WINDOW
    )
    if query_starts is not None:
        if tile * BLOCK_M >= own_length * GROUPS:
            return
    position, member, exist = positions(tile, own_length, GROUPS, BLOCK_M)
    head = kv_head * GROUPS + member
    index = (batch * kv_heads * GROUPS + head) * length + first_row + position
    normalizer = tl.load(normalizers + index, mask=exist, other=1.0)
    store = exist & is_lost(normalizer, lowest)
    if BACKWARD:
        for part in range(4):
            tl.store(stats + part * plane + index, tl.full((BLOCK_M,), 0.0, tl.float32), mask=exist)
    if not any_of(store):
        return
    rows = mask_rows(mask, mask_strides, sequence, head, position)
    offset = head * query_strides[1] + (first_row + position).to(tl.int64) * query_strides[2]
    q = load_rows(query + batch * query_strides[0], offset, exist, query_strides[3], width, BLOCK_E, tl.float32)
    # A normalizer of 0 is exact where the row sees no key, or the query is 0.
    count = visible_keys(position, rows, store, mask_stride, own_keys, band, CAUSAL, WINDOW, MASK)
    store = store & ((normalizer != 0.0) | ((count > 0) & (largest(tl.abs(q), 1) > 0.0)))
    if not any_of(store):
        return

    q, q_exponent = unit(q)
    peak = tl.full((BLOCK_M,), 0.0, tl.float32)
    if MASK >= FLOAT:
        peak = tl.load(peaks + index, mask=exist, other=0.0)
    last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUPS, own_length - 1)
    first, _whole, _end, last = key_ranges(
        0, own_keys, tile * BLOCK_M // GROUPS, last_position, band, CAUSAL, WINDOW, MASK, BLOCK_N
    )
    key += batch * key_strides[0] + kv_head * key_strides[1] + first_key.to(tl.int64) * key_strides[2]
    value += batch * value_strides[0] + kv_head * value_strides[1] + first_key.to(tl.int64) * value_strides[2]
    zero = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)

    row_exponent = position * 0 + _LOWEST
    for start in range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < own_keys
        k = load_rows(key, j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, tl.float32)
        k, k_exponent = unit(k)
        z = product(q, tl.trans(k), zero, PRECISION) * scale
        visible = sees(j[None, :], position[:, None], exist[:, None], own_keys, band, CAUSAL, WINDOW)
        tile_of_mask = load_mask(rows[:, None], position[:, None] + band[0], j[None, :], mask_stride, visible, MASK)
        if MASK == FLOAT:
            visible = visible & (tile_of_mask != float("-inf"))
        elif MASK == BOOL:
            visible = visible & tile_of_mask
        exponent = exponent_of(tl.abs(z)) + q_exponent[:, None] + k_exponent[None, :] + scale_exponent
        exponent = tl.where(visible & (z != 0.0), exponent, _LOWEST)
        row_exponent = tl.maximum(row_exponent, largest(exponent, 1))
    row_exponent = tl.where(row_exponent == _LOWEST, 0, row_exponent)
    if FORM == EXPRESSIVE:
        row_exponent = tl.minimum(row_exponent, 0)

    do = tl.full((BLOCK_M, BLOCK_EV), 0.0, tl.float32)
    if BACKWARD:
        offset = head * grad_strides[1] + (first_row + position).to(tl.int64) * grad_strides[2]
        do = load_rows(
            grad_output + batch * grad_strides[0], offset, exist, grad_strides[3], value_width, BLOCK_EV, tl.float32
        )
    output = tl.full((BLOCK_M, BLOCK_EV), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    mean = tl.full((BLOCK_M,), 0.0, tl.float32)
    for start in range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < own_keys
        k = load_rows(key, j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, tl.float32)
        v = load_rows(
            value, j.to(tl.int64) * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, tl.float32
        )
        k, k_exponent = unit(k)
        z = product(q, tl.trans(k), zero, PRECISION) * scale
        exponent = q_exponent[:, None] + k_exponent[None, :] + scale_exponent - row_exponent[:, None]
        weight, _ = wide_weight_and_half_slope(z, exponent, row_exponent[:, None], FORM, True)
        visible = sees(j[None, :], position[:, None], exist[:, None], own_keys, band, CAUSAL, WINDOW)
        tile_of_mask = load_mask(rows[:, None], position[:, None] + band[0], j[None, :], mask_stride, visible, MASK)
        weight = masked(weight, tile_of_mask, peak[:, None], visible, MASK)
        total += add(weight, 1)
        if BACKWARD:
            mean += add(weight * product(do, tl.trans(v), zero, PRECISION), 1)
        else:
            output = product(weight, v, output, PRECISION)

    if BACKWARD:
        tl.store(lost + sequence * kv_heads + kv_head, 1)
        dn = tl.full((BLOCK_M,), 0.0, tl.float32)
        if grad_normalizer is not None:
            dn = scaled(tl.load(grad_normalizer + index, mask=exist, other=0.0), 2 * row_exponent)
        inverse = quotient(1.0, total)
        coefficient = tl.where(count > 1, inverse, 0.0)
        tl.store(stats + index, inverse, mask=store)
        tl.store(stats + plane + index, coefficient, mask=store)
        tl.store(stats + 2 * plane + index, mean * inverse * coefficient - dn, mask=store)
        tl.store(stats + 3 * plane + index, row_exponent.to(tl.float32), mask=store)
    else:
        column = tl.arange(0, BLOCK_EV)
        tl.store(
            outputs + index[:, None] * value_width + column[None, :],
            cast(quotient(output, total[:, None]), outputs.dtype.element_ty),
            mask=store[:, None] & (column < value_width)[None, :],
        )
        tl.store(normalizers + index, scaled(total, 2 * row_exponent), mask=store)
