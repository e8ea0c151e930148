"""Block masks of torch for tests: random ones, and what they hide, pair by pair."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def random_block_mask(
    batch: int, heads: int, rows: int, keys: int, size: tuple[int, int], generator: torch.Generator, masked: bool = True
) -> BlockMask:
    """Blocks that are hidden, seen in part, or seen as a whole; with `masked`, parts are what a random mask_mod says.

    The entries behind those that count are no blocks: nothing may read them.
    """
    shape = (batch, heads, -(-rows // size[0]), -(-keys // size[1]))
    kind = torch.randint(3, shape, generator=generator)
    table = torch.rand(rows, keys, generator=generator) < 0.7

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table.to(i.device)[i, j] ^ (b + h == 1)

    lists = []
    for wanted in (1, 2):
        listed = kind == wanted
        order = torch.argsort(listed.int(), dim=-1, descending=True, stable=True)
        counts = listed.sum(-1)
        beyond = torch.arange(shape[3]) >= counts.unsqueeze(-1)
        lists += [counts.int(), order.masked_fill(beyond, 2**30).int()]
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=size, mask_mod=mask_mod if masked else None, compute_q_blocks=False
    )


def seen(block_mask: BlockMask, batch: int, heads: int, rows: int, keys: int) -> Tensor:
    """Which pairs ``(batch, heads, rows, keys)`` it lets through, by its definition; what it has one of is shared."""
    high, wide = block_mask.BLOCK_SIZE
    found = []
    for counts, indices in (
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        assert counts is not None
        assert indices is not None
        counts, indices = (x.cpu().expand(batch, heads, *x.shape[2:]) for x in (counts, indices))
        counted = torch.arange(indices.shape[3]) < counts.unsqueeze(-1)
        blocks = torch.zeros(batch, heads, -(-rows // high), -(-keys // wide) + 1, dtype=torch.bool)  # the last: none
        blocks.scatter_(3, indices.long().where(counted, blocks.shape[3] - 1), value=True)
        found.append(blocks[..., :-1].repeat_interleave(high, 2).repeat_interleave(wide, 3)[..., :rows, :keys])
    in_part, whole = found
    i, j = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    for b, h in itertools.product(range(batch), range(heads)):
        own = (torch.tensor(b % block_mask.shape[0]), torch.tensor(h % block_mask.shape[1]))
        in_part[b, h] &= block_mask.mask_mod(*own, i, j)
    return in_part | whole
