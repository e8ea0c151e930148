"""Near and far keys under one normalizer, against the whole matrix in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expressive_attention import expressive_attention
from expressive_attention.near_far import near_far_attention
from expressive_attention.overrides import takers

NAMES = ("output", "normalizer", "query", "key", "value", "slopes")


def whole_matrix(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float | None = None, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, N, scores and weights of the definition, from all pairs, in the dtype of the arguments."""
    groups = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    rows, keys = query.shape[-2], key.shape[-2]
    z = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    distance = torch.arange(rows).unsqueeze(1) + keys - rows - torch.arange(keys)
    squares = z * z
    weight = torch.where(distance < window, squares / (1 + squares), squares)
    if slopes is not None:
        weight = weight * torch.exp(-slopes.to(z.dtype)[..., None, None] * distance)
    weight = weight.masked_fill(distance < 0, 0.0)
    total = weight.sum(-1, keepdim=True)
    shares = weight / torch.where(total == 0, 1.0, total)
    return shares @ value, total.squeeze(-1), z, shares


def gradients(function, tensors, upstream, dtype):
    """Results and gradients of all tensors, computed in a dtype, in float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors[:3]]
    leaves += [x.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
               for x in tensors[3:]]  # fmt: skip
    output, normalizer = function(*leaves)
    found = torch.autograd.grad(
        [output, normalizer], leaves, [upstream[0].to(output.dtype), upstream[1].to(normalizer.dtype)]
    )
    return dict(zip(NAMES, [x.detach().double() for x in (output, normalizer, *found)], strict=False))


def sizes_of_terms(tensors, upstream, window, scale):
    """The largest sum of absolute values that adds up to an element of each result: what a rounding is relative to."""
    query, key, value, *slopes = (x.detach().double() for x in tensors)
    _, normalizer, z, shares = whole_matrix(query, key, value, window, scale, *slopes)
    groups, scale = query.shape[-3] // key.shape[-3], query.shape[-1] ** -0.5 if scale is None else abs(scale)
    keys, values = (x.abs().repeat_interleave(groups, -3) for x in (key, value))
    of_value = upstream[0].abs() @ values.mT
    g = of_value + (shares * of_value).sum(-1, keepdim=True) + (normalizer * upstream[1].abs()).unsqueeze(-1)
    of_weight = shares * g  # of the logarithm of a weight
    ds = scale * torch.where(z == 0, 0.0, 2 * of_weight / z.abs())
    terms = {
        "output": shares @ values,
        "normalizer": normalizer,
        "query": ds @ keys,
        "key": (ds.mT @ query.abs()).unflatten(-3, (-1, groups)).sum(-3),
        "value": (shares.mT @ upstream[0].abs()).unflatten(-3, (-1, groups)).sum(-3),
        "slopes": of_weight.sum((0, -1, -2)) * max(key.shape[-2], 1),
    }
    return {name: float(x.max()) if x.numel() else 0.0 for name, x in terms.items()}


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, more = draw(st.integers(1, 40)), draw(st.sampled_from([0, 0, 1, 7, 30, -3]))
    keys, dim, width = max(rows + more, 1), draw(st.integers(1, 17)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    size = draw(st.sampled_from([0.01, 1.0, 1.0, 5.0]))
    shapes = (kv_heads * groups, rows, dim), (kv_heads, keys, dim), (kv_heads, keys, width)
    tensors = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    tensors[0] *= size
    tensors = [x.to(dtype) for x in tensors]
    if draw(st.booleans()):
        tensors.append(torch.rand(kv_heads * groups, generator=generator))
    upstream = torch.randn(2, kv_heads * groups, rows, width, generator=generator).to(dtype).double()
    of_normalizer = torch.randn(2, kv_heads * groups, rows, generator=generator).double()
    return tensors, (upstream, of_normalizer), draw(st.integers(1, 45)), draw(st.sampled_from([None, 0.7, -2.0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_results_and_gradients_keep_to_the_error_budget(problem):
    """At most twice the error of the whole matrix in the dtype, and roundings of the parts that are added."""
    tensors, upstream, window, scale = problem
    dtype = tensors[0].dtype
    exact, plain = (
        gradients(lambda q, k, v, *s: whole_matrix(q, k, v, window, scale, *s)[:2], tensors, upstream, computed)
        for computed in (torch.float64, torch.promote_types(dtype, torch.float32))
    )
    found = gradients(
        lambda q, k, v, s=None: near_far_attention(
            q, k, v, window, scale=scale, alibi_slopes=None if s is None else s.float(), enable_gqa=True,
            return_normalizer=True,
        ), tensors, upstream, dtype,
    )  # fmt: skip
    terms = sizes_of_terms(tensors, upstream, window, scale)
    for name, want in exact.items():
        eps = torch.finfo(torch.promote_types(dtype, torch.float32) if name == "normalizer" else dtype).eps
        if name == "slopes":  # of float32; both outputs that they share out are rounded before
            eps = max(eps, torch.finfo(torch.float32).eps)
        error = (found[name] - want).abs().max()
        budget = 2 * (plain[name] - want).abs().max() + (16 if eps < 1e-9 else 2) * eps * terms[name]
        assert error <= budget, (name, dtype, float(error), float(budget))


def inputs(rows=30, keys=30, dim=8, heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(1, heads, n, dim, dtype=torch.float64).to(dtype) for n in (rows, keys, keys)]


def test_gradients_are_derivatives():
    tensors = [x.requires_grad_() for x in inputs(6, 7, 3, dtype=torch.float64)]
    slopes = torch.tensor([0.1, 0.7])
    torch.autograd.gradcheck(
        lambda q, k, v: near_far_attention(q, k, v, 3, alibi_slopes=slopes, return_normalizer=True), tensors
    )


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.02, 0.3])])
def test_far_keys_in_linear_time_say_the_same(slopes, monkeypatch):
    q, k, v = inputs(700, 700)
    asked = []
    monkeypatch.setattr("expressive_attention.functional.linear.pays", lambda call: asked.append(call.form) or True)
    found = near_far_attention(q, k, v, 100, alibi_slopes=slopes)
    assert asked == ["squared"]
    exact = whole_matrix(*(x.double() for x in (q, k, v)), 100, None, slopes)[0]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


def test_a_window_of_all_keys_is_expressive_attention():
    q, k, v = inputs(9, 12)
    options = {"is_causal": True, "causal_alignment": "lower_right", "return_normalizer": True}
    for window in (12, 13, 10**6):
        for found, want in zip(
            near_far_attention(q, k, v, window, return_normalizer=True),
            expressive_attention(q, k, v, **options),
            strict=True,
        ):
            assert torch.equal(found, want)


@pytest.mark.parametrize("shape", [(5, 8), (4, 3, 5, 8)])
def test_leading_dimensions_and_one_head(shape):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *shape, dtype=torch.float64)
    slopes = torch.rand(1 if len(shape) == 2 else 3)
    output, normalizer = near_far_attention(q, k, v, 2, alibi_slopes=slopes, return_normalizer=True)
    expected = whole_matrix(*(x.reshape(-1, *([1] * (4 - x.ndim)), *shape[-3:]) for x in (q, k, v)), 2, None, slopes)
    torch.testing.assert_close(output, expected[0].reshape(shape))
    torch.testing.assert_close(normalizer, expected[1].reshape(shape[:-1]))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [4, 20])
def test_what_is_hidden_has_no_influence(number, place):
    """Keys and values that come later, near to some of the rows that see them and far from others."""
    plain = inputs()
    spoiled = [x.clone() for x in plain]
    for x in spoiled[1:]:
        x[:, :, place] = number
    results = []
    for tensors in (plain, spoiled):
        leaves = [x.requires_grad_() for x in tensors]
        output, normalizer = near_far_attention(*leaves, 5, return_normalizer=True)
        seen = output[:, :, :place].sum() + normalizer[:, :, :place].sum()
        results.append([output, normalizer, *torch.autograd.grad(seen, leaves[0])])
        later = output[:, :, place:]
    for found, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found[:, :, :place], want[:, :, :place], rtol=1e-5, atol=1e-6)
    assert not later.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_weight_are_zero(dtype):
    """Queries before the first key, keys of zeros near, far and both: 0, or what the others say."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(20, 16))
    output, normalizer = near_far_attention(q, k, v, 3, return_normalizer=True)
    assert output[:, :, :4].abs().max() == 0
    assert normalizer[:, :, :4].abs().max() == 0
    (gradient,) = torch.autograd.grad(output.sum() + normalizer.sum(), q)
    assert gradient[:, :, :4].abs().max() == 0
    assert gradient.isfinite().all()
    for hidden in (slice(0, 13), slice(13, 16), slice(0, 16)):
        zeros = k.detach().clone()
        zeros[:, :, hidden] = 0
        zeros.requires_grad_()
        last = q[:, :, -1:]
        output = near_far_attention(last, zeros, v, 3)
        exact = whole_matrix(*(x.detach().double() for x in (last, zeros, v)), 3)[0]
        torch.testing.assert_close(output.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)
        for x in torch.autograd.grad(output.sum(), (q, zeros, v)):
            assert x.isfinite().all()


