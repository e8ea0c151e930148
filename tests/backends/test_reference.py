import math
from functools import partial

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

from expressive_attention import expressive_attention
from tests.budget import Case

attention = partial(expressive_attention, backend="reference")


def definition(q, k, v, bias=None, keep=None, form="expressive"):
    """Section 2 of the design, one number at a time."""
    scale = 1 / math.sqrt(q.shape[-1])
    output = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    normalizer = torch.zeros(q.shape[:-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                total, summed = 0.0, torch.zeros(v.shape[-1], dtype=torch.float64)
                for j in range(k.shape[2]):
                    if keep is not None and not keep[b, h, i, j]:
                        continue
                    z = scale * float(q[b, h, i] @ k[b, h, j])
                    w = z * z / (1 + z * z) if form == "expressive" else z * z
                    w *= math.exp(float(bias[b, h, i, j])) if bias is not None else 1.0
                    total, summed = total + w, summed + w * v[b, h, j]
                normalizer[b, h, i] = total
                output[b, h, i] = summed / total if total else 0.0
    return output, normalizer


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("masked", ["no", "bool", "bias"])
def test_is_the_definition(form, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, e, dtype=torch.float64) for n, e in ((4, 5), (6, 5), (6, 2)))
    bias = torch.randn(2, 3, 4, 6, dtype=torch.float64) if masked == "bias" else None
    keep = torch.rand(2, 3, 4, 6) < 0.6 if masked == "bool" else None
    if keep is not None:
        keep[0, 0, 0] = False
    got = attention(q, k, v, keep if bias is None else bias, form=form, return_normalizer=True)
    torch.testing.assert_close(got, definition(q, k, v, bias, keep, form), rtol=1e-12, atol=1e-14)


def test_first_and_second_derivatives():
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    for form in ("expressive", "squared"):
        function = partial(attention, is_causal=True, form=form, return_normalizer=True)
        assert torch.autograd.gradcheck(function, (q, k, v, bias), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, (q, k, v, bias))


def test_torch_func():
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64).unbind(0)

    def loss(q):
        return attention(q, k, v).square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(q), expected)
    direction = torch.randn_like(q)
    torch.testing.assert_close(jvp(loss, (q,), (direction,))[1], (expected * direction).sum())
    several = torch.randn(5, *q.shape, dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(loss))(several), torch.stack([grad(loss)(x) for x in several]))
    matrix = hessian(loss)(q).reshape(q.numel(), q.numel())
    torch.testing.assert_close(matrix, matrix.T)


@pytest.mark.parametrize("exponent", [-18, -12, -6, 0, 6, 12, 18])
def test_scores_of_any_size_in_float32(exponent):
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
    case = Case(q * 10.0**exponent, k, v * 1e-3, through_normalizer=False)
    exact, got = case.results("reference", torch.float64), case.results("reference")
    for name, want in exact.items():
        # Gradients of saturated scores, 2 / z^3, magnify the rounding of the dot product.
        if exponent <= 0 or name in ("output", "normalizer", "value"):
            assert (got[name] - want).abs().max() < 3e-6 * want.abs().max(), name


@pytest.mark.parametrize("exponent", [-35, -20, 0, 20, 35])
def test_scores_of_any_size_in_bfloat16(exponent):
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 1, 2, 8, 16).to(torch.bfloat16).unbind(0)
    factor = torch.tensor(10.0**exponent, dtype=torch.bfloat16)
    q, k = q * factor, k * factor
    got, exact = attention(q, k, v), attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=1e-5)


def test_weights_do_not_change_when_small_scores_shrink():
    torch.manual_seed(5)
    q, k, v = torch.randn(3, 1, 1, 6, 8).unbind(0)
    squared = attention(q, k, v, form="squared")
    for factor in (2.0**-20, 2.0**-60):
        torch.testing.assert_close(attention(q * factor, k, v), squared, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_a_row_without_weight_gives_zero_and_no_gradient(backend):
    q, k, v = (torch.randn(1, 1, 4, 8).requires_grad_() for _ in range(3))
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[1] = False
    bias = torch.zeros(4, 4).masked_fill(~keep, -torch.inf).requires_grad_()
    for mask in (keep, bias):
        x = q * torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None]  # row 2: every score is 0
        output, normalizer = expressive_attention(x, k, v, mask, backend=backend, return_normalizer=True)
        assert (output[0, 0, 1:3] == 0).all()
        assert (normalizer[0, 0, 1:3] == 0).all()
        gradients = torch.autograd.grad((output.sum() + normalizer.sum()), [q, k, v, *([mask] if mask is bias else [])])
        assert all(g.isfinite().all() for g in gradients)
        assert (gradients[0][0, 0, 1:3] == 0).all()


