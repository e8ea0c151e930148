"""The backward kernels: numbers of each row, then dQ by tiles of rows, then dK and dV by tiles of keys.

With c_i = 1 / N_i and shift_i = c_i dO_i . o_i - dN_i:

    dv_j  = sum_i c_i w_ij dO_i
    ds_ij = scale f'(z_ij) exp(bias_ij) (c_i dO_i . v_j - shift_i)
    dq_i  = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i

Every sum is one program's, in order: gradients are the same bits every time. Rows whose normalizer float32 lost have
c_i = shift_i = 0. The kernels run a second time for these (`WIDE`), with exponents as in `wide`, and return at once
where there are none. Where a gradient is not finite, all rows of the key head are computed a second time: there hidden
pairs are left out of the products, too.

Where one key has all of the weight, g is 0 exactly, which the difference of two roundings is not, and f'(z) / N = 2 / z
would magnify them: such a row has c_i dO_i . o_i = c_i = 0 in ds. The row kernel knows those that see one key;
with weights at hand, also those whose other weights are 0.

The part of dq along q is what remains of terms that cancel, since sum_j w_ij (c_i dO_i . v_j - c_i dO_i . o_i) = 0.
With f the form expressive, and dN in the parentheses as above:

    q_i . dq_i = 2 sum_j w_ij (1 - f(z_ij)) (c_i dO_i . v_j - shift_i)
               = 2 (dN_i N_i - sum_j w_ij f(z_ij) (c_i dO_i . v_j - shift_i))

The last line does not lose z^-2 where z is small, and with f(z) = z^2 it is ``2 dN_i N_i``. With `RADIAL`, dq is
corrected along q where the mean of f is below 1/2. 16-bit gradients are not worth it, but for E = 1: what dq loses
along q is less than its rounding.
"""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import entries_of, is_listed, list_of, list_ranges, listed_of, place_of, visible_listed_keys
from .dropout import drop, streams
from .tiles import (
    ALIBI,
    FLOAT,
    NO_MASK,
    SQUARED,
    add,
    any_of,
    biased,
    cast,
    decay,
    head_of,
    is_finite,
    is_lost,
    key_ranges,
    largest,
    load_mask,
    load_rows,
    load_stats,
    mark,
    mask_rows,
    nothing_lost,
    product,
    quotient,
    rows_in,
    rows_of,
    scaled,
    seen,
    sees,
    selected_product,
    sequence_of,
    unit,
    visible_keys,
    weight_and_half_derivative,
    weight_of,
    wide_parts,
    wide_weight_and_half_derivative,
)
from .wide import lost_rows

__all__ = ["key_value_kernel", "query_kernel", "row_kernel"]