@pytest.mark.parametrize("slope", [None, 0.01, 5.0])
@pytest.mark.parametrize("size", [1e-18, 1e-9, 1e9, 1e18])
def test_scores_of_any_size(size, slope):
    q, k, v = inputs(60, 60)
    q = (q / (q @ k.mT).abs().amax() * size).requires_grad_()
    slopes = None if slope is None else torch.tensor([slope, 0.0])
    output = near_far_attention(q, k, v, 20, scale=1.0, alibi_slopes=slopes)
    exact = whole_matrix(*(x.detach().double() for x in (q, k, v)), 20, 1.0, slopes)[0]
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=3e-6)
    (gradient,) = torch.autograd.grad(output.sum(), q)
    assert gradient.isfinite().all()


def test_squares_that_leave_the_range_are_all_there_is():
    """N of the far keys is infinite: near keys have no share, gradients are finite, and N says so."""
    q, k, v = inputs(40, 40)
    leaves = [(q * 1e18).requires_grad_(), (k * 100).requires_grad_(), v.requires_grad_()]
    output, normalizer = near_far_attention(*leaves, 4, return_normalizer=True)
    assert normalizer[:, :, 10:].isinf().all()
    assert normalizer[:, :, :4].isfinite().all()
    exact = whole_matrix(*(x.detach().double() for x in leaves), 4)[0]
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=3e-6)
    for x in torch.autograd.grad(output.sum(), leaves):
        assert x.isfinite().all()
    faded = near_far_attention(*leaves, 4, alibi_slopes=torch.tensor([100.0, 1e4]))
    assert faded.isfinite().all()


