"""Lists of blocks: through which of them a program goes, and which of their pairs are seen.

A program goes through the blocks of a list, one after the other, and reads no others: first, with a mask, those that
are seen in part, then those that are seen as a whole. A tile of rows has a list of blocks of keys, and a tile of keys
one of units of rows. A unit is a block of queries of all heads that share a key head; where this is no multiple of the
smallest tile, a unit is such a tile, and its list joins those of its rows.
"""

# Code that Triton compiles looks wrong to a checker of Python types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...blocks import HIDDEN, TILED, WHOLE
from ...call import Call
from ...masks import repeated_strides
from .tiles import NO_MASK, Tile, add, ceil_div, load_mask, seen, sees

__all__ = [
    "NO_BLOCKS",
    "Blocks",
    "entries_of",
    "is_listed",
    "list_of",
    "list_ranges",
    "listed_of",
    "place_of",
    "visible_listed_keys",
]

_HIDDEN, _WHOLE, _TILED = tl.constexpr(HIDDEN), tl.constexpr(WHOLE), tl.constexpr(TILED)

# The arguments of kernels for a call without lists.
NO_BLOCKS: dict[str, Any] = {"blocks": None, "block_strides": None, "LISTED": None}

_LEAST = 16  # rows or keys of a tile


class Blocks:
    """The lists of a call."""

    def __init__(self, call: Call) -> None:
        seen = call.visibility
        assert seen.listed is not None
        self.listed = _in_lines(seen.listed)
        # Without tiles, there is no entry that asks for one, and any pointer will do.
        self.tiles = self.listed if seen.tiles is None else seen.tiles.contiguous().view(torch.uint8)
        self.rows, self.keys = seen.block_rows, seen.block_keys
        own = self.rows * (call.query.shape[1] // call.key.shape[1])
        self.unit = _LEAST if own % _LEAST else own
        self.kinds = _kinds(call, seen.listed, self.unit)

    def fitted(self, tile: Tile) -> Tile:
        """A tile that divides blocks of keys and units of rows."""
        rows, keys = (min(size, whole & -whole) for size, whole in ((tile.rows, self.unit), (tile.keys, self.keys)))
        return tile if (rows, keys) == tile[:2] else tile._replace(rows=rows, keys=keys, warps=4)

    def arguments(self, *, of_keys: bool = False) -> dict[str, Any]:
        """The arguments of kernels over rows; with `of_keys`, of those over keys."""
        kinds = self.kinds.mT if of_keys else self.kinds
        # How many are seen in part, how many in all, and their numbers, in the order of their kinds.
        counts = torch.stack([(kinds == _IN_PART).sum(-1), (kinds != _NOT_SEEN).sum(-1)], -1)
        order = _in_lines(torch.cat([counts, kinds.argsort(dim=-1, stable=True)], -1).to(torch.int32))
        return {
            "blocks": (self.listed, self.tiles, order),
            "block_strides": (*repeated_strides(self.listed)[:3], *repeated_strides(order)[:3]),
            "LISTED": (self.rows, self.keys, self.unit),
        }


def _in_lines(x: Tensor) -> Tensor:
    """The tensor with rows of a multiple of 16 numbers: Triton compiles a kernel anew for strides that are no such."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)).contiguous()


_IN_PART, _AS_A_WHOLE, _NOT_SEEN = 0, 1, 2


def _kinds(call: Call, listed: Tensor, unit: int) -> Tensor:
    """How units of rows see blocks of keys, masks aside, ``(B | 1, Hkv | 1, units, blocks of keys)`` of uint8."""
    visibility, groups = call.visibility, call.query.shape[1] // call.key.shape[1]
    length, keys = call.query.shape[2], call.key.shape[2]
    of_groups = listed.unsqueeze(2) if listed.shape[1] == 1 else listed.unflatten(1, (call.key.shape[1], groups))
    some, whole = (of_groups != HIDDEN).any(2), (of_groups == WHOLE).all(2)

    # The first and the last position of each unit, and the blocks of queries in which they lie.
    first = torch.arange(ceil_div(length * groups, unit), device=listed.device) * unit
    first, last = first // groups, ((first + unit - 1) // groups).clamp(max=length - 1)
    begin, end = first // visibility.block_rows, last // visibility.block_rows
    if unit != visibility.block_rows * groups:
        some, whole = _count(some, begin, end) > 0, _count(whole, begin, end) == (end - begin + 1).view(-1, 1)

    # As `Visibility.mask_of`, for all pairs of a unit and a block.
    existing: Any = keys
    if visibility.key_lengths is not None:
        existing = visibility.key_lengths.clamp(0, keys).view(-1, 1, 1, 1)
    corner = existing - length if visibility.lower_right else 0
    first, last = first.view(-1, 1) + corner, last.view(-1, 1) + corner
    first_key = torch.arange(listed.shape[3], device=listed.device) * visibility.block_keys
    last_key = first_key + visibility.block_keys - 1
    some, whole = some & (first_key < existing), whole & (last_key < existing)
    if visibility.right is not None:
        some, whole = some & (first_key <= last + visibility.right), whole & (last_key <= first + visibility.right)
    if visibility.left is not None:
        some, whole = some & (last_key >= first - visibility.left), whole & (first_key >= last - visibility.left)
    return torch.where(some, torch.where(whole, _AS_A_WHOLE, _IN_PART), _NOT_SEEN).to(torch.uint8)


def _count(flags: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """How many flags ``(..., rows, columns)`` are set from row `begin` to `end`, ``(..., len(begin), columns)``."""
    sums = torch.nn.functional.pad(flags.cumsum(-2, dtype=torch.int32), (0, 0, 1, 0))
    return sums[..., end + 1, :] - sums[..., begin, :]


@triton.jit
def list_of(blocks, strides, batch, kv_head, number):
    """The list of a tile, and what `entries_of` has to know.

    A list says how many blocks are seen in part, how many in all, and their numbers.
    """
    own = blocks[2] + batch * strides[3] + kv_head * strides[4] + number.to(tl.int64) * strides[5]
    return own, blocks[0], blocks[1], strides


@triton.jit
def entries_of(listed, batch, head, position, LISTED: tl.constexpr):
    """The list of a tile, and what `is_listed` has to know: the entries of rows, the tiles, the rows in these."""
    own, entries, tiles, strides = listed
    entries += batch * strides[0] + head * strides[1] + (position // LISTED[0]).to(tl.int64) * strides[2]
    return own, entries, tiles, position % LISTED[0] * LISTED[1]


@triton.jit
def listed_of(blocks, strides, batch, kv_head, head, position, first_row, LISTED: tl.constexpr):
    """The list and the entries of a tile of rows."""
    return entries_of(
        list_of(blocks, strides, batch, kv_head, first_row // LISTED[2]), batch, head, position, LISTED
    )  # fmt: skip


@triton.jit
def list_ranges(own, keys, part, parts, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The first step through a list, with `SIZE` for each block, the first one without a mask, and the last.

    They are those of a part, in whole tiles of `BLOCK` steps; none, if there are no `keys`.
    """
    last = tl.where(keys > 0, tl.load(own + 1) * SIZE, 0)
    span = (last + parts * BLOCK - 1) // (parts * BLOCK) * BLOCK
    first = tl.minimum(part * span, last)
    last = tl.minimum(first + span, last)
    return first, tl.minimum(tl.maximum(tl.load(own) * SIZE, first), last), last


@triton.jit
def place_of(own, step, SIZE: tl.constexpr):
    """Where a step through a list leads."""
    return tl.load(own + 2 + step // SIZE) * SIZE + step % SIZE


@triton.jit
def is_listed(listed, exist, start, LISTED: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """Which pairs are seen, as far as the list goes, of rows and of the keys from `start` on, of one block.

    `AXIS` is that of the keys in the result.
    """
    _, entries, tiles, row = listed
    entry = tl.load(entries + start // LISTED[1], mask=exist, other=_HIDDEN)
    key = start % LISTED[1] + tl.arange(0, BLOCK)
    tile = (entry - _TILED).to(tl.int64) * (LISTED[0] * LISTED[1]) + row
    place = tl.expand_dims(tile, AXIS) + tl.expand_dims(key, 1 - AXIS)
    entry = tl.expand_dims(entry, AXIS)
    in_tile = tl.load(tiles + place, mask=tl.broadcast_to(entry >= _TILED, place.shape), other=0) != 0
    return (entry == _WHOLE) | in_tile


@triton.jit
def visible_listed_keys(
    listed, position, rows, exist, stride, keys, band, first, whole, last,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many keys each row sees, as `tiles.visible_keys`."""
    end = last
    if MASK == NO_MASK:
        end = whole
    count = position * 0 + (last - end)
    for step in range(first, end, BLOCK):
        start = place_of(listed[0], step, LISTED[1])
        j = start + tl.arange(0, BLOCK)[None, :]
        visible = sees(j, position[:, None], exist[:, None], keys, band, CAUSAL, WINDOW)
        visible = visible & is_listed(listed, exist, start, LISTED, BLOCK, 1)
        tile = load_mask(rows[:, None], j, j, stride, visible, MASK)
        count += add(seen(tile, visible, MASK).to(tl.int32), 1)
    return count
