"""The squared form in linear time: the numbers of the reference, whatever the problem, and when it is chosen."""

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from expressive_attention import expressive_attention, expressive_attention_varlen
from expressive_attention.backends import linear
from expressive_attention.backends.cpu import library
from expressive_attention.backends.linear import chunks
from expressive_attention.call import Call, Visibility, accumulation_dtype
from expressive_attention.functional import choose as choice
from expressive_attention.schema import flatten
from tests.budget import LINEAR, Case, assert_within_budget, fused, threads_of_torch
from tests.problems import strided


@st.composite
def problems(draw, largest=330):
    """Calls that the backend takes, of up to a few chunks of keys."""
    size = st.integers(1, 20) | st.sampled_from([16, 32, 33, 64])
    e, ev = draw(size), draw(size)
    most = 2 if e * ev < 1024 else 1  # wide heads cost hundreds of times what narrow ones do
    batch, kv_heads, groups = draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(1, 2))
    length = draw(st.integers(0, 4) | st.integers(1, largest))
    keys = draw(st.integers(0, 4) | st.integers(1, largest) | st.just(length))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layouts = st.sampled_from(["contiguous", "contiguous", "transposed", "gaps", "columns first", "repeated"])
    heads = kv_heads * groups
    query = strided((batch, heads, length, e), dtype, draw(layouts), generator)
    key = strided((batch, kv_heads, keys, e), dtype, draw(layouts), generator)
    value = strided((batch, kv_heads, keys, ev), dtype, draw(layouts), generator)
    options = {
        "is_causal": draw(st.integers(0, 3)) > 0,
        "causal_alignment": draw(st.sampled_from(["upper_left", "lower_right"])),
        "enable_gqa": True,
        "form": "squared",
        "scale": draw(st.sampled_from([None, 1.0, 0.03, -2.5])),
    }
    if draw(st.booleans()):
        options["key_lengths"] = torch.tensor([draw(st.integers(0, keys)) for _ in range(batch)], dtype=torch.int32)
    if options["is_causal"] and draw(st.booleans()):
        slopes = draw(st.sampled_from([0.01, 1.0])) * torch.rand((batch, heads), generator=generator)
        options["alibi_slopes"] = slopes
    elif options["is_causal"] and draw(st.booleans()):
        shape = (batch, draw(st.sampled_from([heads, kv_heads])), keys)
        size = draw(st.sampled_from([0.01, 1.0, 10.0]))
        options["log_decay"] = -size * torch.rand(shape, generator=generator)
    return Case(query, key, value, None, options, draw(st.booleans()))


@pytest.mark.parametrize("part", range(4))
def test_random_problems_within_budget(part):
    @seed(part)
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(problems(), st.integers(1, 3))
    def check(case, threads):
        with threads_of_torch(threads):
            assert_within_budget(case, *LINEAR)

    check()


@pytest.mark.parametrize("is_causal", [False, True])
def test_sums_of_keys_that_are_alike_within_budget(is_causal):
    """Each term of a sum loses the same then, and nothing averages out."""
    for number in range(40):
        generator = torch.Generator().manual_seed(number)
        size, keys = 1 + number % 16, 60 + 5 * number
        query = torch.randn(1, 1, 60, size, generator=generator)
        key = torch.randn(1, 1, 1, size, generator=generator).expand(1, 1, keys, size)
        value = torch.randn(1, 1, keys, 2, generator=generator)
        options = {"is_causal": is_causal, "causal_alignment": "lower_right", "form": "squared"}
        assert_within_budget(Case(query, key, value, None, options), *LINEAR)


def test_pairs_that_are_all_alike_within_budget():
    """The reference makes nearly no error there. In the C kernels, about one in a thousand is over the budget."""
    for number in range(80):
        generator = torch.Generator().manual_seed(number)
        size, keys = 1 + number % 16, 60 + 3 * number
        of_one = [torch.randn(1, 1, 1, width, generator=generator) for width in (size, size, 2)]
        query, key, value = (x.expand(1, 1, n, -1) for x, n in zip(of_one, (60, keys, keys), strict=True))
        assert_within_budget(Case(query, key, value, None, {"form": "squared"}), LINEAR[0])