def test_a_decoder_continues_a_cache():
    q, k, v = inputs(25, 25, dtype=torch.float64)
    whole = near_far_attention(q, k, v, 6)
    for rows in (1, 2, 10):
        found = near_far_attention(q[:, :, -rows:], k, v, 6)
        torch.testing.assert_close(found, whole[:, :, -rows:])


def test_no_rows_and_no_keys():
    q, k, v = inputs(5, 9)
    assert near_far_attention(q[:, :, :0], k, v, 2).shape == (1, 2, 0, 8)
    output, normalizer = near_far_attention(q, k[:, :, :0], v[:, :, :0], 2, return_normalizer=True)
    assert output.shape == (1, 2, 5, 8)
    assert output.abs().max() == normalizer.abs().max() == 0


def test_it_compiles_as_one_graph():
    q, k, v = inputs(20, 20)
    slopes = torch.tensor([0.1, 0.5])
    compiled = torch.compile(near_far_attention, fullgraph=True, backend="aot_eager")
    found = compiled(q, k, v, 4, alibi_slopes=slopes)
    torch.testing.assert_close(found, near_far_attention(q, k, v, 4, alibi_slopes=slopes))


def test_wrong_arguments_are_named():
    q, k, v = inputs()
    nested = torch.nested.nested_tensor([q[0, 0], q[0, 1]], layout=torch.jagged)
    for call, error, message in (
        (lambda: near_far_attention(q, k, v, 0), ValueError, "window must be at least 1, got 0"),
        (lambda: near_far_attention(q, k, v, 2.0), TypeError, r"window must be an integer, got 2\.0"),
        (lambda: near_far_attention(q, k, v, True), TypeError, "window must be an integer, got True"),
        (lambda: near_far_attention(nested, k, v, 2), ValueError, "query must be dense, got layout torch.jagged"),
        (lambda: near_far_attention([1], k, v, 2), TypeError, "query must be"),
        (lambda: near_far_attention(q, k[..., :3], v, 2), ValueError, "key must have"),
        (lambda: near_far_attention(q, k, v, 2, alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes must have"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_region_of_ranks_is_refused(monkeypatch):
    monkeypatch.setattr("expressive_attention.near_far.takers", [print])
    with pytest.raises(NotImplementedError, match="leave the region of ContextParallel"):
        near_far_attention(*inputs(), 2)
    assert not takers
