from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expressive_attention import expressive_attention
from expressive_attention.backends import blockwise
from tests.budget import Case, assert_within_budget


def strided(shape, dtype, layout, generator):
    """Random numbers of a shape whose last dimensions lie in memory as `layout` says."""
    b, h, n, e = shape
    if layout == "transposed":
        return torch.randn(b, n, h, e, generator=generator).to(dtype).transpose(1, 2)
    if layout == "gaps":
        return torch.randn(b, h, n + 1, 2 * e, generator=generator).to(dtype)[:, :, 1:, ::2]
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def problems(draw, largest=40):
    size = st.integers(1, largest)
    batch, kv_heads, groups = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length, keys = draw(st.integers(0, largest)), draw(st.integers(0, largest))
    e, ev = draw(size), draw(size)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads = kv_heads * groups
    layouts = st.sampled_from(["contiguous", "transposed", "gaps"])
    query = strided((batch, heads, length, e), dtype, draw(layouts), generator)
    key = strided((batch, kv_heads, keys, e), dtype, draw(layouts), generator)
    value = strided((batch, kv_heads, keys, ev), dtype, draw(layouts), generator)
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "bias", "float32 bias"]))
    if kind != "none":
        full = (batch, heads, length, keys)
        shape = [draw(st.sampled_from([1, n])) for n in full]
        first = draw(st.integers(0, 4)) if all(n == 1 for n in shape[:2]) else 0
        numbers = torch.randn(shape[min(first, 2) :], generator=generator)
        mask = numbers > -0.5 if kind == "bool" else numbers.to(torch.float32 if kind == "float32 bias" else dtype)
        if kind == "bias" and draw(st.booleans()):
            mask = mask.masked_fill(numbers > 1.0, -torch.inf)
    options = {
        "is_causal": draw(st.booleans()),
        "causal_alignment": draw(st.sampled_from(["upper_left", "lower_right"])),
        "enable_gqa": True,
        "form": draw(st.sampled_from(["expressive", "squared"])),
        "scale": draw(st.sampled_from([None, 1.0, 0.03, -2.5])),
    }
    # float16 cannot hold the gradients of scores as small as an unlucky draw makes them
    return Case(query, key, value, mask, options, through_normalizer=draw(st.booleans()))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems())
def test_random_problems_within_budget(case):
    assert_within_budget(case, "blockwise")


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(largest=80))
def test_many_random_problems_within_budget(case):
    assert_within_budget(case, "blockwise")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=problems(largest=24), sizes=st.tuples(st.integers(1, 64), st.integers(1, 7), st.integers(1, 9)))
def test_any_tiling_within_budget(case, sizes):
    before = blockwise._TILE, blockwise._TILE_KEYS, blockwise._TILE_ROWS
    blockwise._TILE, blockwise._TILE_KEYS, blockwise._TILE_ROWS = sizes
    try:
        assert_within_budget(case, "blockwise")
    finally:
        blockwise._TILE, blockwise._TILE_KEYS, blockwise._TILE_ROWS = before


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(700, 700), (1, 1500), (513, 257)])
def test_long_problems_within_budget(length, keys, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, length, 33), torch.randn(1, 2, keys, 33), torch.randn(1, 2, keys, 17)
    settings = {"is_causal": causal, "causal_alignment": "lower_right"}
    assert_within_budget(Case(q, k, v, None, settings), "blockwise")
    assert_within_budget(Case(q, k, v, torch.randn(2, length, keys), settings), "blockwise")


@pytest.mark.parametrize("exponent", [-18, -12, -6, 6, 12, 18])
def test_float32_scores_of_any_size(exponent):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
    assert_within_budget(Case(q * 10.0**exponent, k, v * 1e-3, through_normalizer=False), "blockwise")


@pytest.mark.parametrize("exponent", [-38, -30, -20, -10, 10, 20, 30, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_of_any_size(exponent, dtype):
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 2, 8, 16).to(dtype).unbind(0)
    factor = torch.tensor(10.0**exponent).to(dtype)
    got = expressive_attention(q * factor, k * factor, v, backend="blockwise")
    exact = expressive_attention((q * factor).double(), (k * factor).double(), v.double(), backend="reference")
    assert (got.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("exponent", [-7, -3, 4])
def test_float16_to_its_ends(exponent):
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
    q, k = ((x * 10.0**exponent).half() for x in (q, k))
    assert q.isfinite().all()
    got = expressive_attention(q, k, v.half(), backend="blockwise")
    exact = expressive_attention(q.double(), k.double(), v.half().double(), backend="reference")
    assert (got.double() - exact).abs().max() <= 2.0**-10 * exact.abs().max()


def test_rows_of_very_different_size_beside_padding():
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 1, 1, 6, 8).unbind(0)
    q[0, 0] *= torch.tensor([1e-18, 1.0, 1e18, 0.0, 1e-9, 1e9])[:, None]
    keep = torch.ones(6, 6, dtype=torch.bool)
    keep[:, 4:] = False
    keep[1] = False
    assert_within_budget(Case(q, k, v, keep, through_normalizer=False), "blockwise")


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_and_inf_show_in_the_rows_that_see_them(where, number):
    torch.manual_seed(5)
    inputs = dict(zip(("query", "key", "value"), torch.randn(3, 1, 1, 5, 4).unbind(0), strict=True))
    inputs[where][0, 0, 2, 1] = number
    results = [expressive_attention(**inputs, is_causal=True, backend=b) for b in ("reference", "blockwise")]
    torch.testing.assert_close(results[1], results[0], equal_nan=True)
    assert results[0][0, 0, :2].isfinite().all() or where == "value"


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_that_sees_one_key_has_no_gradient(masked):
    torch.manual_seed(8)
    q, k, v = (torch.randn(1, 2, 700, 16, requires_grad=True) for _ in range(3))
    keep = torch.arange(700) == torch.randint(700, (700, 1)) if masked else None
    output = expressive_attention(q * 1e-4, k, v, keep, is_causal=not masked, backend="blockwise")
    (dq,) = torch.autograd.grad(output.square().sum(), q)
    alone = dq if masked else dq[:, :, :1]
    assert alone.abs().max() == 0
    assert masked or dq[:, :, 1:].abs().amax(-1).min() > 0


def test_same_bits_twice():
    torch.manual_seed(6)
    q, k, v = (torch.randn(2, 4, 300, 32, requires_grad=True) for _ in range(3))
    bias = torch.randn(4, 300, 300, requires_grad=True)

    def run():
        y = expressive_attention(q, k, v, bias, is_causal=True, backend="blockwise")
        return [y, *torch.autograd.grad(y.square().sum(), (q, k, v, bias))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_derivatives_of_both_orders():
    torch.manual_seed(7)
    q = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    function = partial(
        expressive_attention, is_causal=True, enable_gqa=True, return_normalizer=True, backend="blockwise"
    )
    assert torch.autograd.gradcheck(function, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(function, (q, k, v, bias))


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