@triton.jit
def _mean(
    q, do, key, value, rows, bias_max, stream, position, exist, key_strides, value_strides, mask_stride,
    scale, band, keys, width, value_width, first, last,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """sum_j w_ij dO_i . v_j of rows, over the keys from `first` to `last`, and the largest w_ij."""
    mean, top = tl.full((q.shape[0],), 0.0, tl.float32), tl.full((q.shape[0],), 0.0, tl.float32)
    for start in range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < keys
        k = load_rows(key, j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, q.dtype)
        v = load_rows(
            value, j.to(tl.int64) * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, q.dtype
        )
        zero = tl.full((q.shape[0], BLOCK_N), 0.0, tl.float32)
        weight = weight_of(product(q, tl.trans(k), zero, PRECISION), scale, FORM)
        visible = sees(j[None, :], position[:, None], exist[:, None], keys, band, CAUSAL, WINDOW)
        tile = load_mask(rows[:, None], position[:, None] + band[0], j[None, :], mask_stride, visible, MASK)
        pairs = seen(tile, visible, MASK)
        weight = tl.where(pairs, biased(weight, tile, bias_max[:, None], MASK), 0.0)
        of_values = product(do, tl.trans(v), zero, PRECISION)
        if stream is not None:
            of_values = drop(of_values, stream, start, BLOCK_N)
        mean += add(tl.where(pairs, weight * of_values, 0.0), 1)
        top = tl.maximum(top, largest(weight, 1))
    return mean, top


@triton.jit
def _has_all(top, normalizer):
    """Whether the largest of the weights of a row is all that there is, but for a rounding."""
    return top * (1.0 + 2.0**-22) >= normalizer


@triton.jit(
    do_not_specialize=[
        "mask_strides", "block_strides", "lowest", "right", "left", "lower_right", "length", "keys", "kv_heads",
        "tiles", "share", "threshold",
    ]
)  # fmt: skip
def row_kernel(
    query, key, value, mask, bias_maxima, query_starts, key_starts, key_lengths, seeds, blocks,
    grad_output, grad_normalizer, outputs, normalizers, stats, lost,
    query_strides, key_strides, value_strides, grad_strides, mask_strides, mask_stride, block_strides,
    scale, lowest, right, left, lower_right, length, keys, kv_heads, width, value_width, tiles, share, threshold, grown,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr,
    EXACT: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Four numbers for each row: c for dv, c for ds, shift, dN N; all of them 0 where the row is lost.

    They lie side by side, so that one access reads all of them. `lost` learns which key heads have lost rows. With
    `EXACT`, dO . o comes from the weights, not from the rounded output.
    """
    TYPE: tl.constexpr = query.dtype.element_ty
    program = tl.program_id(0)
    tile = program % tiles
    sequence, kv_head, batch, first_row, first_key, own_length, own_keys, band, position, head, exist, index = rows_of(
        tile, program // tiles, length, keys, kv_heads, right, left, lower_right, query_starts, key_starts, key_lengths,
        GROUPS, CAUSAL, WINDOW, BLOCK_M,
    )  # fmt: skip
    if query_starts is not None:
        if tile * BLOCK_M >= own_length * GROUPS:
            return
    rows = mask_rows(mask, mask_strides, sequence, head, position)
    offset = head * grad_strides[1] + (first_row + position).to(tl.int64) * grad_strides[2]
    do = load_rows(grad_output + batch * grad_strides[0], offset, exist, grad_strides[3], value_width, BLOCK_EV, TYPE)
    offset = head * query_strides[1] + (first_row + position).to(tl.int64) * query_strides[2]
    query += batch * query_strides[0]
    key += batch * key_strides[0] + kv_head * key_strides[1] + first_key.to(tl.int64) * key_strides[2]
    value += batch * value_strides[0] + kv_head * value_strides[1] + first_key.to(tl.int64) * value_strides[2]
    bias_max = tl.full((BLOCK_M,), 0.0, tl.float32)
    if MASK >= FLOAT:
        bias_max = tl.load(bias_maxima + index, mask=exist, other=0.0)
    dn = tl.full((BLOCK_M,), 0.0, tl.float32)
    if grad_normalizer is not None:
        dn = tl.load(grad_normalizer + index, mask=exist, other=0.0)

    normalizer = tl.load(normalizers + index, mask=exist, other=1.0)
    if blocks is not None:
        listed = listed_of(blocks, block_strides, sequence, kv_head, head, position, tile * BLOCK_M, LISTED)
        first, whole, last = list_ranges(listed[0], own_keys, 0, 1, LISTED[1], BLOCK_N)
        count = visible_listed_keys(
            listed, position, rows, exist, mask_stride, own_keys, band, first, whole, last,
            CAUSAL, WINDOW, MASK, LISTED, BLOCK_N,
        )  # fmt: skip
    else:
        count = visible_keys(position, rows, exist, mask_stride, own_keys, band, bias_max, CAUSAL, WINDOW, MASK)
    is_wide = exist & is_lost(normalizer, lowest) & (count > 0)
    if EXACT:
        q = load_rows(query, offset, exist, query_strides[3], width, BLOCK_E, TYPE)
        last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUPS, own_length - 1)
        first, _whole, _end, last = key_ranges(
            0, own_keys, tile * BLOCK_M // GROUPS, last_position, band, CAUSAL, WINDOW, MASK, BLOCK_N
        )
        stream = None
        if seeds is not None:
            heads = kv_heads * GROUPS
            stream = streams(seeds, share, threshold, batch, heads, head, first_row + position)
        mean, top = _mean(
            q, do, key, value, rows, bias_max, stream, position, exist, key_strides, value_strides, mask_stride,
            scale, band, own_keys, width, value_width, first, last,
            CAUSAL, WINDOW, FORM, MASK, PRECISION, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
        mean = quotient(mean, normalizer)
        if seeds is not None:
            mean *= grown
        is_wide = is_wide | (exist & (count > 1) & _has_all(top, normalizer))
    else:
        column = tl.arange(0, BLOCK_EV)
        o = tl.load(
            outputs + index[:, None] * value_width + column[None, :],
            mask=exist[:, None] & (column < value_width)[None, :],
            other=0.0,
        )
        mean = add(cast(o, tl.float32) * cast(do, tl.float32), 1)
    inverse = tl.where(is_wide, 0.0, quotient(1.0, normalizer))
    coefficient = tl.where(count > 1, inverse, 0.0)
    dn = tl.where(is_wide | (count == 0), 0.0, dn)
    shift = tl.where(is_wide | (count <= 1), 0.0, mean * coefficient) - dn
    stats += index * 4
    tl.store(stats, inverse, mask=exist)
    tl.store(stats + 1, coefficient, mask=exist)
    tl.store(stats + 2, shift, mask=exist)
    tl.store(stats + 3, dn * normalizer, mask=exist)
    if any_of(is_wide):
        tl.store(lost + program // tiles, 1)


@triton.jit
def _query_tiles(
    dq, sums, q, do, key, value, rows, bias_max, stream, listed, coefficient, shift, position, exist,
    key_strides, value_strides, mask_stride, scale, scale_exponent, q_exponent, row_exponent, band, keys,
    width, value_width, first, last,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr, BOUNDARY: tl.constexpr,
    LISTED: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, RADIAL: tl.constexpr, PRECISION: tl.constexpr,
    DS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Add the keys from `first` to `last`, as `forward_pass._add_keys`.

    With `RADIAL`, `sums` are those of w f and of w f (c dO . v - shift), and the largest w.
    """
    squares, radial, top = sums
    for step in range(first, last, BLOCK_N):
        start = step
        if listed is not None:
            start = place_of(listed[0], step, LISTED[1])
        j = start + tl.arange(0, BLOCK_N)
        inside = j < keys
        k = load_rows(key, j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, q.dtype)
        v = load_rows(
            value, j.to(tl.int64) * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, q.dtype
        )
        zero = tl.full((q.shape[0], BLOCK_N), 0.0, tl.float32)
        if WIDE:
            unit_k, k_exponent = unit(k)
            z = product(q, tl.trans(unit_k), zero, PRECISION) * scale
            u, r, c = wide_parts(z, q_exponent[:, None] + k_exponent[None, :] + scale_exponent, FORM)
            f = scaled(u * u * r, 2 * c)
        else:
            s = product(q, tl.trans(k), zero, PRECISION)
            f, derivative = weight_and_half_derivative(s, scale, FORM)
            weight = f
        masked: tl.constexpr = WIDE or BOUNDARY or (MASK != NO_MASK and not (MASK == ALIBI and GROUPS == 1))
        if masked:
            visible = exist[:, None] & inside[None, :]
            if WIDE or BOUNDARY:
                visible = sees(j[None, :], position[:, None], exist[:, None], keys, band, CAUSAL, WINDOW)
                if listed is not None:
                    visible = visible & is_listed(listed, exist, start, LISTED, BLOCK_N, 1)
            tile = load_mask(rows[:, None], position[:, None] + band[0], j[None, :], mask_stride, visible, MASK)
            pairs = seen(tile, visible, MASK)
            if WIDE:
                row = row_exponent[:, None]
                weight, derivative = wide_weight_and_half_derivative(u, r, c, tile, row, bias_max[:, None], MASK)
            else:
                weight, derivative = (
                    biased(weight, tile, bias_max[:, None], MASK),
                    biased(derivative, tile, bias_max[:, None], MASK),
                )
        elif MASK == ALIBI:
            by_row, by_key = decay(rows, position + band[0], j, bias_max, start + BLOCK_N - 1)
            weight, derivative = (
                weight * by_row[:, None] * by_key[None, :],
                derivative * by_row[:, None] * by_key[None, :],
            )
        of_values = product(do, tl.trans(v), zero, PRECISION)
        if stream is not None:
            of_values = drop(of_values, stream, start, BLOCK_N)
        g = of_values * coefficient[:, None] - shift[:, None]
        ds = derivative * g
        if masked:
            ds = tl.where(pairs, ds, 0.0)
        if RADIAL:
            square = weight * f
            if masked:
                weight, square, g = tl.where(pairs, weight, 0.0), tl.where(pairs, square, 0.0), tl.where(pairs, g, 0.0)
            top = tl.maximum(top, largest(weight, 1))
            if FORM != SQUARED:
                squares += add(square, 1)
                radial += add(square * g, 1)
        if WIDE:
            dq = selected_product(ds, k, pairs, dq, PRECISION)
        else:
            dq = product(cast(ds, DS), cast(k, DS), dq, PRECISION)
    return dq, (squares, radial, top)


@triton.jit
def _along(q, exponent, dq, wanted):
    """The part that dq lacks along the rows 2^exponent q, so that their product with it is the wanted one."""
    size = add(q * q, 1)
    return q * quotient(scaled(wanted, -exponent) - add(q * dq, 1), size)[:, None]


@triton.jit(
    do_not_specialize=[
        "mask_strides", "block_strides", "scale_exponent", "right", "left", "lower_right", "length", "keys", "kv_heads",
        "tiles", "programs", "share", "threshold",
    ]
)  # fmt: skip
def query_kernel(
    query, key, value, mask, bias_maxima, query_starts, key_starts, key_lengths, seeds, blocks,
    grad_output, stats, normalizers, lost, gradient,
    query_strides, key_strides, value_strides, grad_strides, mask_strides, mask_stride, block_strides,
    scale, scale_exponent, right, left, lower_right, length, keys, kv_heads, width, value_width, tiles, programs,
    share, threshold, grown,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr, RADIAL: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, DS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """The gradient of the query ``(B, Hq, L, E)``: one program per tile of rows, key head and sequence.

    It says in `lost` where a gradient is not finite, and in `stats` which rows turn out to have all weight on one key.
    """
    TYPE: tl.constexpr = tl.float32 if WIDE else query.dtype.element_ty
    if WIDE:
        if nothing_lost(lost, programs // tiles):
            return
    # Without `WIDE` there is one program for each tile, and no loop, which would take registers.
    rounds = (programs - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    for turn in (tl.range if WIDE else tl.static_range)(rounds if WIDE else 1):
        program = tl.program_id(0) + turn * tl.num_programs(0)
        tile = tiles - 1 - program % tiles
        (
            sequence, kv_head, batch, first_row, first_key, own_length, own_keys, band, position, head, exist, index,
        ) = rows_of(
            tile, program // tiles, length, keys, kv_heads, right, left, lower_right, query_starts, key_starts,
            key_lengths, GROUPS, CAUSAL, WINDOW, BLOCK_M,
        )  # fmt: skip
        q_exponent, row_exponent = position * 0, position * 0
        if WIDE:
            exist, row_exponent = lost_rows(stats, index, exist & (tl.load(lost + program // tiles) != 0))
        if WIDE or query_starts is not None:
            own_keys = tl.where(any_of(exist), own_keys, 0)
        inverse, coefficient, shift, dn_n = load_stats(stats, index, exist, WIDE)
        bias_max = tl.full((BLOCK_M,), 0.0, tl.float32)
        if MASK >= FLOAT:
            bias_max = tl.load(bias_maxima + index, mask=exist, other=0.0)
            if WIDE:
                bias_max = tl.load(stats + index * 8 + 5, mask=exist, other=0.0)
        rows = mask_rows(mask, mask_strides, sequence, head, position)
        stream = None
        if seeds is not None:
            heads = kv_heads * GROUPS
            stream = streams(seeds, share, threshold, batch, heads, head, first_row + position)
            coefficient *= grown
        offset = head * query_strides[1] + (first_row + position).to(tl.int64) * query_strides[2]
        q = load_rows(query + batch * query_strides[0], offset, exist, query_strides[3], width, BLOCK_E, TYPE)
        if WIDE:
            q, q_exponent = unit(q)
        offset = head * grad_strides[1] + (first_row + position).to(tl.int64) * grad_strides[2]
        do = load_rows(
            grad_output + batch * grad_strides[0], offset, exist, grad_strides[3], value_width, BLOCK_EV, TYPE
        )

        last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUPS, own_length - 1)
        first, whole, whole_last, last = key_ranges(
            0, own_keys, tile * BLOCK_M // GROUPS, last_position, band, CAUSAL, WINDOW, MASK, BLOCK_N
        )
        listed = None
        if blocks is not None:
            listed = listed_of(blocks, block_strides, sequence, kv_head, head, position, tile * BLOCK_M, LISTED)
            first, whole, last = list_ranges(listed[0], own_keys, 0, 1, LISTED[1], BLOCK_N)
            whole_last = last
        dq = tl.full((BLOCK_M, BLOCK_E), 0.0, tl.float32)
        nothing = tl.full((BLOCK_M,), 0.0, tl.float32)
        sums = (nothing, nothing, nothing)
        keys_of_head = key + batch * key_strides[0] + kv_head * key_strides[1] + first_key.to(tl.int64) * key_strides[2]
        values_of_head = (
            value + batch * value_strides[0] + kv_head * value_strides[1] + first_key.to(tl.int64) * value_strides[2]
        )
        if WINDOW or blocks is not None:
            dq, sums = _query_tiles(
                dq, sums, q, do, keys_of_head, values_of_head, rows, bias_max, stream, listed, coefficient, shift,
                position, exist, key_strides, value_strides, mask_stride, scale, scale_exponent, q_exponent,
                row_exponent, band, own_keys, width, value_width, first, whole,
                CAUSAL, WINDOW, FORM, MASK, True, LISTED, GROUPS, WIDE, RADIAL, PRECISION, DS,
                BLOCK_N, BLOCK_E, BLOCK_EV,
            )  # fmt: skip
        dq, sums = _query_tiles(
            dq, sums, q, do, keys_of_head, values_of_head, rows, bias_max, stream, listed, coefficient, shift, position,
            exist, key_strides, value_strides, mask_stride, scale, scale_exponent, q_exponent, row_exponent, band,
            own_keys, width, value_width, whole, whole_last,
            CAUSAL, WINDOW, FORM, MASK, False, LISTED, GROUPS, WIDE, RADIAL, PRECISION, DS, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
        dq, sums = _query_tiles(
            dq, sums, q, do, keys_of_head, values_of_head, rows, bias_max, stream, listed, coefficient, shift, position,
            exist, key_strides, value_strides, mask_stride, scale, scale_exponent, q_exponent, row_exponent, band,
            own_keys, width, value_width, whole_last, last,
            CAUSAL, WINDOW, FORM, MASK, True, LISTED, GROUPS, WIDE, RADIAL, PRECISION, DS, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
        dq = dq * (2.0 * scale)
        if WIDE:
            dq = scaled(dq, (scale_exponent - row_exponent)[:, None])
        if RADIAL:
            squares, radial, top = sums
            if not WIDE:
                q, q_exponent = unit(cast(q, tl.float32))
            along = 2.0 * (dn_n - radial)
            is_small = (inverse > 0.0) & (squares * inverse < 0.5)
            for _ in range(2):  # what the first correction takes away may be much larger than what is left
                dq += tl.where(is_small[:, None], _along(q, q_exponent, dq, along), 0.0)
        if not WIDE:
            mark(lost + program // tiles, exist & ~is_finite(dq), 2)
            if RADIAL:
                normalizer = tl.load(normalizers + index, mask=exist, other=0.0)
                one_key = exist & (coefficient != 0.0) & _has_all(top, normalizer)
                mark(lost + program // tiles, one_key, 1)
                for part in range(4):
                    tl.store(stats + index * 4 + part, nothing, mask=one_key)
        column = tl.arange(0, BLOCK_E)
        tl.store(
            gradient + index[:, None] * width + column[None, :],
            cast(dq, gradient.dtype.element_ty),
            mask=exist[:, None] & (column < width)[None, :],
        )


@triton.jit
def _key_value_tiles(
    dk, dv, k, v, query, mask, bias_maxima, seeds, listed, grad_output, stats, sequence, batch, first_row, kv_head, j,
    keys, query_strides, grad_strides, mask_strides, mask_stride,
    scale, scale_exponent, k_exponent, band, length, own_length, kv_heads, width, value_width,
    share, threshold, grown, start, first, last,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr,
    BOUNDARY: tl.constexpr, WIDE: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr, DS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Add the tiles of rows from `first` to `last`; at a `BOUNDARY` not all of their rows see all keys.

    With `listed` units of rows, these are steps through them.
    """
    for step in range(first, last):
        tile = step
        if listed is not None:
            tile = place_of(listed[0], step, LISTED[2] // BLOCK_M)
        position, head, exist, index = rows_in(
            tile, batch, kv_head, kv_heads, first_row, own_length, length, GROUPS, BLOCK_M
        )
        if WIDE:
            exist, row_exponent = lost_rows(stats, index, exist)
        inverse, coefficient, shift, _ = load_stats(stats, index, exist, WIDE)
        offset = head * query_strides[1] + (first_row + position).to(tl.int64) * query_strides[2]
        q = load_rows(query + batch * query_strides[0], offset, exist, query_strides[3], width, BLOCK_E, k.dtype)
        offset = head * grad_strides[1] + (first_row + position).to(tl.int64) * grad_strides[2]
        do = load_rows(
            grad_output + batch * grad_strides[0], offset, exist, grad_strides[3], value_width, BLOCK_EV, k.dtype
        )
        zero = tl.full((k.shape[0], BLOCK_M), 0.0, tl.float32)
        if WIDE:
            unit_q, q_exponent = unit(q)
            z = product(k, tl.trans(unit_q), zero, PRECISION) * scale
            u, r, c = wide_parts(z, q_exponent[None, :] + k_exponent[:, None] + scale_exponent, FORM)
            q = scaled(q, (scale_exponent - row_exponent)[:, None])
        else:
            s = product(k, tl.trans(q), zero, PRECISION)
            weight, derivative = weight_and_half_derivative(s, scale, FORM)
        rows = mask_rows(mask, mask_strides, sequence, head, position)
        bias_max = tl.full((BLOCK_M,), 0.0, tl.float32)
        if MASK >= FLOAT:
            bias_max = tl.load(stats + index * 8 + 5 if WIDE else bias_maxima + index, mask=exist, other=0.0)
        masked: tl.constexpr = WIDE or BOUNDARY or (MASK != NO_MASK and not (MASK == ALIBI and GROUPS == 1))
        if masked:
            visible = exist[None, :] & (j < keys)[:, None]
            if WIDE or BOUNDARY:
                visible = sees(j[:, None], position[None, :], exist[None, :], keys, band, CAUSAL, WINDOW)
                if listed is not None:
                    of_rows = entries_of(listed, sequence, head, position, LISTED)
                    visible = visible & is_listed(of_rows, exist, start, LISTED, BLOCK_N, 0)
            bias = load_mask(rows[None, :], position[None, :] + band[0], j[:, None], mask_stride, visible, MASK)
            pairs = seen(bias, visible, MASK)
            if WIDE:
                row = row_exponent[None, :]
                weight, derivative = wide_weight_and_half_derivative(u, r, c, bias, row, bias_max[None, :], MASK)
            else:
                weight, derivative = (
                    biased(weight, bias, bias_max[None, :], MASK),
                    biased(derivative, bias, bias_max[None, :], MASK),
                )
        elif MASK == ALIBI:
            by_row, by_key = decay(rows, position + band[0], j, bias_max, tl.minimum(largest(j, 0), keys - 1))
            factor = by_row[None, :] * by_key[:, None]
            weight, derivative = weight * factor, derivative * factor
        # Divided by N before it is rounded to 16 bits: in float16 1 / N itself, and dO / N, may be too small.
        attention = weight * inverse[None, :] * FACTOR
        of_values = product(v, tl.trans(do), zero, PRECISION)
        if seeds is not None:
            heads = kv_heads * GROUPS
            stream = streams(seeds, share, threshold, batch, heads, head, first_row + position)
            kept = tl.trans(drop(tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32), stream, start, BLOCK_N))
            attention, of_values = attention * kept, tl.where(kept != 0.0, of_values * grown, 0.0)
        g = of_values * coefficient[None, :] - shift[None, :]
        ds = derivative * g
        if masked:
            attention, ds = tl.where(pairs, attention, 0.0), tl.where(pairs, ds, 0.0)
        attention = cast(attention, WEIGHT)
        if WIDE:
            dv = selected_product(attention, do, pairs, dv, PRECISION)
            dk = selected_product(ds, q, pairs, dk, PRECISION)
        else:
            dv = product(attention, cast(do, WEIGHT), dv, PRECISION)
            dk = product(cast(ds, DS), cast(q, DS), dk, PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "mask_strides", "block_strides", "scale_exponent", "right", "left", "lower_right", "length", "keys", "kv_heads",
        "tiles", "programs", "share", "threshold",
    ]
)  # fmt: skip
def key_value_kernel(
    query, key, value, mask, bias_maxima, query_starts, key_starts, key_lengths, seeds, blocks,
    grad_output, stats, lost, grad_key, grad_value,
    query_strides, key_strides, value_strides, grad_strides, mask_strides, mask_stride, block_strides,
    scale, scale_exponent, right, left, lower_right, length, keys, kv_heads, width, value_width, tiles, programs,
    share, threshold, grown,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FORM: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    DS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """The gradients of key and value: one program per tile of keys, key head and sequence, over all of its rows.

    It says in `lost` where a gradient is not finite.
    """
    TYPE: tl.constexpr = tl.float32 if WIDE else query.dtype.element_ty
    if WIDE:
        if nothing_lost(lost, programs // tiles):
            return
    # Without `WIDE` there is one program for each tile, and no loop, which would take registers.
    rounds = (programs - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    for turn in (tl.range if WIDE else tl.static_range)(rounds if WIDE else 1):
        program = tl.program_id(0) + turn * tl.num_programs(0)
        start = program % tiles * BLOCK_N  # with a causal mask, the longest first
        sequence, kv_head = head_of(program // tiles, kv_heads)
        batch, first_row, first_key, own_length, room, own_keys, band = sequence_of(
            sequence, length, keys, right, left, lower_right, query_starts, key_starts, key_lengths, CAUSAL, WINDOW
        )
        if WIDE:
            state = tl.load(lost + program // tiles)
            room = tl.where(state == 0, 0, room)
            own_keys = tl.minimum(own_keys, room)
        j = start + tl.arange(0, BLOCK_N)
        inside = j < own_keys
        row = (first_key + j).to(tl.int64)
        k = load_rows(
            key + batch * key_strides[0] + kv_head * key_strides[1],
            row * key_strides[2], inside, key_strides[3], width, BLOCK_E, TYPE,
        )  # fmt: skip
        v = load_rows(
            value + batch * value_strides[0] + kv_head * value_strides[1],
            row * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, TYPE,
        )  # fmt: skip

        k_exponent = j * 0
        if WIDE:
            k, k_exponent = unit(k)
        # Tiles of rows: the first with a row that sees one of the keys, those whose rows see them all, and the last.
        last = (own_length * GROUPS + BLOCK_M - 1) // BLOCK_M
        if start >= own_keys:
            last = last * 0
        first, whole = last * 0, last * 0
        end = start + BLOCK_N - 1
        if CAUSAL:
            first = tl.maximum(start - band[1], 0) * GROUPS // BLOCK_M
            whole = (tl.maximum(end - band[1], 0) * GROUPS + BLOCK_M - 1) // BLOCK_M
        if MASK == ALIBI:
            whole = tl.maximum(whole, (tl.maximum(end - band[0], 0) * GROUPS + BLOCK_M - 1) // BLOCK_M)
        whole_last = last
        if WINDOW:
            whole_last = tl.minimum(last, tl.maximum(start - band[2] + 1, 0) * GROUPS // BLOCK_M)
            last = tl.minimum(last, (tl.maximum(end - band[2] + 1, 0) * GROUPS + BLOCK_M - 1) // BLOCK_M)
        first = tl.minimum(first, last)
        whole = tl.minimum(tl.maximum(first, whole), last)
        whole_last = tl.maximum(whole, whole_last)
        listed = None
        if blocks is not None:
            listed = list_of(blocks, block_strides, sequence, kv_head, start // LISTED[1])
            first, whole, last = list_ranges(listed[0], tl.maximum(own_keys - start, 0), 0, 1, LISTED[2] // BLOCK_M, 1)
            whole_last = last
        dk = tl.full((BLOCK_N, BLOCK_E), 0.0, tl.float32)
        dv = tl.full((BLOCK_N, BLOCK_EV), 0.0, tl.float32)
        dk, dv = _key_value_tiles(
            dk, dv, k, v, query, mask, bias_maxima, seeds, listed, grad_output, stats, sequence, batch, first_row,
            kv_head, j, own_keys, query_strides, grad_strides, mask_strides, mask_stride, scale, scale_exponent,
            k_exponent, band, length, own_length, kv_heads, width, value_width, share, threshold, grown, start,
            first, whole,
            GROUPS, CAUSAL, WINDOW, FORM, MASK, True, WIDE, LISTED, PRECISION, WEIGHT, FACTOR, DS,
            BLOCK_M, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
        dk, dv = _key_value_tiles(
            dk, dv, k, v, query, mask, bias_maxima, seeds, listed, grad_output, stats, sequence, batch, first_row,
            kv_head, j, own_keys, query_strides, grad_strides, mask_strides, mask_stride, scale, scale_exponent,
            k_exponent, band, length, own_length, kv_heads, width, value_width, share, threshold, grown, start,
            whole, whole_last,
            GROUPS, CAUSAL, WINDOW, FORM, MASK, False, WIDE, LISTED, PRECISION, WEIGHT, FACTOR, DS,
            BLOCK_M, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
        if WINDOW:
            dk, dv = _key_value_tiles(
                dk, dv, k, v, query, mask, bias_maxima, seeds, listed, grad_output, stats, sequence, batch, first_row,
                kv_head, j, own_keys, query_strides, grad_strides, mask_strides, mask_stride, scale, scale_exponent,
                k_exponent, band, length, own_length, kv_heads, width, value_width, share, threshold, grown, start,
                whole_last, last,
                GROUPS, CAUSAL, WINDOW, FORM, MASK, True, WIDE, LISTED, PRECISION, WEIGHT, FACTOR, DS,
                BLOCK_M, BLOCK_N, BLOCK_E, BLOCK_EV,
            )  # fmt: skip
        dk, dv = dk * (2.0 * scale), dv * (1.0 / FACTOR)
        if seeds is not None:
            dv *= grown
        row += (batch * kv_heads + kv_head) * keys
        column, value_column = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
        place = grad_key + row[:, None] * width + column[None, :]
        value_place = grad_value + row[:, None] * value_width + value_column[None, :]
        inside = j < room
        mask_k = inside[:, None] & (column < width)[None, :]
        mask_v = inside[:, None] & (value_column < value_width)[None, :]
        if WIDE:
            # Where all rows are computed once more, nothing of the first time is left.
            stays = (state + j * 0 == 1)[:, None]
            dk += cast(tl.load(place, mask=mask_k & stays, other=0.0), tl.float32)
            dv += cast(tl.load(value_place, mask=mask_v & stays, other=0.0), tl.float32)
        else:
            mark(lost + program // tiles, inside & ~(is_finite(dk) & is_finite(dv)), 2)
        tl.store(place, cast(dk, grad_key.dtype.element_ty), mask=mask_k)
        tl.store(value_place, cast(dv, grad_value.dtype.element_ty), mask=mask_v)
