import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expressive_attention import expressive_attention
from expressive_attention.backends import blockwise
from tests.budget import assert_within_budget
from tests.problems import problems


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=problems(largest=8), sizes=st.tuples(st.integers(1, 64), st.integers(1, 7), st.integers(1, 9)))
def test_any_tiling_within_budget(case, sizes):
    before = blockwise._TILE, blockwise._TILE_KEYS, blockwise._TILE_ROWS
    blockwise._TILE, blockwise._TILE_KEYS, blockwise._TILE_ROWS = sizes
    try:
        assert_within_budget(case, "blockwise")
    finally:
        blockwise._TILE, blockwise._TILE_KEYS, blockwise._TILE_ROWS = before


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