@pytest.fixture(params=["linear torch", "linear torch in float32", "linear"])
def backend(request, monkeypatch):
    name = request.param.removesuffix(" in float32")
    if name != request.param:  # as on a GPU
        monkeypatch.setattr(chunks, "_first_dtype", lambda query: accumulation_dtype(query.dtype))
    with fused(name) as own:
        yield own


def inputs(length=300, dim=16, heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, dim).to(dtype).requires_grad_() for _ in range(3))
    return q, k, v, (-0.1 * torch.rand(1, heads, length)).to(dtype).requires_grad_()


def with_gradients(q, k, v, *, wanted, **options):
    output, normalizer = expressive_attention(q, k, v, form="squared", return_normalizer=True, **options)
    return [output, normalizer, *torch.autograd.grad(output.square().sum() + normalizer.sum(), wanted)]


def close(got, want, rtol=1e-4):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.detach().abs().max()))


@pytest.mark.parametrize("lower_right", [False, True])
def test_slopes_that_are_learned_are_decays(backend, lower_right):
    q, k, v, _ = inputs()
    q = q.detach()[:, :, 100:].requires_grad_()
    slopes = torch.tensor([0.0, 0.3], requires_grad=True)
    options = {"is_causal": True, "alibi_slopes": slopes, "wanted": (q, k, v, slopes)}
    options["causal_alignment"] = "lower_right" if lower_right else "upper_left"
    close(with_gradients(q, k, v, **options, backend=backend), with_gradients(q, k, v, **options, backend="reference"))


def test_queries_after_the_last_key_decay_by_slopes_and_not_by_tokens(backend):
    q, k, v, decay = inputs()
    k, v, decay = (x.detach()[:, :, :50] for x in (k, v, decay))
    for options in ({"alibi_slopes": torch.tensor([0.01, 0.3])}, {"log_decay": decay}):
        results = [
            expressive_attention(q, k, v, form="squared", is_causal=True, backend=b, return_normalizer=True, **options)
            for b in (backend, "reference")
        ]
        close(*results)


def test_packed_sequences(backend):
    q, k, v, _ = inputs()
    starts = torch.tensor([0, 120, 121, 290])
    packed = [x.detach()[0].transpose(0, 1).requires_grad_() for x in (q, k, v)]
    slopes = torch.tensor([0.01, 0.1])
    options = {"causal": True, "form": "squared", "alibi_slopes": slopes}
    results = []
    for name in (backend, "reference"):
        output = expressive_attention_varlen(*packed, starts, starts, 169, 169, **options, backend=name)
        results.append([output, *torch.autograd.grad(output.square().sum(), packed)])
    close(*results)
    assert results[0][0][290:].abs().max() == 0


@pytest.mark.parametrize("exponent", [-30, -20, 20, 30])
def test_scores_of_any_size(backend, exponent):
    """Squares leave float32's range; some rows do where others do not."""
    q, k, v, _ = (x.detach() for x in inputs())
    q = q * torch.where(torch.arange(300) % 3 == 0, 10.0**exponent, 1.0)[:, None]
    got = expressive_attention(q, k, v, is_causal=True, form="squared", backend=backend)
    want = expressive_attention(*(x.double() for x in (q, k, v)), is_causal=True, form="squared", backend="reference")
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queries_that_are_nearly_orthogonal_to_all_keys(backend, size, dtype):
    """The state is no more exact than a rounding of |q|^2 |k|^2, which is much larger than the weights."""
    q, k, v, _ = (x.detach().to(dtype) for x in inputs())
    q[..., :8] = 0
    k[..., 8:] = 0
    q[:, :, 5:, 0] = size
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = with_gradients(*leaves, is_causal=True, backend=backend, wanted=leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = with_gradients(*exact, is_causal=True, backend="reference", wanted=exact)
    for result, x, y in zip(("output", "normalizer", "query", "key", "value"), got, want, strict=True):
        if result not in ("query", "key") or size:  # where no key has a weight, derivatives are 0
            torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=2e-4 * float(y.detach().abs().max()))


