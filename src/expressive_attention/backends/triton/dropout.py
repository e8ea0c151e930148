"""Dropout: which weights are kept, as `backends.dropout` has it: a tile at a time, from the same generator."""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["drop", "streams"]


@triton.jit
def streams(seeds, share, threshold, batch, heads, head, row):
    """The arguments of the generator for rows of query heads: its key, its offset, and the row and head of each."""
    seeds += batch // share * 3
    seed, offset = tl.load(seeds), tl.load(seeds + 1)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    rows = (row.to(tl.int64) + tl.load(seeds + 2)).to(tl.uint32)
    return low, high, (offset & 0xFFFFFFFF).to(tl.uint32), rows, (batch % share * heads + head).to(tl.uint32), threshold


@triton.jit
def _multiplied(x, factor: tl.constexpr):
    """The upper and the lower 32 bits of a product."""
    wide = x.to(tl.uint64) * factor
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def drop(x, stream, start, BLOCK: tl.constexpr):
    """A tile (rows, keys from `start` on) with 0 where weights are dropped.

    `start` is a multiple of `BLOCK`, the number of keys: 16, 32 or 64. Each counter has the bits of 4 keys.
    """
    tl.static_assert(BLOCK <= 64)
    k0, k1, offset, row, head, threshold = stream
    lane = (start // 64 * 16 + tl.arange(0, 16)).to(tl.uint32)[None, :]
    rows: tl.constexpr = x.shape[0]
    c0, c1 = tl.broadcast_to(lane, (rows, 16)), tl.broadcast_to(row[:, None], (rows, 16))
    c2, c3 = tl.broadcast_to(head[:, None], (rows, 16)), tl.full((rows, 16), 0, tl.uint32) + offset
    for _ in tl.static_range(10):
        first_high, first_low = _multiplied(c0, 0xD2511F53)
        second_high, second_low = _multiplied(c2, 0xCD9E8D57)
        c0, c1 = second_high ^ c1 ^ k0, second_low
        c2, c3 = first_high ^ c3 ^ k1, first_low
        k0, k1 = (k0 + 0x9E3779B9).to(tl.uint32), (k1 + 0xBB67AE85).to(tl.uint32)
    # Word j // 16 % 4 is that of key j.
    if BLOCK == 64:
        bits = tl.join(tl.join(c0, c2), tl.join(c1, c3)).permute(0, 2, 3, 1).reshape(rows, 64)
    elif BLOCK == 32:
        late = start // 32 % 2 == 1
        bits = tl.join(tl.where(late, c2, c0), tl.where(late, c3, c1)).permute(0, 2, 1).reshape(rows, 32)
    else:
        word = start // 16 % 4
        bits = tl.where(word < 2, tl.where(word == 0, c0, c1), tl.where(word == 2, c2, c3))
    return tl.where((bits >> 8).to(tl.int32) >= threshold, x, 0.0)
