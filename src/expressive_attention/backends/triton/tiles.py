"""Parts that the kernels share: tiles of rows and of keys, which keys a row sees, and the weight function.

Rows of a key head run over the positions of its queries and, for each position, over the query heads that share
it: row r is head ``r % GROUPS`` of the group at position ``r // GROUPS``. So keys are read once for all of them,
and a tile of rows is a range of positions.

A pair of query and key is hidden by lengths, causality, a window, a bool mask or a bias of -inf. It has no influence,
whatever is in memory there: what does not exist is not read, and weights of hidden pairs are selected to be 0. But a
product of tiles multiplies them, and 0 * NaN is NaN; results that are not finite are therefore computed once more.

Arithmetic is float32. Rows whose weights leave its range are computed once more, too, by the same kernels with `WIDE`,
on which `unit`, `wide_parts` and `scaled` have the last word: there weights are relative to the largest of the row, and
`selected_product` multiplies tiles. See `wide`.
"""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    "ALIBI",
    "BOOL",
    "EXPONENTIAL",
    "EXPRESSIVE",
    "FLOAT",
    "FORMS",
    "INTERPRETED",
    "NO_MASK",
    "RATIO",
    "SQUARED",
    "Tile",
    "add",
    "any_of",
    "biased",
    "cast",
    "ceil_div",
    "decay",
    "exponent_of",
    "exponential",
    "head_of",
    "is_finite",
    "is_lost",
    "key_ranges",
    "largest",
    "load_mask",
    "load_rows",
    "load_stats",
    "mark",
    "mask_rows",
    "nothing_lost",
    "padded",
    "product",
    "quotient",
    "rounding_of_difference",
    "rows_in",
    "rows_of",
    "scaled",
    "seen",
    "sees",
    "selected_product",
    "sequence_of",
    "shapes",
    "unit",
    "visible_keys",
    "weight_and_half_derivative",
    "weight_of",
    "wide_parts",
    "wide_weight_and_half_derivative",
]

# Triton's interpreter runs the kernels on the CPU: whether it did so when this module was imported.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_PTX = tl.constexpr(torch.version.hip is None and not INTERPRETED.value)

# Forms of the weight. The exponential is for the benchmark alone: what the rest of the kernel costs without f.
# The ratio is the form expressive of the product s = q . k itself: f(scale s) = s^2 / (c + s^2) with c = 1 / scale^2,
# passed in place of the scale. The gradients of q and k have the factor 2 c as those of the other forms have 2 scale.
EXPRESSIVE = tl.constexpr(0)
SQUARED = tl.constexpr(1)
EXPONENTIAL = tl.constexpr(2)
RATIO = tl.constexpr(3)
FORMS = {"expressive": 0, "squared": 1, "exponential": 2}

# Kinds of masks; from FLOAT on, weights are multiplied by exp(bias - bias_max).
NO_MASK = tl.constexpr(0)
BOOL = tl.constexpr(1)
FLOAT = tl.constexpr(2)
ALIBI = tl.constexpr(3)  # the mask is a slope for each head

_LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Sizes of a tile, and how a program works on it.

    Attributes:
        rows: Rows of queries.
        keys: Keys.
        warps: Warps of a program.
        stages: Tiles that are being loaded at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """The size of a tile's dimension that holds `size`: a power of two, and as many as the tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """The number of tiles of b that cover a."""
    return -(-a // b)


def shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, int]:
    """The sizes of a problem as the kernels name them."""
    return {
        "length": query.shape[2],
        "keys": key.shape[2],
        "kv_heads": key.shape[1],
        "width": query.shape[3],
        "value_width": value.shape[3],
        "GROUPS": query.shape[1] // key.shape[1],
        "BLOCK_E": padded(query.shape[3]),
        "BLOCK_EV": padded(value.shape[3]),
    }


# ---- arithmetic ----


# tl.sum and tl.max, whose own decorator decides when Triton is imported whether they can be interpreted.
@triton.jit
def add(x, axis: tl.constexpr):
    """The sum over an axis."""
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def largest(x, axis: tl.constexpr):
    """The maximum over an axis."""
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def any_of(flags):
    """Whether one of a vector of flags is set."""
    return largest(flags.to(tl.int32), 0) > 0


@triton.jit
def mark(place, flags, value):
    """Raise a number in memory to `value` if one of a vector of flags is set.

    Not by `any_of`: where flags depend on a product, Triton 3.7 does not compile that for compute capability 10.
    """
    tl.atomic_max(place + flags.to(tl.int32) * 0, value, mask=flags)


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """The numbers x as `TYPE`, to the nearest."""
    if INTERPRETED:  # which neither rounds to bfloat16 nor knows its subnormal numbers
        if x.dtype == tl.bfloat16:
            x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        if tl.bfloat16 == TYPE:
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            x = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    """The sums + a @ b, where both have the same dtype."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # which the interpreter would multiply as integers
        a, b = cast(a, tl.float32), cast(b, tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _reciprocal(x):
    if _PTX and x.dtype == tl.float32:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def quotient(x, total):
    """The ratio x / total of a row, 0 where the total is 0."""
    return tl.where(total == 0.0, 0.0, x / tl.where(total == 0.0, 1.0, total))


@triton.jit
def _clamped(z, limit, NAN: tl.constexpr):
    """The score within limits; with `NAN`, one that is not a number stays as it is."""
    if NAN:
        z = tl.clamp(z, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    else:
        z = tl.clamp(z, -limit, limit)
    return z


@triton.jit
def _score_and_offset(s, scale, FORM: tl.constexpr):
    """The numbers z and c, where the form expressive is z^2 / (c + z^2)."""
    z, offset = s, scale
    if FORM == EXPRESSIVE:
        z, offset = s * scale, scale * 0.0 + 1.0
    return z, offset


@triton.jit
def weight_of(s, scale, FORM: tl.constexpr):
    """The weight f(z) of a product s of query and key; NaN stays NaN."""
    if FORM == EXPRESSIVE or FORM == RATIO:  # noqa: SIM109, not in Triton
        z, offset = _score_and_offset(s, scale, FORM)
        # Beyond this square, f is 1 to the last bit, and the ratio would end in inf * 0.
        square = tl.minimum(z * z, 1e36, propagate_nan=tl.PropagateNan.ALL)
        weight = square * _reciprocal(offset + square)
    elif FORM == SQUARED:
        z = s * scale
        weight = z * z
    else:
        weight = tl.exp2(s * (scale * _LOG2_E))
    return weight


@triton.jit
def weight_and_half_derivative(s, scale, FORM: tl.constexpr):
    """The weight f(z) of a product s of query and key, and f'(z) / 2; for `RATIO`, the latter over c^(3/2).

    Where |z| is above 1.8e19 in the form expressive, they may be NaN: what comes of it is computed once more.
    """
    if FORM == EXPRESSIVE or FORM == RATIO:  # noqa: SIM109, not in Triton
        z, offset = _score_and_offset(s, scale, FORM)
        square = z * z
        r = _reciprocal(offset + square)
        weight = square * r
        half_derivative = z * r * r
    elif FORM == SQUARED:
        half_derivative = _clamped(s * scale, 1.8e19, False)
        weight = half_derivative * half_derivative
    else:
        weight = tl.exp2(s * (scale * _LOG2_E))
        half_derivative = 0.5 * weight
    return weight, half_derivative


@triton.jit
def exponent_of(x):
    """The integer e with 2^e <= x < 2^(e + 1), for a positive x of float32."""
    small = x < 1e-19
    bits = tl.where(small, x * 2.0**80, x).to(tl.int32, bitcast=True)
    return ((bits >> 23) & 255) - tl.where(small, 127 + 80, 127)


@triton.jit
def scaled(x, exponent):
    """The product x * 2^exponent, in two steps: one factor may be beyond float32."""
    exponent = tl.minimum(tl.maximum(exponent, -252), 254)
    half = exponent >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    return x * first * ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unit(x):
    """The rows x / 2^e, whose largest entry lies between 1 and 2, and e."""
    exponent = exponent_of(largest(tl.abs(x), 1))
    return scaled(x, -exponent[:, None]), exponent


@triton.jit
def is_lost(normalizer, lowest):
    """Whether a normalizer of float32 lost weights that count to underflow, or left the range upwards."""
    return ~((normalizer > lowest) & (normalizer < float("inf")))


@triton.jit
def is_finite(x):
    """Whether all numbers of each row are finite."""
    return add(x - x, 1) == 0.0


@triton.jit
def selected_product(a, b, pairs, sums, PRECISION: tl.constexpr):
    """The sums + a @ b over no more than the `pairs` that are set, where a is 0 at the others.

    A row of b that is not finite shows in the rows of its pairs alone, as inf, -inf or NaN.
    """
    is_nan = b != b
    above, below = is_nan | (b == float("inf")), is_nan | (b == float("-inf"))
    sums = product(a, tl.where(above | below, 0.0, b), sums, PRECISION)
    zero = tl.full((a.shape[0], b.shape[1]), 0.0, tl.float32)
    ones = pairs.to(tl.float32)
    sums += tl.where(product(ones, above.to(tl.float32), zero, PRECISION) > 0.0, float("inf"), 0.0)
    sums += tl.where(product(ones, below.to(tl.float32), zero, PRECISION) > 0.0, float("-inf"), 0.0)
    return sums


@triton.jit
def exponential(x):
    """A number near 1 and an integer n, where e^x is the number * 2^n."""
    x = _clamped(x, 5e5, True)
    n = tl.floor(x * _LOG2_E + 0.5)
    # The logarithm of 2 in two parts, of which the first has few digits.
    return tl.exp((x - n * 0.693359375) + n * 2.12194440e-4), n.to(tl.int32)


@triton.jit
def wide_parts(y, exponent, FORM: tl.constexpr):
    """The numbers u, r and c of scores z = y * 2^exponent of any size: f(z) = 4^c u^2 r and f'(z) / 2 = 2^c u r^2."""
    own = exponent_of(tl.abs(y))
    u, c = scaled(y, -own), own + exponent
    r = tl.full(u.shape, 1.0, tl.float32)
    if FORM == EXPRESSIVE:
        u = _clamped(u, 2.0, True)
        # Beyond these exponents, f is 1 or z^2 to the last bit.
        z = scaled(u, tl.minimum(tl.maximum(c, -64), 60))
        r = 1.0 / (1.0 + z * z)
        u, c = tl.where(c >= 0, z, u), tl.minimum(c, 0)
    return u, r, c


@triton.jit
def wide_weight_and_half_derivative(u, r, c, tile, row_exponent, bias_max, MASK: tl.constexpr):
    """Weights over 4^row and half their derivatives by z / 2^row, times exp(bias - bias_max), of `wide_parts`."""
    weight, derivative = u * u * r, u * r * r
    shift = c - row_exponent
    weight_shift = 2 * shift
    if MASK >= FLOAT:
        factor, exponent = exponential(tile - bias_max)
        weight, derivative = weight * factor, derivative * factor
        weight_shift, shift = weight_shift + exponent, shift + exponent
    return scaled(weight, weight_shift), scaled(derivative, shift)


# ---- rows and keys ----


@triton.jit
def head_of(program, kv_heads):
    """Sequence and key head of a program, in 64 bits: what they are multiplied with may be beyond 2^31."""
    return (program // kv_heads).to(tl.int64), (program % kv_heads).to(tl.int64)


@triton.jit
def _within(place, most):
    """A number from memory, brought to the range from 0 to `most`: nobody has looked at it."""
    return tl.minimum(tl.maximum(tl.load(place).to(tl.int64), 0), most).to(tl.int32)


@triton.jit
def sequence_of(
    sequence, length, keys, right, left, lower_right, query_starts, key_starts, key_lengths,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Where a sequence lies in the tensors, and what its queries see.

    Its place in the batch, its first row and its first key; how many rows it has, how many keys, and how many of these
    exist; and a band (corner, diagonal, lower): query i is at place ``i + corner`` and sees the keys from
    ``i + lower`` to ``i + diagonal``.
    """
    batch, first_row, first_key = sequence, length * 0, keys * 0
    if query_starts is not None:
        batch = sequence * 0
        first_row, end = _within(query_starts + sequence, length), _within(query_starts + sequence + 1, length)
        length = tl.maximum(end - first_row, 0)
        first_key, end = _within(key_starts + sequence, keys), _within(key_starts + sequence + 1, keys)
        keys = tl.maximum(end - first_key, 0)
    existing = keys
    if key_lengths is not None:
        existing = _within(key_lengths + sequence, keys)
    corner = (existing - length) * lower_right
    diagonal, lower = corner, corner
    if CAUSAL:
        diagonal = corner + right
    if WINDOW:
        lower = corner - left
    return batch, first_row, first_key, length, keys, existing, (corner, diagonal, lower)


@triton.jit
def rows_in(
    tile, batch, kv_head, kv_heads, first_row, own_length, length, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The rows of a tile of a sequence: position, query head, whether they exist, index among rows ``(B, Hq, L)``."""
    row = tile * BLOCK + tl.arange(0, BLOCK)
    position, head = row // GROUPS, kv_head * GROUPS + row % GROUPS
    index = (batch * kv_heads * GROUPS + head) * length + first_row + position
    return position, head, position < own_length, index


@triton.jit
def rows_of(
    tile, program, length, keys, kv_heads, right, left, lower_right, query_starts, key_starts, key_lengths,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a tile of rows lies: the one place from which kernels over rows learn it.

    `program` counts sequences and key heads. The result has what `sequence_of` says of the sequence, without the keys
    that do not exist, and four numbers for each row: position, query head, whether it exists, and its index among the
    rows ``(B, Hq, L)``.
    """
    sequence, kv_head = head_of(program, kv_heads)
    batch, first_row, first_key, own_length, _room, own_keys, band = sequence_of(
        sequence, length, keys, right, left, lower_right, query_starts, key_starts, key_lengths, CAUSAL, WINDOW
    )
    position, head, exist, index = rows_in(
        tile, batch, kv_head, kv_heads, first_row, own_length, length, GROUPS, BLOCK
    )  # fmt: skip
    return sequence, kv_head, batch, first_row, first_key, own_length, own_keys, band, position, head, exist, index


@triton.jit
def load_rows(base, offset, exist, stride, width, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """The rows at `offset` of a tensor ``(..., width)``, padded with zeros, as `TYPE`."""
    column = tl.arange(0, BLOCK)
    x = tl.load(
        base + offset[:, None] + column.to(tl.int64)[None, :] * stride,
        mask=exist[:, None] & (column < width)[None, :],
        other=0.0,
    )
    return cast(x, TYPE)


@triton.jit
def load_stats(stats, index, exist, WIDE: tl.constexpr):
    """The first four numbers of each row, which lie side by side, see `backward_pass.row_kernel`."""
    width: tl.constexpr = 8 if WIDE else 4
    place = stats + index[:, None] * width + tl.arange(0, 4)[None, :]
    x = tl.load(place, mask=exist[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def nothing_lost(lost, count):
    """Whether none of the heads has rows that are computed once more."""
    found = tl.full((1024,), 0, tl.int32)
    for start in range(0, count, 1024):
        head = start + tl.arange(0, 1024)
        found = tl.maximum(found, tl.load(lost + head, mask=head < count, other=0))
    return largest(found, 0) == 0


@triton.jit
def mask_rows(mask, strides, batch, head, position):
    """Where the rows of the mask begin."""
    return mask + batch * strides[0] + head * strides[1] + position.to(tl.int64) * strides[2]


@triton.jit
def sees(key, position, exist, keys, band, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query at a position, if it exists, sees a key, masks aside; to broadcast."""
    visible = exist & (key < keys)
    if CAUSAL:
        visible = visible & (key <= position + band[1])
    if WINDOW:
        visible = visible & (key >= position + band[2])
    return visible


@triton.jit
def key_ranges(
    start, keys, first_position, last_position, band,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first of the keys from `start` that one of some rows sees, the first and the last that all see, the last.

    The first three are whole tiles away from `start`. With ALiBi, those that all see are at or before their places.
    """
    first, last, whole = start, keys, start
    whole_last = last
    if CAUSAL:
        last = tl.minimum(last, last_position + band[1] + 1)
        whole_last = tl.minimum(last, first_position + band[1] + 1)
    if MASK == ALIBI:
        whole_last = tl.minimum(whole_last, first_position + band[0] + 1)
    if WINDOW:
        first = start + tl.maximum(first_position + band[2] - start, 0) // BLOCK * BLOCK
        whole = start + (tl.maximum(last_position + band[2] - start, 0) + BLOCK - 1) // BLOCK * BLOCK
    whole_last = tl.maximum(first, start + tl.maximum(whole_last - start, 0) // BLOCK * BLOCK)
    return first, tl.minimum(whole, whole_last), whole_last, last


@triton.jit
def load_mask(rows, place, key, stride, exist, MASK: tl.constexpr):
    """A tile of the mask: `rows`, the places of these, and `key` broadcast to its shape."""
    if MASK == NO_MASK:
        tile = exist
    elif MASK == BOOL:
        tile = tl.load(rows + key.to(tl.int64) * stride, mask=exist, other=0) != 0
    elif MASK == FLOAT:
        tile = tl.load(rows + key.to(tl.int64) * stride, mask=exist, other=float("-inf"))
        tile = cast(tile, tl.float32)
    else:
        tile = tl.where(exist, -tl.load(rows) * tl.abs(place - key).to(tl.float32), float("-inf"))
    return tile


@triton.jit
def seen(tile, visible, MASK: tl.constexpr):
    """The pairs that a tile of the mask leaves of the visible ones. A bias that was not loaded is -inf."""
    if MASK == BOOL:
        visible = visible & tile
    elif MASK >= FLOAT:
        visible = tile != float("-inf")
    return visible


@triton.jit
def rounding_of_difference(a, b, difference):
    """The part of the difference of a and b that rounding has taken from it."""
    rounded = difference - a
    return (a - (difference - rounded)) - (b + rounded)


@triton.jit
def biased(x, tile, bias_max, MASK: tl.constexpr):
    """Weights or derivatives x times exp(bias - bias_max).

    The rounding of the difference counts where the largest bias is that of a key with score 0, far above the others.
    """
    if MASK >= FLOAT:
        difference = tile - bias_max
        rounding = rounding_of_difference(tile, bias_max, difference)
        x = x * tl.exp(difference) * (1.0 + tl.where(tl.abs(difference) < 1000.0, rounding, 0.0))
    return x


@triton.jit
def decay(rows, place, key, bias_max, last_key):
    """The factors exp(bias - bias_max) of ALiBi, as one of each row and one of each key: none is above 1.

    For keys up to `last_key`, which exists and is at or before the places of all rows, and any after it of which the
    weights are 0. Rows share a slope, that of one head.
    """
    slope = tl.load(rows)
    by_row = tl.exp(-slope * (place - last_key).to(tl.float32) - bias_max)
    by_key = tl.exp(-largest(slope, 0) * tl.maximum(last_key - key, 0).to(tl.float32))
    return by_row, by_key


@triton.jit
def visible_keys(
    position, rows, exist, stride, keys, band, bias_max, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr
):
    """How many keys each row sees whose bias leaves more than 0 of their weights, counted where there is a mask."""
    first, last = position * 0, position * 0 + keys
    if CAUSAL:
        last = tl.minimum(last, position + band[1] + 1)
    if WINDOW:
        first = tl.maximum(first, position + band[2])
    if MASK == ALIBI:
        # exp(-105) is 0. The bias_max is at the nearest key.
        slope = tl.load(rows)
        reach = tl.minimum((105.0 - bias_max) / tl.maximum(slope, 1e-30), 2.0**30).to(tl.int32)
        place = position + band[0]
        first, last = tl.maximum(first, place - reach), tl.minimum(last, place + reach + 1)
    if MASK == NO_MASK or MASK == ALIBI:  # noqa: SIM109, not in Triton
        count = tl.maximum(last - first, 0)
    else:
        count = position * 0
        for start in range(0, largest(last, 0), 64):
            j = start + tl.arange(0, 64)[None, :]
            inside = exist[:, None] & (j < last[:, None]) & (j >= first[:, None])
            tile = load_mask(rows[:, None], j, j, stride, inside, MASK)
            inside = seen(tile, inside, MASK)
            if MASK == FLOAT:
                inside = tl.exp(tile - bias_max[:, None]) > 0.0
            count += add(inside.to(tl.int32), 1)
    return count