@pytest.mark.parametrize("where", ["hidden", "seen"])
@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, torch.nan) for name in ("query", "key", "value")), ("key", torch.inf), ("value", -torch.inf)],
)
def test_numbers_that_are_not_finite(backend, name, number, where):
    q, k, v, _ = (x.detach() for x in inputs())
    tensors = {"query": q, "key": k, "value": v}
    tensors[name][0, 1, 299 if where == "hidden" else 3, 2] = number
    options = {"is_causal": True, "form": "squared"}
    if where == "hidden" and name != "query":
        options["key_lengths"] = torch.tensor([299])
    results = [expressive_attention(**tensors, **options, backend=b) for b in ("reference", backend)]
    broken = [~x.isfinite() for x in results]
    assert torch.equal(*broken)
    torch.testing.assert_close(*(x[~broken[0]] for x in results), rtol=1e-4, atol=1e-5)


def test_same_bits_twice_and_with_any_number_of_threads():
    q, k, v, decay = inputs(heads=4)
    options = {"is_causal": True, "log_decay": decay, "backend": "linear", "wanted": (q, k, v, decay)}
    first = with_gradients(q, k, v, **options)
    for threads in (1, 2, 3):
        with threads_of_torch(threads):
            again = with_gradients(q, k, v, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_derivatives_of_both_orders():
    q, k, v, decay = inputs(5, 2, dtype=torch.float64)

    def function(q, k, v, decay):
        options = {"is_causal": True, "form": "squared", "return_normalizer": True, "backend": "linear"}
        return expressive_attention(q, k, v, log_decay=decay, **options)

    # Away from 0, where a decay may not be positive.
    decay = (decay.detach() - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(function, (q, k, v, decay))
    assert torch.autograd.gradgradcheck(function, (q, k, v, decay))


def test_operator_and_compiler():
    q, k, v, decay = inputs(40)
    call = Call(q, k, v, None, Visibility(right=0), 0.25, "squared", log_decay=decay)
    torch.library.opcheck(torch.ops.expressive_attention.attention.default, flatten(call, "linear"))

    def function(q, k, v, decay):
        return expressive_attention(q, k, v, is_causal=True, form="squared", log_decay=decay, backend="linear")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        output = run(q, k, v, decay)
        results.append([output, *torch.autograd.grad(output.square().sum(), (q, k, v, decay))])
    close(*results, rtol=1e-6)


def test_vmap():
    q, k, v, decay = inputs(40)
    stacked = [torch.stack([x, 2 * x]) for x in (q, k, v, decay)]

    def function(q, k, v, decay):
        return expressive_attention(q, k, v, is_causal=True, form="squared", log_decay=decay, backend="linear")

    want = torch.stack([function(*(x[i] for x in stacked)) for i in range(2)])
    torch.testing.assert_close(torch.vmap(function)(*stacked), want)


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("backend", ["reference", "blockwise", "cpu", None])
def test_decays_are_a_mask_elsewhere(form, backend):
    q, k, v, decay = inputs(30, dtype=torch.float64)
    total = decay.cumsum(-1)
    bias = total.unsqueeze(-1) - total.unsqueeze(-2)
    wanted = (q, k, v, decay)
    results = []
    for mask, log_decay in ((bias, None), (None, decay)):
        options = {"is_causal": True, "form": form, "log_decay": log_decay, "backend": backend}
        output = expressive_attention(q, k, v, mask, **options)
        results.append([output, *torch.autograd.grad(output.square().sum(), wanted, retain_graph=True)])
    close(*results, rtol=1e-10)


def test_what_it_declines():
    q, k, v, decay = (x.detach() for x in inputs(8))
    mask = torch.ones(8, 8, dtype=torch.bool)
    for options, reason in (
        ({"form": "expressive"}, "it computes form='squared'"),
        ({"attn_mask": mask}, "masks have no linear form"),
        ({"dropout_p": 0.1}, "dropout has no linear form"),
        ({"window_size": (3, -1)}, "windows have no linear form"),
        ({"alibi_slopes": torch.ones(2)}, "weights decay under causality only"),
    ):
        with pytest.raises(NotImplementedError, match=f"backend 'linear' does not support this call: {reason}"):
            expressive_attention(q, k, v, **{"form": "squared", "backend": "linear"} | options)
    for log_decay, message in (
        (decay[..., :5], r"log_decay must be broadcastable to \(..., H, S\) = \(1, 2, 8\), or have the 2 heads"),
        (-decay, "log_decay must be at most 0, got 0"),
        (decay.long(), "log_decay must be float16, bfloat16, float32 or float64, got torch.int64"),
        (decay * torch.nan, "log_decay must be at most 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            expressive_attention(q, k, v, is_causal=True, log_decay=log_decay)
    with pytest.raises(ValueError, match="log_decay needs is_causal=True"):
        expressive_attention(q, k, v, log_decay=decay)


@pytest.mark.skipif(library.MISSING is not None, reason="the choice is between C kernels")
@pytest.mark.parametrize(
    ("dim", "length", "causal", "chosen"),
    [
        (64, 1000, True, "cpu"),
        (64, 4000, True, "cpu"),
        (64, 8000, True, "linear"),
        (64, 4000, False, "linear"),
        (16, 200, False, "cpu"),
        (16, 1000, True, "linear"),
        (128, 16000, True, "cpu"),
    ],
)
def test_the_choice_by_cost(dim, length, causal, chosen):
    x = torch.zeros(()).expand(1, 2, length, dim)
    call = Call(x, x, x, None, Visibility(right=0 if causal else None), 1.0, "squared")
    with threads_of_torch(1):
        assert choice(call, None) == chosen
        assert choice(call.but(form="expressive"), None) == "cpu"
        assert choice(call.but(query=x[:, :, -1:]), None) == "cpu"
        assert choice(call.but(attn_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool)), None) == "cpu"
    with threads_of_torch(32):  # of which one would work
        assert choice(call, None) == "cpu"


def test_what_is_chosen_is_what_runs():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 600, 8).unbind(0)
    options = {"is_causal": True, "form": "squared"}
    with threads_of_torch(1):
        chosen, linear, pairs = (expressive_attention(q, k, v, **options, backend=b) for b in (None, "linear", "cpu"))
    assert torch.equal(chosen, linear)
    assert not torch.equal(chosen, pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_automatic_choice_compiles_as_one_graph(dynamic, dtype):
    def function(q, k, v):
        return expressive_attention(q, k, v, is_causal=True, form="squared")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (8, 1500):  # all pairs, and linear time
        q, k, v = torch.randn(3, 1, 2, length, 16).to(dtype).unbind(0)
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v))


class OnlyRows:
    """A backend that multiplies pairs, and says of how many rows at a time."""

    def __init__(self, backend):
        self.plain, self.counts = backend, []

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def forward(self, call):
        self.counts.append(call.query.shape[2])
        return self.plain.forward(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "causal", "lengths", "log_decay", "alibi_slopes", "infinite"])