def test_bias_means_what_it_means_for_softmax():
    torch.manual_seed(6)
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    bias = torch.randn(5, 5)
    plain = attention(q, k, v, bias)
    for shift in (-1024.0, 1024.0):  # a constant per row changes nothing, but the rounding of the bias
        torch.testing.assert_close(attention(q, k, v, bias + shift), plain, rtol=1e-3, atol=1e-3)
    hidden = bias.clone()
    hidden[:, 3:] = torch.finfo(torch.float32).min
    keep = (torch.arange(5) < 3).expand(5, 5)
    only = attention(q, k, v, torch.where(keep, bias, -torch.inf))
    torch.testing.assert_close(attention(q, k, v, hidden), only)
    torch.testing.assert_close(attention(q, k[:, :, :3], v[:, :, :3], bias[:, :3]), only)


def test_a_bias_that_grows_with_the_key_under_causality():
    torch.manual_seed(7)
    q, k, v = torch.randn(3, 1, 1, 600, 8).unbind(0)
    bias = 0.5 * torch.arange(600.0)
    got = attention(q, k, v, bias, is_causal=True)
    exact = attention(q.double(), k.double(), v.double(), bias.double(), is_causal=True)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    assert exact[0, 0, 0].abs().max() > 0


def test_antiparallel_keys_attract_as_parallel_ones_do():
    q, k, v = torch.randn(3, 1, 1, 5, 8).unbind(0)
    torch.testing.assert_close(attention(q, k, v), attention(q, -k, v))
    torch.testing.assert_close(attention(-q, k, v), attention(q, k, v))


def test_partial_results_merge():
    torch.manual_seed(8)
    q, k, v = torch.randn(3, 2, 2, 6, 8, dtype=torch.float64).unbind(0)
    whole = attention(q, k, v, return_normalizer=True)
    o1, n1 = attention(q, k[:, :, :2], v[:, :, :2], return_normalizer=True)
    o2, n2 = attention(q, k[:, :, 2:], v[:, :, 2:], return_normalizer=True)
    n = n1 + n2
    torch.testing.assert_close(whole, ((n1[..., None] * o1 + n2[..., None] * o2) / n[..., None], n))


def test_dropout_keeps_the_mean_and_drops_the_share_asked_for():
    torch.manual_seed(9)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)
    k, v = k.expand(1, 1, 4000, 8), torch.ones(1, 1, 4000, 1)
    output = expressive_attention(q.expand(1, 1, 200, 8), k, v, dropout_p=0.25)
    assert output.mean().item() == pytest.approx(1.0, abs=0.005)
    # sum of 4000 equal weights, each kept with probability 3/4 and divided by it
    assert output.std().item() == pytest.approx(math.sqrt(0.25 / 0.75 / 4000), rel=0.2)
    assert expressive_attention(q, k, v, dropout_p=1.0).abs().max() == 0


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_hidden_does_not_reach_derivatives(number):
    """The derivatives are those of `torch.func`, of forward mode, of second order, and compiled."""
    torch.manual_seed(10)
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).unbind(0)
    bias = torch.randn(5, 5, dtype=torch.float64)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    lengths = torch.tensor([4, 4])
    options = {"is_causal": True, "key_lengths": lengths}
    dirty_k, dirty_v = k.clone(), v.clone()
    dirty_k[:, :, 4], dirty_v[:, :, 4] = number, number
    dirty_bias = bias.masked_fill(hidden, number)
    found = []
    for key, value, mask in ((k, v, bias), (dirty_k, dirty_v, dirty_bias)):

        def function(q, mask=mask, key=key, value=value):
            return attention(q, key, value, mask, **options).square().sum()

        direction = torch.ones_like(q)
        gradients = grad(function, (0, 1))(q, mask)
        tangent = jvp(function, (q,), (direction,))[1]
        second = hessian(function)(q, mask)
        several = vmap(grad(function), (0, None))(torch.stack([q, 2 * q]), mask)
        compiled = torch.compile(grad(function), backend="aot_eager")(q)
        found.append((*gradients, tangent, second, several, compiled))
        torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0])
    assert all(x.isfinite().all() for x in found[1])
    assert (found[1][1][hidden] == 0).all()


def test_a_row_that_sees_nan_leaves_the_gradients_of_others_alone():
    torch.manual_seed(11)
    q, k, v = (torch.randn(1, 1, 4, 3, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[0, 0, 3] = torch.nan
    output = attention(q, k, v, is_causal=True)
    assert output[0, 0, :3].isfinite().all()
    assert output[0, 0, 3].isnan().all()
    got = torch.autograd.grad(output[:, :, :3].sum(), (q, k, v))
    cut = [x.detach()[:, :, :3].requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(attention(*cut, is_causal=True).sum(), cut)
    torch.testing.assert_close([x[:, :, :3] for x in got], list(want))
