"""The passes of the squared form in linear time: pairs of a chunk one by one, and all others from a state.

A query at place p belongs to chunk ``p // CHUNK``, and so does a key. Rows and keys of one chunk are multiplied; rows
also read the state of all keys in chunks before theirs, and keys that of all rows in chunks after theirs
(`linear_state`). Without causality, places begin after the last chunk of keys.

With decays, a pair has the weight ``(q_i . k_j)^2 exp(c_p - c_j)``. Each c is relative to the first key of its chunk,
and the sum of two numbers of float32, so that little of the differences is lost. The factors `since` and `until`, from
and to the ends of chunks, come from differences in float64. No factor is above 1.

Gradients are those of ``sum_ij w_ij (u_i . v_j - s_i)``, with u_i = dO_i / N_i and s_i = u_i . o_i - dN_i:

    dq_i = 2 scale sum_j z_ij exp(..) g_ij k_j,   g_ij = u_i . v_j - s_i
    dk_j = 2 scale sum_i z_ij exp(..) g_ij q_i,   dv_j = sum_i w_ij u_i,   dc_j = -sum_i w_ij g_ij

Every sum is one program's, in order: results are the same bits every time.
"""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .linear_state import gradient, times_moment, trace, values
from .tiles import add, cast, is_finite, largest, load_rows, product, quotient

__all__ = ["linear_forward_kernel", "linear_key_value_kernel", "linear_query_kernel"]


