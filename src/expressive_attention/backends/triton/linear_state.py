"""The state of the squared form in linear time, in parts: for each component i of a vector x, the sum of x_i y x^T.

A row reads sum_j (q . k_j)^2 v_j = sum_i q_i (sum_j k_ji v_j k_j^T) q. The moment is the matrix sum of s x x^T, and
normalizers are read from it. All E^2 products of components are kept, though E (E + 1) / 2 of them are distinct: so a
part is a product of whole tiles, formed without moving numbers from thread to thread, and the derivative of a state
needs both halves. With distinct blocks of 16 by 16 alone, as in power attention, the compiled kernel of rows ran no
fewer instructions.

Each chunk of keys has a state, all at once (`sum_kernel`), and then they are added up in order (`scan_kernel`). Rows
and keys read the sum of the chunks before or after theirs. A program that kept a part in registers and went from chunk
to chunk would need no memory for states. But no more programs than parts could then run at a time, and each would have
to write what its part adds to every row. Chunks grow with the width of heads, so that all states take about as much
memory as keys and values in float32 (`tuning.linear_chunk`).

Where keys are alike, each term of a sum loses the same, and normalizers are what is left of terms that cancel. So
moments are float64 from one chunk to the next, and so is every sum while chunks are added up.
"""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import add, cast, load_rows, product

__all__ = ["gradient", "scan_kernel", "sum_kernel", "times_moment", "trace", "values"]


@triton.jit
def _load_component(x, offset, exist, stride, i, scale):
    """The component i of scale x, for the vectors at `offset`."""
    return cast(tl.load(x + offset + i * stride, mask=exist, other=0.0), tl.float32) * scale


@triton.jit
def _load_part(sums, i, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr):
    """The part of component i of a state, ``(E, Ev)``."""
    row, column = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
    return tl.load(sums + i * (BLOCK_E * BLOCK_EV) + row[:, None] + column[None, :] * BLOCK_E)