def test_rows_that_no_state_holds_are_multiplied_alone(backend, kind, dtype, monkeypatch):
    """Two rows are all but orthogonal to all keys, or one is not finite."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, 5)
    k[..., 8:] = q[..., 8:] = 0
    for row in (130, 149):  # after the first chunk
        q[1, 3, row] = torch.randn(16) * (torch.arange(16) >= 8)
        q[1, 3, row, 0] = 1e-5
    wanted = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    options = {"is_causal": kind not in ("full", "lengths"), "enable_gqa": True}
    if kind == "lengths":
        options["key_lengths"] = torch.tensor([60, 140])
    elif kind == "alibi_slopes":
        options[kind] = torch.tensor([0.0, 0.01, 0.1, 0.03])
    elif kind == "log_decay":
        options[kind] = (-0.1 * torch.rand(2, 2, 150, dtype=accumulation_dtype(dtype))).requires_grad_()
        wanted.append(options[kind])
    elif kind == "infinite":
        wanted[0].data[0, 1, 20, 3] = torch.nan
    spy = OnlyRows(linear._all_pairs(Call(*wanted[:3], None, Visibility(), 1.0, "squared")))
    monkeypatch.setattr(linear, "_all_pairs", lambda call: spy)
    exact = [x.detach().double().requires_grad_() for x in wanted]
    results = []
    for inputs, name in ((wanted, backend), (exact, "reference")):
        own = options | ({"log_decay": inputs[3]} if kind == "log_decay" else {})
        output, normalizer = expressive_attention(
            *inputs[:3], form="squared", return_normalizer=True, backend=name, **own
        )
        keep = output.detach().isfinite()
        loss = torch.where(keep, output.float(), 0.0).square().sum() + torch.where(keep[..., 0], normalizer, 0.0).sum()
        results.append([output, normalizer, *torch.autograd.grad(loss.double(), inputs)])
    assert set(spy.counts) == ({1, 2} if kind == "infinite" else {2})
    assert len(spy.counts) == 2 * (2 if kind == "infinite" else 1)
    rtol = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.02}[dtype]
    for name, x, y in zip(("output", "normalizer", "query", "key", "value", "decay"), *results, strict=False):
        broken = y.isnan()
        if name in ("output", "normalizer"):
            assert torch.equal(x.isnan(), broken)
        else:  # gradients of what takes part in a row of NaN may be NaN
            broken = broken | x.isnan()
            assert broken.any() <= (kind == "infinite")
            assert not broken[..., 21:, :].any() if name != "decay" else True
        x, y = (part.double()[~broken] for part in (x, y))
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.detach().abs().max()))
    row = results[1][2][1, 3, 149]
    torch.testing.assert_close(
        results[0][2][1, 3, 149].double(), row, rtol=50 * rtol, atol=rtol * float(row.abs().max())
    )


@pytest.mark.parametrize("alike", [False, True])
def test_a_million_keys_within_the_budget_of_errors(alike):
    """Sampled rows against the reference in float64, and its own error in float32, for output, N and dq."""
    length = 1 << 20
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, length, 8).unbind(0)
    if alike:
        k, v = 0.1 * k + 1.0, v + 3.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output, normalizer = expressive_attention(
        *leaves, is_causal=True, form="squared", backend="linear", return_normalizer=True
    )
    upstream = torch.randn_like(output)
    (dq,) = torch.autograd.grad(output, q, upstream)
    found, exact, plain = [], [], []
    for row in (length // 2, 3 * length // 4 + 1, length - 1):
        one, seen = slice(row, row + 1), slice(row + 1)
        found.append([x[:, :, one].detach().double() for x in (output, normalizer, dq)])
        for results, dtype in ((exact, torch.float64), (plain, torch.float32)):
            own = q.detach()[:, :, one].to(dtype).requires_grad_()
            keys, values = (x.detach()[:, :, seen].to(dtype) for x in (k, v))
            o, n = expressive_attention(own, keys, values, form="squared", backend="reference", return_normalizer=True)
            (d,) = torch.autograd.grad(o, own, upstream[:, :, one].to(dtype))
            results.append([x.detach().double() for x in (o, n, d)])
    for got, wanted, reference in zip(
        *(map(torch.stack, zip(*rows, strict=True)) for rows in (found, exact, plain)), strict=True
    ):
        allowed = 2 * (reference - wanted).abs().amax() + torch.finfo(torch.float32).eps * wanted.abs()
        assert ((got - wanted).abs() <= allowed).all()
