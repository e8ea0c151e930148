from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expressive_attention import expressive_attention
from expressive_attention.backends import blockwise
from tests.budget import Case, assert_within_budget
from tests.problems import problems


@contextmanager
def tiles(*sizes):
    """Tiles of so many scores, keys and rows, inside of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("_TILE", "_TILE_KEYS", "_TILE_ROWS"), sizes, strict=True):
            patch.setattr(blockwise, name, size)
        yield


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=problems(largest=8), sizes=st.tuples(st.integers(1, 64), st.integers(1, 7), st.integers(1, 9)))
def test_any_tiling_within_budget(case, sizes):
    with tiles(*sizes):
        assert_within_budget(case, "blockwise")


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=problems(largest=24), sizes=st.tuples(st.integers(1, 64), st.integers(1, 7), st.integers(1, 9)))
def test_any_tiling_of_larger_problems_within_budget(case, sizes):
    with tiles(*sizes):
        assert_within_budget(case, "blockwise")


def test_hidden_keys_of_other_tiles_are_not_looked_at_for_the_largest_bias():
    """The first key has the largest bias that is seen, and score 0; those that are hidden have larger ones."""
    q, k, v = torch.randn(3, 1, 1, 9, 4).unbind(0)
    k[:, :, 0] = 0.0
    bias = 300 * torch.ones(9, 9).triu(1) + 100 * (torch.arange(9) == 0)
    with tiles(8, 2, 3):
        assert_within_budget(Case(q, k, v, bias, {"is_causal": True}, through_normalizer=False), "blockwise")


def test_memory_is_linear():
    """Saved for backward: inputs, output and one number per row; never an L x S matrix."""
    length = 1500
    q, k, v = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        expressive_attention(q, k, v, backend="blockwise").sum().backward()
    assert max(sizes) <= 4 * length
    tiles = [t.shape for t in blockwise._row_tiles(q.unsqueeze(2), length)]
    assert max(b * h * g * n for b, h, g, n in tiles) * blockwise._TILE_KEYS <= blockwise._TILE
    assert sum(n for *_, n in tiles) == length
