"""Blocks of keys that blocks of queries see: from a `BlockMask` of torch to a list, and from a list to a mask.

A list has the shape ``(B | 1, Hq | 1, blocks of queries, blocks of keys)`` and is of int32: 0 for a block that is
hidden, 1 for one that is seen, and 2 + n for one of which tile n, ``(block_rows, block_keys)`` of bool, says which
pairs are seen.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["HIDDEN", "TILED", "WHOLE", "is_block_mask", "list_blocks", "mask_of_blocks", "pairs_of_blocks"]

# Entries of a list, as in backends/cpu/kernels/blocks.h; from TILED on, they are numbers of tiles.
HIDDEN, WHOLE, TILED = 0, 1, 2

_MODULE = "torch.nn.attention.flex_attention"  # which takes its time to import; who has a BlockMask has it


def is_block_mask(x: Any) -> bool:
    """Whether it is a BlockMask of torch."""
    return type(x).__module__ == _MODULE and type(x).__name__ == "BlockMask"


def list_blocks(block_mask: BlockMask, rows: int, keys: int) -> tuple[Tensor, Tensor | None]:
    """The list and the tiles of a BlockMask for so many queries and keys.

    Its `mask_mod` is run for the blocks that are seen in part, with index 0 in a dimension of one.
    Where the number of such blocks is not known, since torch.compile traces the call, every block has a tile.
    """
    block_rows, block_keys = block_mask.BLOCK_SIZE
    part = _marked(block_mask.kv_num_blocks, block_mask.kv_indices)
    listed = part.to(torch.int32)  # as those that are seen, which they are without a mask_mod
    tiles = None
    if block_mask.mask_mod is not sys.modules[_MODULE].noop_mask:
        places = part.new_ones(part.shape) if torch.compiler.is_compiling() else part
        batch, head, row, column = _indices(places)
        if len(batch):
            first = (batch, head, row * block_rows, column * block_keys)
            tiles = _tiles(block_mask.mask_mod, first, (block_rows, block_keys), (rows, keys))
        numbers = (places.flatten().cumsum(0, dtype=torch.int32) + (TILED - 1)).view(part.shape)
        listed = torch.where(part, numbers, HIDDEN)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        listed = torch.where(_marked(block_mask.full_kv_num_blocks, block_mask.full_kv_indices), WHOLE, listed)
    return listed.to(torch.int32), tiles


def _marked(counts: Tensor, indices: Tensor) -> Tensor:
    """Which blocks are among the first indices, as many as the counts say, ``(B, H, blocks, blocks)`` of bool."""
    blocks = indices.shape[-1]
    counted = torch.arange(blocks, device=indices.device) < counts.unsqueeze(-1)
    marked = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    index = torch.where(counted, indices, blocks).to(torch.int64)
    return marked.scatter(-1, index, counted)[..., :blocks]


def _indices(places: Tensor) -> tuple[Tensor, ...]:
    """The indices of those that are true, in each dimension."""
    if not torch.compiler.is_compiling():
        return places.nonzero(as_tuple=True)
    count = places.numel()
    return torch.unravel_index(torch.arange(count, device=places.device), places.shape)


def _tiles(mask_mod: Any, first: tuple[Tensor, ...], size: tuple[int, int], length: tuple[int, int]) -> Tensor:
    """The pairs that `mask_mod` lets through in blocks of a size, ``(n, block_rows, block_keys)``.

    Args:
        mask_mod: As torch has it.
        first: Batch, head, query and key where each of the blocks begins.
        size: Queries and keys of a block.
        length: How many queries and keys there are.
    """
    from torch.nn.attention.flex_attention import create_mask

    batch, head, row, column = first
    rows, keys = length

    def of_tile(n: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # Beyond the last query or key, a mask_mod may have no number.
        return mask_mod(batch[n], head[n], (row[n] + i).clamp(max=rows - 1), (column[n] + j).clamp(max=keys - 1))

    mask = create_mask(of_tile, len(batch), 1, *size, device=str(batch.device))
    return mask.squeeze(1).contiguous()


def mask_of_blocks(
    listed: Tensor, tiles: Tensor | None, block_rows: int, block_keys: int, rows: Tensor, keys: int
) -> Tensor:
    """The list as a bool mask ``(B | 1, Hq | 1, len(rows), keys)`` for these queries."""
    column = torch.arange(keys, device=listed.device)
    entry = listed[:, :, (rows // block_rows).view(-1, 1), column // block_keys]
    if tiles is None:
        return entry == WHOLE
    seen = tiles[(entry - TILED).clamp(min=0), (rows % block_rows).view(-1, 1), column % block_keys]
    return torch.where(entry >= TILED, seen, entry == WHOLE)


def pairs_of_blocks(listed: Tensor, block_rows: int, block_keys: int, rows: int, keys: int) -> Tensor:
    """How many pairs of a query and a key the blocks have that are not hidden."""
    sizes = (
        (size - block * torch.arange(count, device=listed.device)).clamp(0, block)
        for size, block, count in ((rows, block_rows, listed.shape[2]), (keys, block_keys, listed.shape[3]))
    )
    of_rows, of_keys = sizes
    return ((listed != HIDDEN) * of_rows.unsqueeze(-1) * of_keys).sum()
