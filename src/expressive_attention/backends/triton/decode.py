"""Few queries against many keys: the keys are split, and the sums of the parts are added.

Sums over different keys merge by addition alone, o = sum w v and N = sum w: no part has to know another's maximum.
"""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import cast, ceil_div, quotient

__all__ = ["merge_kernel", "part_of_keys"]

# Keys of a part at the least: a shorter one is not worth its sums.
_SHORTEST = 512


def part_of_keys(programs: int, keys: int, processors: int) -> int:
    """How many keys a program should take, so that `processors` have work twice; all, if they have."""
    parts = min(2 * processors // max(1, programs), keys // _SHORTEST)
    return keys if parts < 2 else ceil_div(ceil_div(keys, parts), _SHORTEST) * _SHORTEST


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_kernel(
    sums, totals, outputs, normalizers, rows, parts, value_width, BLOCK_M: tl.constexpr, BLOCK_EV: tl.constexpr
):
    """Add sums ``(parts, rows, Ev)`` and totals ``(parts, rows)``, in order, to output and normalizer."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_EV)
    exist = row < rows
    inside = exist[:, None] & (column < value_width)[None, :]
    place = row[:, None] * value_width + column[None, :]
    output = tl.full((BLOCK_M, BLOCK_EV), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    for _ in range(parts):
        output += tl.load(sums + place, mask=inside, other=0.0)
        total += tl.load(totals + row, mask=exist, other=0.0)
        sums += rows.to(tl.int64) * value_width
        totals += rows
    output = quotient(output, total[:, None])
    tl.store(outputs + place, cast(output, outputs.dtype.element_ty), mask=inside)
    tl.store(normalizers + row, total, mask=exist)
