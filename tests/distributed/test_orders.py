"""Which tokens each rank has, and that blocks of all ranks have each visible pair once."""

import itertools

import pytest
import torch

from expressive_attention.distributed import Shards
from expressive_attention.distributed.blocks import Problem, blocks

LENGTHS = [(8,), (37,), (3,), (0,), (5, 11, 1, 0, 16)]
ORDERS = ["zigzag", "contiguous"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_token_is_on_one_rank(lengths, ranks, order):
    shards = Shards(lengths, ranks, order)
    rows = torch.cat([shards.rows(rank) for rank in range(ranks)])
    assert rows.sort()[0].tolist() == list(range(sum(lengths)))
    starts = [0, *itertools.accumulate(lengths)]
    for rank in range(ranks):
        assert shards.size(rank) == len(shards.rows(rank)) == len(shards.places(rank))
        ids = torch.tensor([run.sequence for run in shards.runs(rank) for _ in range(run.start, run.stop)]).long()
        assert (shards.places(rank) + torch.tensor(starts)[ids]).tolist() == shards.rows(rank).tolist()
        first = 0
        for run in shards.runs(rank):
            assert run.rows.start == first
            first = run.rows.stop


def test_zigzag_folds():
    shards = Shards(16, 4)
    assert [shards.places(rank).tolist() for rank in range(4)] == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    assert [len(shards.runs(rank)) for rank in range(4)] == [2, 2, 2, 1]  # what is in one piece stays so
    packed = Shards.packed(torch.tensor([0, 8, 12], dtype=torch.int32), 2)
    assert packed.rows(1).tolist() == [2, 3, 4, 5, 9, 10]
    assert packed.places(1).tolist() == [2, 3, 4, 5, 1, 2]


def test_zigzag_shares_work_evenly():
    length, ranks = 4096, 8
    for order, most in (("zigzag", 1.001), ("contiguous", 1.9)):
        shards = Shards(length, ranks, order)
        pairs = [float((shards.places(rank) + 1).sum()) for rank in range(ranks)]
        assert max(pairs) / (sum(pairs) / ranks) == pytest.approx(most, abs=0.03)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (4, 0), (3, 2), (None, 5), (6, None), (0, 0)])
@pytest.mark.parametrize("lengths", [(37,), (3,), (5, 11, 1, 16)])
def test_blocks_have_each_visible_pair_once(lengths, left, right, order, masked):
    ranks = 4
    shards = Shards(lengths, ranks, order)
    problem = Problem(shards, left, right, None, None, 1.0, "expressive", 0.0, None, None)
    total = sum(lengths)
    seen = torch.zeros(total, total, dtype=torch.int64)
    for rank, other in itertools.product(range(ranks), repeat=2):
        rows, columns = shards.rows(rank), shards.rows(other)
        for block in blocks(problem, rank, other, masked):
            r, c = rows[block.rows], columns[block.keys]
            i, j = torch.arange(len(r))[:, None], torch.arange(len(c))
            visible = torch.ones(len(r), len(c), dtype=torch.bool)
            visible &= j <= i + (10**6 if block.right is None else block.right)
            visible &= j >= i - (10**6 if block.left is None else block.left)
            assert visible.any()
            if masked:
                assert c.tolist() == list(range(block.columns.start, block.columns.stop))
            seen[r[:, None], c] += visible.long()
    starts = [0, *itertools.accumulate(lengths)]
    sequence = torch.bucketize(torch.arange(total), torch.tensor(starts[1:]), right=True)
    distance = torch.arange(total) - torch.arange(total)[:, None]
    want = sequence == sequence[:, None]
    want &= distance <= (10**6 if right is None else right)
    want &= -distance <= (10**6 if left is None else left)
    assert torch.equal(seen, want.long())


def test_causal_zigzag_takes_few_calls():
    problem = Problem(Shards(64, 4), None, 0, None, None, 1.0, "expressive", 0.0, None, None)
    counts = [[len(blocks(problem, rank, other, False)) for other in range(4)] for rank in range(4)]
    assert counts == [[3, 1, 1, 1], [1, 3, 1, 1], [1, 1, 3, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((8.0, 2), TypeError, "lengths must be integers"),
        (((8, True), 2), TypeError, "lengths must be integers"),
        ((8, 2.0), TypeError, "ranks must be integers, got 2.0"),
        (((), 2), ValueError, "lengths must be at least 0, one or more"),
        ((-1, 2), ValueError, "lengths must be at least 0"),
        ((8, 0), ValueError, "ranks must be at least 1, got 0"),
        ((8, 2, "folded"), ValueError, "order must be one of .*'folded'"),
    ],
)
def test_wrong_shards_are_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        Shards(*arguments)
    with pytest.raises(ValueError, match="cu_seqlens must have shape"):
        Shards.packed(torch.tensor([1, 4]), 2)