@triton.jit
def _rows_of_tile(
    tile, state, first_chunk, diagonal, length, heads, GROUPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """The rows of a tile: its chunk, and of each row place, position, head, existence and index in ``(B, Hq, L)``."""
    TILES: tl.constexpr = CHUNK * GROUPS // BLOCK
    chunk = first_chunk + tile // TILES
    row = tile % TILES * BLOCK + tl.arange(0, BLOCK)
    place = chunk * CHUNK + row // GROUPS
    position, group = place - diagonal, (row % GROUPS).to(tl.int64)
    exist = (position >= 0) & (position < length)
    return chunk, place, position, state % heads * GROUPS + group, exist, (state * GROUPS + group) * length + position


@triton.jit
def _load_decays(decays, index, exist):
    """The two parts of numbers ``(..., 2)``."""
    high = tl.load(decays + 2 * index, mask=exist, other=0.0)
    return high, tl.load(decays + 2 * index + 1, mask=exist, other=0.0)


@triton.jit
def _decay(of_rows, of_keys):
    """The factors exp(c_p - c_j) of pairs; to broadcast."""
    return tl.exp(tl.minimum((of_rows[0] - of_keys[0]) + (of_rows[1] - of_keys[1]), 0.0))


@triton.jit(
    do_not_specialize=[
        "diagonal", "length", "keys", "chunks", "state_chunks", "heads", "share", "tiles", "first_chunk", "least_share",
        "least_sum",
    ]
)  # fmt: skip
def linear_forward_kernel(
    query, key, value, row_decays, key_decays, since, first_keys, sums, moments, outputs, normalizers,
    query_strides, key_strides, value_strides, scale, least_share, least_sum,
    diagonal, length, keys, chunks, state_chunks, heads, share, width, value_width, tiles, first_chunk,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows and state: output and normalizer, which is NaN where float32 does not hold a row.

    It does not if N is not between `least_sum` and infinity, or below `least_share` of |q|^2 sum_j |k_j|^2 of the
    state, for a row that is not 0 and sees a key that is not. `first_keys` has the first key of each state that is not.
    """
    program = tl.program_id(0)
    state = (program // tiles).to(tl.int64)
    chunk, place, position, head, exist, index = _rows_of_tile(
        program % tiles, state, first_chunk, diagonal, length, heads, GROUPS, CHUNK, BLOCK_M
    )
    batch, kv_head = state // heads, state % heads // share
    query += batch * query_strides[0]
    offset = head * query_strides[1] + position.to(tl.int64) * query_strides[2]
    q = load_rows(query, offset, exist, query_strides[3], width, BLOCK_E, query.dtype.element_ty)
    scaled = cast(q, tl.float32) * scale

    output = tl.full((BLOCK_M, BLOCK_EV), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    share_of_state = total
    before = tl.minimum(chunk, chunks)
    if before > 0:
        past = (state * state_chunks + before - 1) * width * BLOCK_E
        output = values(
            query, scaled, offset, exist, query_strides[3], scale, width, sums + past * BLOCK_EV, PRECISION, BLOCK_EV
        )
        through = times_moment(query, offset, exist, query_strides[3], scale, width, moments + past, BLOCK_E)
        total = add(through * scaled, 1)
        share_of_state = least_share * add(scaled * scaled, 1) * trace(moments + past, width, BLOCK_E)
        if since is not None:
            factor = tl.load(since + state * length + position, mask=exist, other=0.0)
            output, total, share_of_state = output * factor[:, None], total * factor, share_of_state * factor

    if row_decays is not None:
        of_rows = _load_decays(row_decays, state * length + position, exist)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    for start in range(chunk * CHUNK, tl.minimum(largest(place, 0) + 1, keys), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < keys
        k = load_rows(key, j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, q.dtype)
        z = product(q, tl.trans(k), tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32), PRECISION) * scale
        weight = tl.where(inside[None, :] & (j[None, :] <= place[:, None]), z * z, 0.0)
        if row_decays is not None:
            of_keys = _load_decays(key_decays, state * keys + j, inside)
            weight *= _decay((of_rows[0][:, None], of_rows[1][:, None]), (of_keys[0][None, :], of_keys[1][None, :]))
        total += add(weight, 1)
        v = load_rows(
            value, j.to(tl.int64) * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, tl.float32
        )
        output = product(weight, v, output, PRECISION)

    output = quotient(output, total[:, None])
    is_some = (tl.minimum(place, keys - 1) >= tl.load(first_keys + state)) & (largest(tl.abs(scaled), 1) > 0.0)
    is_safe = (total > least_sum) & (total < float("inf")) & (total >= share_of_state)
    is_safe = tl.where(is_some, is_safe, total == 0.0) & is_finite(output)
    column = tl.arange(0, BLOCK_EV)
    tl.store(
        outputs + index[:, None] * value_width + column[None, :],
        cast(output, outputs.dtype.element_ty),
        mask=exist[:, None] & (column < value_width)[None, :],
    )
    tl.store(normalizers + index, tl.where(is_safe, total, float("nan")), mask=exist)


@triton.jit(
    do_not_specialize=[
        "diagonal", "length", "keys", "chunks", "state_chunks", "heads", "share", "tiles", "first_chunk",
    ]
)  # fmt: skip
def linear_query_kernel(
    query, key, value, row_decays, key_decays, since, sums, moments, upstream, shifts, along, normalizers, grad_query,
    query_strides, key_strides, value_strides, scale,
    diagonal, length, keys, chunks, state_chunks, heads, share, width, value_width, tiles, first_chunk,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows and state: dq, of which the part along q is set to `along`, dN N.

    It is what is left of terms that cancel: q . dq = 2 dN N.
    """
    program = tl.program_id(0)
    state = (program // tiles).to(tl.int64)
    chunk, place, position, head, exist, index = _rows_of_tile(
        program % tiles, state, first_chunk, diagonal, length, heads, GROUPS, CHUNK, BLOCK_M
    )
    batch, kv_head = state // heads, state % heads // share
    query += batch * query_strides[0]
    offset = head * query_strides[1] + position.to(tl.int64) * query_strides[2]
    q = load_rows(query, offset, exist, query_strides[3], width, BLOCK_E, query.dtype.element_ty)
    scaled = cast(q, tl.float32) * scale
    u = load_rows(upstream, index * value_width, exist, 1, value_width, BLOCK_EV, tl.float32)
    shift = tl.load(shifts + index, mask=exist, other=0.0)

    dq = tl.full((BLOCK_M, BLOCK_E), 0.0, tl.float32)
    before = tl.minimum(chunk, chunks)
    if before > 0:
        past = (state * state_chunks + before - 1) * width * BLOCK_E
        dq = gradient(
            query, scaled, offset, exist, query_strides[3], scale, width, u, sums + past * BLOCK_EV, PRECISION, BLOCK_EV
        )
        through = times_moment(query, offset, exist, query_strides[3], scale, width, moments + past, BLOCK_E)
        dq -= shift[:, None] * through
        if since is not None:
            dq *= tl.load(since + state * length + position, mask=exist, other=0.0)[:, None]

    if row_decays is not None:
        of_rows = _load_decays(row_decays, state * length + position, exist)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    zero = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(largest(place, 0) + 1, keys), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < keys
        k = load_rows(key, j.to(tl.int64) * key_strides[2], inside, key_strides[3], width, BLOCK_E, q.dtype)
        v = load_rows(
            value, j.to(tl.int64) * value_strides[2], inside, value_strides[3], value_width, BLOCK_EV, tl.float32
        )
        z = product(q, tl.trans(k), zero, PRECISION) * scale
        ds = z * (product(u, tl.trans(v), zero, PRECISION) - shift[:, None])
        ds = tl.where(inside[None, :] & (j[None, :] <= place[:, None]), ds, 0.0)
        if row_decays is not None:
            of_keys = _load_decays(key_decays, state * keys + j, inside)
            ds *= _decay((of_rows[0][:, None], of_rows[1][:, None]), (of_keys[0][None, :], of_keys[1][None, :]))
        dq = product(ds, cast(k, tl.float32), dq, PRECISION)

    size = largest(tl.abs(scaled), 1)
    unit = scaled / tl.where(size == 0.0, 1.0, size)[:, None]
    wanted = quotient(tl.load(along + index, mask=exist, other=0.0), size)
    change = quotient(wanted - add(unit * dq, 1), add(unit * unit, 1))
    change = tl.where(tl.load(normalizers + index, mask=exist, other=0.0) == 0.0, 0.0, change)
    dq = (dq + unit * change[:, None]) * (2.0 * scale)
    column = tl.arange(0, BLOCK_E)
    tl.store(
        grad_query + index[:, None] * width + column[None, :],
        cast(dq, grad_query.dtype.element_ty),
        mask=exist[:, None] & (column < width)[None, :],
    )


@triton.jit(
    do_not_specialize=[
        "diagonal", "length", "keys", "row_chunks", "heads", "share", "tiles", "first_row_chunk",
    ]
)  # fmt: skip
def linear_key_value_kernel(
    query, key, value, row_decays, key_decays, until, sums, moments, upstream, shifts, grad_key, grad_value, grad_decay,
    query_strides, key_strides, value_strides, scale,
    diagonal, length, keys, row_chunks, heads, share, width, value_width, tiles, first_row_chunk,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys and state: dk, dv and, with decays, dc, of this state's rows."""
    program = tl.program_id(0)
    state = (program // tiles).to(tl.int64)
    start = program % tiles * BLOCK_N
    chunk = start // CHUNK
    j = start + tl.arange(0, BLOCK_N)
    exist = j < keys
    batch, kv_head = state // heads, state % heads // share
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    offset = j.to(tl.int64) * key_strides[2]
    k = load_rows(key, offset, exist, key_strides[3], width, BLOCK_E, key.dtype.element_ty)
    v = load_rows(value, j.to(tl.int64) * value_strides[2], exist, value_strides[3], value_width, BLOCK_EV, tl.float32)
    dk = tl.full((BLOCK_N, BLOCK_E), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_EV), 0.0, tl.float32)
    dc = tl.full((BLOCK_N,), 0.0, tl.float32)
    after = tl.maximum(chunk + 1 - first_row_chunk, 0)
    if after < row_chunks:
        later = (state * row_chunks + after) * width * BLOCK_E
        whole = cast(k, tl.float32)
        dv = values(key, whole, offset, exist, key_strides[3], 1.0, width, sums + later * BLOCK_EV, PRECISION, BLOCK_EV)
        dc = -add(dv * v, 1)
        dk = times_moment(key, offset, exist, key_strides[3], 1.0, width, moments + later, BLOCK_E)
        dc += add(dk * whole, 1)
        of_values = gradient(
            key, whole, offset, exist, key_strides[3], 1.0, width, v, sums + later * BLOCK_EV, PRECISION, BLOCK_EV
        )
        dk = of_values - dk
        if until is not None:
            factor = tl.load(until + state * keys + j, mask=exist, other=0.0)
            dk, dv, dc = dk * factor[:, None], dv * factor[:, None], dc * factor
    if key_decays is not None:
        of_keys = _load_decays(key_decays, state * keys + j, exist)

    query += batch * query_strides[0]
    zero = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    first = tl.maximum(start, diagonal) - diagonal
    last = tl.minimum(chunk * CHUNK + CHUNK - diagonal, length)
    for begin in range(first * GROUPS, last * GROUPS, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        is_row = row < last * GROUPS
        position, group = row // GROUPS, (row % GROUPS).to(tl.int64)
        index = (state * GROUPS + group) * length + position
        place = (state % heads * GROUPS + group) * query_strides[1] + position.to(tl.int64) * query_strides[2]
        q = load_rows(query, place, is_row, query_strides[3], width, BLOCK_E, k.dtype)
        u = load_rows(upstream, index * value_width, is_row, 1, value_width, BLOCK_EV, tl.float32)
        shift = tl.load(shifts + index, mask=is_row, other=0.0)
        z = product(k, tl.trans(q), zero, PRECISION) * scale
        factor = tl.where(is_row[None, :] & (j[:, None] <= (position + diagonal)[None, :]), 1.0, 0.0)
        if row_decays is not None:
            of_rows = _load_decays(row_decays, state * length + position, is_row)
            factor *= _decay((of_rows[0][None, :], of_rows[1][None, :]), (of_keys[0][:, None], of_keys[1][:, None]))
        g = product(v, tl.trans(u), zero, PRECISION) - shift[None, :]
        weight = z * z * factor
        dv = product(weight, u, dv, PRECISION)
        dk = product(z * factor * g * scale, cast(q, tl.float32), dk, PRECISION)
        dc -= add(weight * g, 1)

    index = state * keys + j
    column = tl.arange(0, BLOCK_E)
    tl.store(
        grad_key + index[:, None] * width + column[None, :],
        cast(2.0 * dk, grad_key.dtype.element_ty),
        mask=exist[:, None] & (column < width)[None, :],
    )
    column = tl.arange(0, BLOCK_EV)
    tl.store(
        grad_value + index[:, None] * value_width + column[None, :],
        cast(dv, grad_value.dtype.element_ty),
        mask=exist[:, None] & (column < value_width)[None, :],
    )
    if grad_decay is not None:
        tl.store(grad_decay + index, dc, mask=exist)
