"""The duty of every fused backend: the numbers of the reference, whatever the problem."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from expressive_attention import expressive_attention
from tests.budget import FUSED, Case, assert_within_budget, fused, threads_of_torch
from tests.problems import problems


@pytest.fixture(params=FUSED)
def backend(request):
    with fused(request.param) as name:
        yield name


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("part", range(8))
def test_random_problems_within_budget(part, drops):
    """2,000 in all, 400 of them with dropout, in parts that the workers of pytest share."""

    @seed(part)
    @settings(
        max_examples=50 if drops else 200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(problems(drops=drops), st.integers(1, 5))
    def check(case, threads):
        with threads_of_torch(threads):
            assert_within_budget(case, *FUSED, *(["reference"] if case.poison else []))

    check()


@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(largest=80) | problems(largest=80, drops=True), st.integers(1, 5))
def test_many_random_problems_within_budget(case, threads):
    with threads_of_torch(threads):
        assert_within_budget(case, *FUSED, *(["reference"] if case.poison else []))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(530, 530), (1, 1500), (513, 257)])
def test_long_problems_within_budget(length, keys, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, length, 33), torch.randn(1, 2, keys, 33), torch.randn(1, 2, keys, 17)
    options = {"is_causal": causal, "causal_alignment": "lower_right", "enable_gqa": True}
    for mask in (None, torch.randn(4, length, keys), torch.randn(length, keys) > 0):
        assert_within_budget(Case(q, k, v, mask, options), *FUSED, threads=(1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(300, -1), (90, 20), (-1, 100)])
@pytest.mark.parametrize(("length", "keys"), [(530, 530), (3, 1500)])
def test_long_windows_within_budget(length, keys, window, dtype):
    """Whole blocks of keys are outside of them, or beyond those that exist."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, length, 17), torch.randn(2, 1, keys, 17), torch.randn(2, 1, keys, 9)
    options = {"window_size": window, "causal_alignment": "lower_right", "enable_gqa": True}
    options["key_lengths"] = torch.tensor([keys, keys // 3])
    with threads_of_torch(2):
        assert_within_budget(Case(*(x.to(dtype) for x in (q, k, v)), None, options), *FUSED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("e", "ev"), [(64, 64), (128, 128), (48, 44), (96, 80), (130, 256), (300, 1), (512, 512)])
def test_head_dimensions_within_budget(dtype, e, ev):
    torch.manual_seed(9)
    q, k, v = torch.randn(1, 2, 70, e), torch.randn(1, 2, 300, e), torch.randn(1, 2, 300, ev)
    with threads_of_torch(2):
        assert_within_budget(Case(*(x.to(dtype) for x in (q, k, v))), *FUSED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_decoding_within_budget(dtype, rows):
    """Few queries against a cache longer than a block of keys, which lies in memory as (B, S, H, E)."""
    torch.manual_seed(10)
    q = torch.randn(1, 2, rows, 32).to(dtype)
    k, v = (torch.randn(1, 9001, 2, 32).to(dtype).transpose(1, 2) for _ in range(2))
    case = Case(q, k, v, None, {"is_causal": True, "causal_alignment": "lower_right"})
    assert_within_budget(case, *FUSED, threads=(1, 2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [2, 3, 4])
def test_decoding_of_grouped_heads_within_budget(dtype, groups):
    """Widths of whole tiles and of single vectors; keys beyond the last whole vector."""
    torch.manual_seed(groups)
    q, k, v = torch.randn(1, 2 * groups, 1, 48), torch.randn(1, 2, 333, 48), torch.randn(1, 2, 333, 80)
    case = Case(q.to(dtype), k.to(dtype), v.to(dtype), None, {"enable_gqa": True})
    assert_within_budget(case, *(name for name in FUSED if name != "blockwise"))


@pytest.mark.parametrize("exponent", [-18, -12, -6, 6, 12, 18])
def test_float32_scores_of_any_size(exponent):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
    assert_within_budget(Case(q * 10.0**exponent, k, v * 1e-3, through_normalizer=False), *FUSED)


@pytest.mark.parametrize("exponent", [-38, -30, -20, -10, 10, 20, 30, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_of_any_size(backend, exponent, dtype):
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 2, 8, 16).to(dtype).unbind(0)
    factor = torch.tensor(10.0**exponent).to(dtype)
    got = expressive_attention(q * factor, k * factor, v, backend=backend)
    exact = expressive_attention((q * factor).double(), (k * factor).double(), v.double(), backend="reference")
    assert (got.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("exponent", [-7, -3, 4])
def test_float16_to_its_ends(backend, exponent):
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
    q, k = ((x * 10.0**exponent).half() for x in (q, k))
    assert q.isfinite().all()
    got = expressive_attention(q, k, v.half(), backend=backend)
    exact = expressive_attention(q.double(), k.double(), v.half().double(), backend="reference")
    assert (got.double() - exact).abs().max() <= 2.0**-10 * exact.abs().max()


def test_rows_of_very_different_size_beside_padding():
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 1, 1, 6, 8).unbind(0)
    q[0, 0] *= torch.tensor([1e-18, 1.0, 1e18, 0.0, 1e-9, 1e9])[:, None]
    keep = torch.ones(6, 6, dtype=torch.bool)
    keep[:, 4:] = False
    keep[1] = False
    assert_within_budget(Case(q, k, v, keep, through_normalizer=False), *FUSED)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_and_inf_show_in_the_rows_that_see_them(backend, where, number):
    torch.manual_seed(5)
    inputs = dict(zip(("query", "key", "value"), torch.randn(3, 1, 1, 5, 4).unbind(0), strict=True))
    inputs[where][0, 0, 2, 1] = number
    results = [expressive_attention(**inputs, is_causal=True, backend=b) for b in ("reference", backend)]
    broken = [~x.isfinite() for x in results]
    assert torch.equal(*broken)
    torch.testing.assert_close(*(x[~broken[0]] for x in results))
    assert results[0][0, 0, :2].isfinite().all()
    assert broken[0][0, 0, 2].any() or number == torch.inf  # as a query or key it is as good as a large number


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_that_sees_one_key_has_no_gradient(backend, masked):
    torch.manual_seed(8)
    q, k, v = (torch.randn(1, 2, 700, 16, requires_grad=True) for _ in range(3))
    keep = torch.arange(700) == torch.randint(700, (700, 1)) if masked else None
    output = expressive_attention(q * 1e-4, k, v, keep, is_causal=not masked, backend=backend)
    (dq,) = torch.autograd.grad(output.square().sum(), q)
    alone = dq if masked else dq[:, :, :1]
    assert alone.abs().max() == 0
    assert masked or dq[:, :, 1:].abs().amax(-1).min() > 0


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("kind", ["length", "bool", "bias", "finite bias", "zeros", "causal", "window"])
@pytest.mark.parametrize(("rows", "keys"), [(1, 700), (3, 40), (70, 70)])
@pytest.mark.parametrize("name", ["reference", *FUSED])
def test_a_row_that_one_key_decides_has_no_gradient(name, rows, keys, kind, form):
    torch.manual_seed(11)
    q, k, v = 1e-4 * torch.randn(2, 4, rows, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)
    only = torch.arange(keys) == min(5, keys - 1)
    mask, options = None, {}
    if kind == "length":
        options["key_lengths"] = torch.tensor([1, 1])
    elif kind == "bool":
        mask = only.expand(rows, keys)
    elif kind in ("bias", "finite bias"):
        mask = torch.zeros(rows, keys).masked_fill(~only, -torch.inf if kind == "bias" else -1e4)
    elif kind == "zeros":
        k = k * only[:, None]
    elif kind == "causal":
        rows, q, options["is_causal"] = 1, q[:, :, :1], True
    else:
        options |= {"window_size": (0, 0), "causal_alignment": "lower_right"}
    leaves = [x.contiguous().requires_grad_() for x in (q, k, v)]
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.requires_grad_())
    with fused(name) as backend:
        output = expressive_attention(*leaves[:3], mask, enable_gqa=True, form=form, backend=backend, **options)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
    assert gradients[2].abs().max() > 0
    for gradient in (*gradients[:2], *gradients[3:]):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("best", [10.0, 90.0, 1e3, 1e30])
@pytest.mark.parametrize("name", ["reference", *FUSED])
def test_a_key_with_score_zero_hides_no_others_behind_its_bias(name, best, dtype):
    """The others share the attention, however much smaller their bias is."""
    torch.manual_seed(12)
    q, k, v = (torch.randn(1, 2, n, 8).to(dtype) for n in (5, 9, 9))
    k[:, :, 3] = 0.0
    bias = torch.randn(5, 9)
    bias[:, 3] = best
    without = torch.arange(9) != 3
    case = Case(q, k, v, bias, through_normalizer=False)
    with fused(name) as backend:
        got = case.results(backend)
        want = Case(q, k[:, :, without], v[:, :, without], bias[:, without], through_normalizer=False).results(backend)
    for result, x in want.items():
        own = got[result]
        if result in ("key", "value", "mask"):
            own = own[..., without] if result == "mask" else own[:, :, without]
        # Kernels may round weights to bfloat16, which another largest bias lets them do otherwise.
        near = max(1e-5, 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(own, x, rtol=near, atol=near * float(x.abs().max()) + 1e-12)


@pytest.mark.parametrize(("dtype", "best"), [(torch.float32, 34.0), (torch.float32, -20.0), (torch.float64, 34.0)])
def test_a_key_with_score_zero_takes_no_digits_from_smaller_biases(backend, dtype, best):
    """The difference of two biases is rounded, and by more where they are far apart."""
    q, k, v = (torch.randn(1, 1, n, 1, dtype=dtype) for n in (300, 2, 2))
    k[:, :, 0] = 0.0
    bias = torch.randn(300, 2, dtype=dtype) + torch.tensor([best, best - 26.0])
    case = Case(q, k, v, bias, through_normalizer=False)
    got, exact = case.results(backend)["normalizer"], case.results("reference", torch.float64)["normalizer"]
    torch.testing.assert_close(got, exact, rtol=6 * torch.finfo(dtype).eps, atol=0)
    assert_within_budget(case, backend)


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0, 1e3])
def test_gradients_along_the_query(backend, size, form):
    """With one number in a head they are all of it, and the remainder of terms that cancel, all but z^2 of them."""
    torch.manual_seed(13)
    q, k, v, do = (torch.randn(1, 2, 300, 1, dtype=torch.float64) for _ in range(4))
    q = size * q.sign() * (1 + q.abs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    (exact,) = torch.autograd.grad(expressive_attention(*leaves, form=form, backend="reference"), q, do)
    leaves = [x.detach().float().requires_grad_() for x in leaves]
    output = expressive_attention(*leaves, form=form, backend=backend)
    (got,) = torch.autograd.grad(output, leaves[0], do.float())
    if form == "squared":
        assert got.abs().max() <= 1e-6 / size  # 0; the products of its terms are of the size of 1 / q
    else:
        assert (got - exact).abs().max() <= (1e-5 if size < 100 else 1e-3) * exact.abs().max()


def test_same_bits_twice(backend):
    torch.manual_seed(6)
    q, k, v = (torch.randn(2, 4, 300, 32, requires_grad=True) for _ in range(3))
    bias = torch.randn(4, 300, 300, requires_grad=True)

    def run():
        y = expressive_attention(q, k, v, bias, is_causal=True, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), (q, k, v, bias))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_derivatives_of_both_orders(backend):
    torch.manual_seed(7)
    q = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    function = partial(expressive_attention, is_causal=True, enable_gqa=True, return_normalizer=True, backend=backend)
    assert torch.autograd.gradcheck(function, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(function, (q, k, v, bias))


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("entries", [[0], [0, 3]])
def test_an_infinite_query_counts_as_a_very_large_one(backend, form, dtype, rows, entries):
    """Its infinite numbers decide about z^2, whatever the others are."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 6).to(dtype) for n in (rows, 20, 20))
    q[1, 2, -1, entries] = torch.tensor([torch.inf, -torch.inf][: len(entries)], dtype=dtype)
    mask = torch.rand(rows, 20) < 0.7
    large = q.double()
    large[1, 2, -1, entries] = 1e30 * large[1, 2, -1, entries].sign()
    for options in ({}, {"attn_mask": mask}, {"is_causal": True, "causal_alignment": "lower_right"}):
        output, n = expressive_attention(q, k, v, form=form, backend=backend, return_normalizer=True, **options)
        exact = [large, k.double(), v.double()]
        wanted, total = expressive_attention(*exact, form=form, backend="reference", return_normalizer=True, **options)
        rtol = max(1e-5, 4 * torch.finfo(dtype).eps)
        torch.testing.assert_close(output.double(), wanted, rtol=rtol, atol=rtol)
        assert n[1, 2, -1] > 1e6 if form == "squared" else abs(n[1, 2, -1] / total[1, 2, -1] - 1) < 1e-3
