"""Rows that need a second look: weights left float32's range, or a result is not finite.

Vectors of query and key are brought to length one by powers of two, so that scores of any size are known, as in
`reference`. Each row has an exponent r, that of the score of its largest weight, and a bias_max p, the bias there: the
weights are ``w_ij / (4^r_i exp(p_i))``, at most about 1, and what they are divided by is left to the end. The largest
weight decides, not the largest bias: a key whose score is 0 has no weight, however high its bias.

Only pairs that are seen count: hidden ones are left out of every product, see `tiles.selected_product`. Nearly always
there are no such rows, and a program returns at once.
"""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import is_listed, list_ranges, listed_of, place_of, visible_listed_keys
from .dropout import drop, streams
from .tiles import (
    FLOAT,
    add,
    any_of,
    cast,
    exponential,
    is_lost,
    key_ranges,
    largest,
    load_mask,
    load_rows,
    mask_rows,
    nothing_lost,
    product,
    quotient,
    rounding_of_difference,
    rows_of,
    scaled,
    seen,
    sees,
    selected_product,
    unit,
    visible_keys,
    wide_parts,
    wide_weight_and_half_derivative,
)

__all__ = ["lost_rows", "wide_kernel"]

_NOT_LOST = tl.constexpr(-(2.0**20))  # the exponent of a row that is right as it is, below all others
_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def lost_rows(stats, index, exist):
    """Return which rows are computed once more, and their exponents."""
    exponent = tl.load(stats + index * 8 + 4, mask=exist, other=_NOT_LOST)
    return exist & (exponent != _NOT_LOST), exponent.to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "mask_strides", "block_strides", "lowest", "scale_exponent", "right", "left", "lower_right", "length", "keys",
        "kv_heads", "tiles", "programs", "share", "threshold",
    ]
)  # fmt: skip
def wide_kernel(
    query, key, value, mask, bias_maxima, query_starts, key_starts, key_lengths, seeds, blocks, outputs,
    normalizers, grad_output, grad_normalizer, stats, wide_stats, lost,
    query_strides, key_strides, value_strides, grad_strides, mask_strides, mask_stride, block_strides,
    scale, scale_exponent, lowest, right, left, lower_right, length, keys, kv_heads, width, value_width, tiles,
    programs, share, threshold, grown,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr,
    BACKWARD: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Output, normalizer and bias_max of the lost rows; with `BACKWARD`, their numbers, as of `row_kernel`.

    Six of eight here, of which the last are r and p; the normalizer is that of the weights relative to both, the
    derivative that by ``z / 2^r``. The r of other rows is `_NOT_LOST`, and the rest is not written. `lost` tells of
    every key head whether it has such rows; where it is 2, there are results that are not finite, and all rows are
    computed once more.
    Rows that are written here have no part in what `stats` says any more.
    """
    if lost is not None:
        if nothing_lost(lost, programs // tiles):
            return
    for program in range(tl.program_id(0), programs, tl.num_programs(0)):
        tile = program % tiles
        (
            sequence, kv_head, batch, first_row, first_key, own_length, own_keys, band, position, head, exist, index,
        ) = rows_of(
            tile, program // tiles, length, keys, kv_heads, right, left, lower_right, query_starts, key_starts,
            key_lengths, GROUPS, CAUSAL, WINDOW, BLOCK_M,
        )  # fmt: skip
        everything = position < 0
        if lost is not None:
            state = tl.load(lost + program // tiles)
            exist = exist & (state != 0)
            everything = exist & (state == 2)
        if BACKWARD:
            store = exist & (everything | (tl.load(stats + index * 4, mask=exist, other=1.0) == 0.0))
            tl.store(wide_stats + index * 8 + 4, tl.full((BLOCK_M,), _NOT_LOST, tl.float32), mask=exist)
        else:
            normalizer = tl.load(normalizers + index, mask=exist, other=1.0)
            store = exist & is_lost(normalizer, lowest)
        own_keys = tl.where(any_of(store), own_keys, 0)
        rows = mask_rows(mask, mask_strides, sequence, head, position)
        offset = head * query_strides[1] + (first_row + position).to(tl.int64) * query_strides[2]
        q = load_rows(query + batch * query_strides[0], offset, exist, query_strides[3], width, BLOCK_E, tl.float32)
        bias_max = tl.full((BLOCK_M,), 0.0, tl.float32)
        if MASK >= FLOAT:
            bias_max = tl.load(bias_maxima + index, mask=exist, other=0.0)
        # A normalizer of 0 is exact where the row sees no key, or the query is 0.
        normalizer = tl.load(normalizers + index, mask=exist, other=1.0)
        listed = None
        if blocks is not None:
            listed = listed_of(blocks, block_strides, sequence, kv_head, head, position, tile * BLOCK_M, LISTED)
            first, whole, last = list_ranges(listed[0], own_keys, 0, 1, LISTED[1], BLOCK_N)
            count = visible_listed_keys(
                listed, position, rows, store, mask_stride, own_keys, band, first, whole, last,
                CAUSAL, WINDOW, MASK, LISTED, BLOCK_N,
            )  # fmt: skip
        else:
            count = visible_keys(position, rows, store, mask_stride, own_keys, band, bias_max, CAUSAL, WINDOW, MASK)
        has_weights = (count > 0) & ~(largest(tl.abs(q), 1) == 0.0)
        has_weights = everything | (normalizer != 0.0) | has_weights
        if MASK >= FLOAT and not BACKWARD:
            # exp(bias_max) may be beyond float32, and 0 times that is not 0.
            tl.store(bias_maxima + index, position * 0.0, mask=store & ~has_weights)
        store = store & has_weights
        own_keys = tl.where(any_of(store), own_keys, 0)
        q, q_exponent = unit(q)
        last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUPS, own_length - 1)
        first, _whole, _end, last = key_ranges(
            0, own_keys, tile * BLOCK_M // GROUPS, last_position, band, CAUSAL, WINDOW, MASK, BLOCK_N
        )
        if blocks is not None:
            first, _whole, last = list_ranges(listed[0], own_keys, 0, 1, LISTED[1], BLOCK_N)
        keys_of_head = key + batch * key_strides[0] + kv_head * key_strides[1] + first_key.to(tl.int64) * key_strides[2]
        values_of_head = (
            value + batch * value_strides[0] + kv_head * value_strides[1] + first_key.to(tl.int64) * value_strides[2]
        )
        zero = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)

        # The largest weight of each row, as a logarithm and but for a factor of 4, and the exponent of its score.
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_exponent = position * 0
        for step in range(first, last, BLOCK_N):
            start = step
            if listed is not None:
                start = place_of(listed[0], step, LISTED[1])
            j = start + tl.arange(0, BLOCK_N)
            inside = j < own_keys
            k = load_rows(
                keys_of_head,
                j.to(tl.int64) * key_strides[2],
                inside,
                key_strides[3],
                width,
                BLOCK_E,
                tl.float32,
            )
            k, k_exponent = unit(k)
            z = product(q, tl.trans(k), zero, PRECISION) * scale
            _, _, c = wide_parts(z, q_exponent[:, None] + k_exponent[None, :] + scale_exponent, FORM)
            visible = sees(j[None, :], position[:, None], exist[:, None], own_keys, band, CAUSAL, WINDOW)
            if listed is not None:
                visible = visible & is_listed(listed, exist, start, LISTED, BLOCK_N, 1)
            bias = load_mask(rows[:, None], position[:, None] + band[0], j[None, :], mask_stride, visible, MASK)
            size = 2.0 * _LOG_2 * c.to(tl.float32)
            if MASK >= FLOAT:
                size += bias
            size = tl.where(seen(bias, visible, MASK) & (z != 0.0), size, float("-inf"))
            best_of_tile = largest(size, 1)
            exponent = largest(tl.where(size == best_of_tile[:, None], c, -(2**20)), 1)
            row_exponent = tl.where(best_of_tile > best, exponent, row_exponent)
            best = tl.maximum(best, best_of_tile)
        row_bias_max = bias_max
        if MASK >= FLOAT:
            row_bias_max = tl.where(best == float("-inf"), bias_max, best - 2.0 * _LOG_2 * row_exponent.to(tl.float32))

        stream = None
        if seeds is not None:
            heads = kv_heads * GROUPS
            stream = streams(seeds, share, threshold, batch, heads, head, first_row + position)
        do = tl.full((BLOCK_M, BLOCK_EV), 0.0, tl.float32)
        if BACKWARD:
            offset = head * grad_strides[1] + (first_row + position).to(tl.int64) * grad_strides[2]
            do = load_rows(
                grad_output + batch * grad_strides[0],
                offset,
                exist,
                grad_strides[3],
                value_width,
                BLOCK_EV,
                tl.float32,
            )
        output = tl.full((BLOCK_M, BLOCK_EV), 0.0, tl.float32)
        total = tl.full((BLOCK_M,), 0.0, tl.float32)
        top = tl.full((BLOCK_M,), 0.0, tl.float32)
        mean = tl.full((BLOCK_M,), 0.0, tl.float32)
        for step in range(first, last, BLOCK_N):
            start = step
            if listed is not None:
                start = place_of(listed[0], step, LISTED[1])
            j = start + tl.arange(0, BLOCK_N)
            inside = j < own_keys
            k = load_rows(
                keys_of_head,
                j.to(tl.int64) * key_strides[2],
                inside,
                key_strides[3],
                width,
                BLOCK_E,
                tl.float32,
            )
            v = load_rows(
                values_of_head,
                j.to(tl.int64) * value_strides[2],
                inside,
                value_strides[3],
                value_width,
                BLOCK_EV,
                tl.float32,
            )
            k, k_exponent = unit(k)
            z = product(q, tl.trans(k), zero, PRECISION) * scale
            u, r, c = wide_parts(z, q_exponent[:, None] + k_exponent[None, :] + scale_exponent, FORM)
            visible = sees(j[None, :], position[:, None], exist[:, None], own_keys, band, CAUSAL, WINDOW)
            if listed is not None:
                visible = visible & is_listed(listed, exist, start, LISTED, BLOCK_N, 1)
            bias = load_mask(rows[:, None], position[:, None] + band[0], j[None, :], mask_stride, visible, MASK)
            weight, _ = wide_weight_and_half_derivative(
                u, r, c, bias, row_exponent[:, None], row_bias_max[:, None], MASK
            )
            pairs = seen(bias, visible, MASK)
            weight = tl.where(pairs, weight, 0.0)
            total += add(weight, 1)
            if BACKWARD:
                top = tl.maximum(top, largest(weight, 1))
                of_values = product(do, tl.trans(v), zero, PRECISION)
                if stream is not None:
                    of_values = drop(of_values, stream, start, BLOCK_N)
                mean += add(tl.where(pairs, weight * of_values, 0.0), 1)
            else:
                if stream is not None:
                    weight = drop(weight, stream, start, BLOCK_N)
                output = selected_product(weight, v, pairs, output, PRECISION)

        if seeds is not None:
            mean, output = mean * grown, output * grown

        # The normalizer has to be multiplied by 4^r exp(p - bias_max), as a factor and an exponent. One below float32
        # is told by a lower bias_max, but not so low that exp(bias_max) is; it is small enough for the backward pass
        # to find the row.
        factor, exponent = tl.full((BLOCK_M,), 1.0, tl.float32), 2 * row_exponent
        if MASK >= FLOAT:
            _, shift = exponential(row_bias_max - bias_max)
            lower = tl.maximum(row_bias_max + _LOG_2 * (exponent + 100).to(tl.float32), -60.0)
            bias_max = tl.where(exponent + shift < -120, tl.minimum(bias_max, lower), bias_max)
            difference = row_bias_max - bias_max
            factor, shift = exponential(difference)
            rounding = rounding_of_difference(row_bias_max, bias_max, difference)
            factor, exponent = factor * (1.0 + rounding), exponent + shift
        if BACKWARD:
            dn = tl.full((BLOCK_M,), 0.0, tl.float32)
            if grad_normalizer is not None:
                dn = scaled(tl.load(grad_normalizer + index, mask=exist, other=0.0) * factor, exponent)
            dn = tl.where(count > 0, dn, 0.0)
            inverse = quotient(1.0, total)
            coefficient = tl.where(top >= total, 0.0, inverse)  # where one key has all of the weight, its g is 0
            shift = tl.where(coefficient == 0.0, 0.0, mean * inverse * coefficient) - dn
            tl.store(wide_stats + index * 8, inverse, mask=store)
            tl.store(wide_stats + index * 8 + 1, coefficient, mask=store)
            tl.store(wide_stats + index * 8 + 2, shift, mask=store)
            tl.store(wide_stats + index * 8 + 3, dn * total, mask=store)
            tl.store(wide_stats + index * 8 + 4, row_exponent.to(tl.float32), mask=store)
            tl.store(wide_stats + index * 8 + 5, row_bias_max, mask=store)
            for part in range(4):
                tl.store(stats + index * 4 + part, tl.full((BLOCK_M,), 0.0, tl.float32), mask=store)
        else:
            column = tl.arange(0, BLOCK_EV)
            tl.store(
                outputs + index[:, None] * value_width + column[None, :],
                cast(quotient(output, total[:, None]), outputs.dtype.element_ty),
                mask=store[:, None] & (column < value_width)[None, :],
            )
            tl.store(normalizers + index, scaled(total * factor, exponent), mask=store)
            if MASK >= FLOAT:
                tl.store(bias_maxima + index, tl.where(total == 0.0, 0.0, bias_max), mask=store)