@triton.jit(do_not_specialize=["start", "length", "chunks", "heads", "share"])
def sum_kernel(
    x, y, weights, shifts, sums, moments, x_strides, y_strides, scale,
    start, length, chunks, heads, share, width, value_width,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """One program per component, chunk and state: its part of the state of scale x and w y, and its row of the moment.

    Chunk c has the positions from ``start + c CHUNK`` on, as far as they exist, with `GROUPS` heads of vectors each;
    `share` states share a head. Weights w are ``(states, length)``, shifts s ``(states, GROUPS, length)``, of float32;
    None: 1. Sums go to ``(states, chunks, E, BLOCK_EV, BLOCK_E)``, the moments of w s to
    ``(states, chunks, E, BLOCK_E)``.
    """
    i, chunk_of_state = tl.program_id(0) % width, (tl.program_id(0) // width).to(tl.int64)
    chunk, state = (chunk_of_state % chunks).to(tl.int32), chunk_of_state // chunks
    batch, head = state // heads, state % heads // share * GROUPS
    x += batch * x_strides[0] + head * x_strides[1]
    y += batch * y_strides[0] + head * y_strides[1]

    part = tl.full((BLOCK_EV, BLOCK_E), 0.0, tl.float32)
    moment = tl.full((BLOCK_N, BLOCK_E), 0.0, tl.float32)
    first = tl.maximum(start + chunk * CHUNK, 0) * GROUPS
    last = tl.minimum(start + chunk * CHUNK + CHUNK, length) * GROUPS
    for begin in range(first, last, BLOCK_N):
        vector = begin + tl.arange(0, BLOCK_N)
        exist = vector < last
        position, group = vector // GROUPS, (vector % GROUPS).to(tl.int64)
        offset = position.to(tl.int64) * x_strides[2] + group * x_strides[1]
        whole = load_rows(x, offset, exist, x_strides[3], width, BLOCK_E, tl.float32) * scale
        factor = _load_component(x, offset, exist, x_strides[3], i, scale)
        if weights is not None:
            factor *= tl.load(weights + state * length + position, mask=exist, other=0.0)
        offset = position.to(tl.int64) * y_strides[2] + group * y_strides[1]
        columns = load_rows(y, offset, exist, y_strides[3], value_width, BLOCK_EV, tl.float32)
        part = product(tl.trans(columns * factor[:, None]), whole, part, PRECISION)
        if shifts is not None:
            factor *= tl.load(shifts + (state * GROUPS + group) * length + position, mask=exist, other=0.0)
        moment += whole * factor[:, None]

    row = chunk_of_state * width + i
    component = tl.arange(0, BLOCK_E)
    place = (row * BLOCK_EV + tl.arange(0, BLOCK_EV))[:, None] * BLOCK_E + component[None, :]
    tl.store(sums + place, part)
    tl.store(moments + row * BLOCK_E + component, add(moment, 0).to(tl.float64))


@triton.jit(do_not_specialize=["chunks", "size"])
def scan_kernel(states, factors, chunks, size, REVERSE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add up the chunks of ``(states, chunks, size)``, in place, from the first on; with `REVERSE`, from the last.

    Before a chunk is added, the sum is multiplied by its factor, ``(states, chunks)`` of float32; None: 1.
    """
    programs = (size + BLOCK_N - 1) // BLOCK_N
    state = (tl.program_id(0) // programs).to(tl.int64)
    number = tl.program_id(0) % programs * BLOCK_N + tl.arange(0, BLOCK_N)
    exist = number < size
    chunk = state * chunks
    if REVERSE:
        chunk += chunks - 1
    total = tl.full((BLOCK_N,), 0.0, tl.float64)
    for _ in range(chunks):
        if factors is not None:
            total *= tl.load(factors + chunk).to(tl.float64)
        place = states + chunk * size.to(tl.int64) + number
        total += tl.load(place, mask=exist, other=0.0)
        tl.store(place, total.to(states.dtype.element_ty), mask=exist)
        if REVERSE:
            chunk -= 1
        else:
            chunk += 1


@triton.jit
def values(
    x, whole, offset, exist, stride, scale, width, sums, PRECISION: tl.constexpr, BLOCK_EV: tl.constexpr
):  # fmt: skip
    """The ``sum_i x_i part_i x`` that vectors read from a state; they are the `whole`, and scale x at `offset` of x."""
    found = tl.full((whole.shape[0], BLOCK_EV), 0.0, tl.float32)
    for i in range(width):
        factor = _load_component(x, offset, exist, stride, i, scale)
        part = _load_part(sums, i, whole.shape[1], BLOCK_EV)
        found = product(whole * factor[:, None], part, found, PRECISION)
    return found


@triton.jit
def gradient(
    x, whole, offset, exist, stride, scale, width, y, sums, PRECISION: tl.constexpr, BLOCK_EV: tl.constexpr
):  # fmt: skip
    """The derivative of ``y . values`` with respect to the vectors, over 2: ``sum_i x_i y part_i``."""
    found = tl.full(whole.shape, 0.0, tl.float32)
    for i in range(width):
        factor = _load_component(x, offset, exist, stride, i, scale)
        part = _load_part(sums, i, whole.shape[1], BLOCK_EV)
        found = product(y * factor[:, None], tl.trans(part), found, PRECISION)
    return found


@triton.jit
def times_moment(x, offset, exist, stride, scale, width, moments, BLOCK_E: tl.constexpr):
    """The products of scale x, for the vectors at `offset`, and the moment of a state, in float32 proper."""
    found = tl.full((offset.shape[0], BLOCK_E), 0.0, tl.float32)
    for first in range(0, width, 16):
        i, j = first + tl.arange(0, 16), tl.arange(0, BLOCK_E)
        place = offset[:, None] + i.to(tl.int64)[None, :] * stride
        some = cast(tl.load(x + place, mask=exist[:, None] & (i < width)[None, :], other=0.0), tl.float32) * scale
        rows = tl.load(moments + i[:, None] * BLOCK_E + j[None, :], mask=(i < width)[:, None], other=0.0)
        found = product(some, rows.to(tl.float32), found, "ieee")
    return found


@triton.jit
def trace(moments, width, BLOCK_E: tl.constexpr):
    """The trace of the moment of a state."""
    component = tl.arange(0, BLOCK_E)
    return add(tl.load(moments + component * (BLOCK_E + 1), mask=component < width, other=0.0), 0).to(tl.float32)
