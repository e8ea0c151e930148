from functools import partial

import pytest
import torch
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from expressive_attention import expressive_attention, ops
from expressive_attention.call import Call, Visibility
from tests.budget import ON_CPU

LENGTHS = {"key_lengths": torch.tensor([3, 6]), "slopes": torch.rand(1, 4)}
CASES = {
    "plain": (None, Visibility(), "expressive"),
    "causal": (None, Visibility(right=0), "squared"),
    "bool mask": (torch.rand(2, 1, 5, 6) < 0.7, Visibility(right=1), "expressive"),
    "bias": (torch.randn(1, 4, 1, 6, requires_grad=True), Visibility(), "expressive"),
    "visibility": (None, Visibility(left=3, right=1, lower_right=True, **LENGTHS), "expressive"),
    "bias and window": (torch.randn(2, 1, 5, 1, requires_grad=True), Visibility(left=2), "expressive"),
}


@pytest.fixture(params=[name for name in ON_CPU if name != "reference"])
def backend(request):
    """Each of the fused backends."""
    return request.param


def tensors(dtype=torch.float32):
    shapes = ((2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 3))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


# opcheck checks the registration, which backends share.
CHECKED = [*(("cpu", name) for name in CASES), ("blockwise", "visibility"), ("blockwise", "bias and window")]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
# A trace of an operator takes seconds. It depends on which tensors there are, not on their shapes, and goes through the
# derivative. `test_opcheck_with_biases_by_distance` traces a derivative alone.
TRACED = [("cpu", "visibility"), ("cpu", "bias and window"), ("blockwise", "bias and window")]


@pytest.mark.parametrize(("backend", "name"), CHECKED)
def test_opcheck(backend, name):
    mask, visibility, form = CASES[name]
    arguments = (*tensors(), mask, *visibility, 0.5, form, 0.0, None, None, None, backend)
    checks = (*CHECKS, "test_aot_dispatch_dynamic") if (backend, name) in TRACED else CHECKS
    torch.library.opcheck(torch.ops.expressive_attention.attention.default, arguments, test_utils=checks)


def test_opcheck_with_biases_by_distance():
    """And of the backward operator, which gives their gradient where it is asked for."""
    table = torch.randn(1, 4, 13, requires_grad=True)
    inputs = (*tensors(), None, *Visibility(right=1), 0.5, "expressive", 0.0, None, None, table, "cpu")
    torch.library.opcheck(torch.ops.expressive_attention.attention.default, inputs)
    with torch.no_grad():
        output, normalizer, _ = torch.ops.expressive_attention.attention(*inputs)
    arguments = (*inputs, output, normalizer, torch.randn_like(output), torch.randn_like(normalizer), False, True)
    torch.library.opcheck(torch.ops.expressive_attention.attention_backward.default, arguments)


@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_derivatives_by_distance_of_both_orders(backend):
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    table = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, requires_grad=True)

    def function(q, k, v, table):
        return expressive_attention(q, k, v, relative_bias=table, is_causal=True, backend=backend)

    assert torch.autograd.gradcheck(function, (q, k, v, table))
    assert torch.autograd.gradgradcheck(function, (q, k, v, table))
    (found,) = torch.autograd.grad(
        expressive_attention(q, k, v, alibi_slopes=slopes, backend=backend).square().sum(), slopes, create_graph=True
    )
    (again,) = torch.autograd.grad(found.sum(), q)
    mask = -slopes[:, None, None] * (torch.arange(3)[:, None] - torch.arange(4)).abs()
    (wanted,) = torch.autograd.grad(
        expressive_attention(q, k, v, mask, backend="reference").square().sum(), slopes, create_graph=True
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(again, torch.autograd.grad(wanted.sum(), q)[0])


def test_biases_by_distance_through_vmap_and_compile(backend):
    q, k, v = (x.detach() for x in tensors())
    tables = torch.randn(3, 4, 11, requires_grad=True)

    def function(table, backend=backend):
        return expressive_attention(q, k, v, relative_bias=table, enable_gqa=True, backend=backend).square().sum()

    looped = torch.autograd.grad(sum(function(each) for each in tables), tables)
    torch.testing.assert_close(torch.autograd.grad(vmap(function)(tables).sum(), tables), looped)
    losses = torch.stack([function(each) for each in tables])
    batched = torch.autograd.grad(losses, tables, torch.eye(3), is_grads_batched=True)[0]
    torch.testing.assert_close(batched.sum(0), looped[0])
    torch.testing.assert_close(grad(partial(function, backend=None))(tables[0]), looped[0][0])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(tables[1]), tables)[0][1], looped[0][1])
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "name"), CHECKED)
def test_opcheck_of_the_backward(backend, name):
    mask, visibility, form = CASES[name]
    q, k, v = tensors()
    with torch.no_grad():
        inputs = (q, k, v, mask, *visibility, 0.5, form, 0.0, None, None, None, backend)
        output, normalizer, _ = torch.ops.expressive_attention.attention(*inputs)
    bias = mask is not None and mask.requires_grad
    upstream = torch.randn_like(output), torch.randn_like(normalizer), bias, False
    arguments = (*inputs, output, normalizer, *upstream)
    torch.library.opcheck(torch.ops.expressive_attention.attention_backward.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize(
    ("backend", "dynamic"), [(None, True), ("reference", False), ("blockwise", True), ("cpu", False)]
)
def test_compiles_as_one_graph(backend, dynamic):
    def function(q, k, v, mask):
        output, normalizer = expressive_attention(
            q, k, v, mask, is_causal=True, enable_gqa=True, return_normalizer=True, backend=backend
        )
        return output.square().sum() + normalizer.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (6, 9):
        q, k, v = (torch.randn(2, h, length, 8, requires_grad=True) for h in (4, 2, 2))
        mask = torch.randn(length, length, requires_grad=True)
        results = [torch.autograd.grad(f(q, k, v, mask), (q, k, v, mask)) for f in (compiled, function)]
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


def test_vmap_joins_the_batch(backend):
    q, k, v = (torch.randn(3, *x.shape) for x in tensors())
    bias = torch.randn(3, 1, 4, 1, 6)

    def function(q, k, v, bias):
        return expressive_attention(q, k, v, bias, enable_gqa=True, backend=backend)

    expected = torch.stack([function(*x) for x in zip(q, k, v, bias, strict=True)])
    torch.testing.assert_close(vmap(function)(q, k, v, bias), expected)
    shared = torch.stack([function(q[0], k[0], x, bias[0]) for x in v])
    torch.testing.assert_close(vmap(function, in_dims=(None, None, 0, None))(q[0], k[0], v, bias[0]), shared)
    moved = vmap(function, in_dims=(2, 0, 0, 0))(q.movedim(0, 2), k, v, bias)
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("shared", ["bias", "query", "none"])
def test_gradients_through_vmap(backend, shared):
    q, k, v = (torch.randn(3, *x.shape, dtype=torch.float64) for x in tensors())
    bias = torch.randn(3, 2, 1, 5, 6, dtype=torch.float64)
    inputs = {"query": q, "key": k, "value": v, "bias": bias}
    if shared != "none":
        inputs[shared] = inputs[shared][0]
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}

    def function(query, key, value, bias):
        return expressive_attention(query, key, value, bias, enable_gqa=True, backend=backend).square().sum()

    in_dims = tuple(None if name == shared else 0 for name in inputs)
    mapped = torch.autograd.grad(vmap(function, in_dims=in_dims)(*leaves.values()).sum(), list(leaves.values()))
    looped = torch.autograd.grad(
        sum(function(*(x if name == shared else x[i] for name, x in leaves.items())) for i in range(3)),
        list(leaves.values()),
    )
    torch.testing.assert_close(mapped, looped)


def test_vmap_of_the_backward_operator(backend):
    """As when per-sample gradients of several losses are taken through one forward pass."""
    q, k, v = tensors(torch.float64)
    bias = torch.randn(1, 4, 1, 6, dtype=torch.float64, requires_grad=True)
    output = expressive_attention(q, k, v, bias, enable_gqa=True, backend=backend)
    upstream = torch.randn(3, *output.shape, dtype=torch.float64)
    mapped = torch.autograd.grad(output, (q, k, v, bias), upstream, is_grads_batched=True, retain_graph=True)
    looped = [torch.autograd.grad(output, (q, k, v, bias), g, retain_graph=True) for g in upstream]
    torch.testing.assert_close(mapped, tuple(torch.stack(parts) for parts in zip(*looped, strict=True)))


def test_torch_func_derivatives_choose_the_reference(backend):
    q, k, v = torch.randn(3, 2, 5, 4, dtype=torch.float64).unbind(0)
    loss = lambda q, backend=None: expressive_attention(q, k, v, backend=backend).square().sum()  # noqa: E731
    torch.testing.assert_close(grad(loss)(q), grad(partial(loss, backend="reference"))(q))
    with pytest.raises(NotImplementedError, match=rf"'{backend}'.*torch\.func"):
        grad(partial(loss, backend=backend))(q)


def test_second_derivatives_with_parts_left_out(backend):
    q, k, v = tensors(torch.float64)

    def second(name):
        y = expressive_attention(q, k, v, enable_gqa=True, backend=name)
        (dk,) = torch.autograd.grad(y.square().sum(), k, create_graph=True)
        return torch.autograd.grad(dk.square().sum(), (q, k, v))

    torch.testing.assert_close(second(backend), second("reference"))


def test_the_autocast_rule_of_the_operator(backend):
    q, k, v = (x.detach() for x in tensors())
    arguments = (None, *Visibility(), 0.5, "expressive", 0.0, None, None, None, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, normalizer, _ = torch.ops.expressive_attention.attention(q, k, v, *arguments)
    expected, _, _ = torch.ops.expressive_attention.attention(*(x.bfloat16() for x in (q, k, v)), *arguments)
    assert normalizer.dtype == torch.float32
    assert torch.equal(output, expected)


def test_what_is_not_a_plain_tensor_goes_through_the_dispatcher(backend):
    """The kernels read memory, where a view of the negative and a subclass keep something else."""

    class Named(torch.Tensor):
        pass

    q, k, v = (x.detach() for x in tensors())
    call = partial(expressive_attention, enable_gqa=True, backend=backend)
    expected = call(q, k, v)
    torch.testing.assert_close(call(q, k, torch._neg_view(v)), -expected)
    assert torch.equal(call(q.as_subclass(Named), k, v).as_subclass(torch.Tensor), expected)
    with torch.inference_mode():
        assert torch.equal(call(q, k, v * 1), expected)
    with torch.profiler.profile() as profile:
        call(q, k, v)
    assert "expressive_attention::attention" in {event.name for event in profile.events()}


def test_forward_mode_derivatives_choose_the_reference(backend):
    q, k, v = (x.detach() for x in tensors())
    call = partial(expressive_attention, key=k, value=v, enable_gqa=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match=rf"'{backend}'.*forward-mode"):
            call(dual, backend=backend)
        got = torch.autograd.forward_ad.unpack_dual(call(dual)).tangent
    torch.testing.assert_close(got, torch.func.jvp(call, (q,), (torch.ones_like(q),))[1])


def test_activation_checkpointing_recomputes_the_same_bits(backend):
    leaves = tensors()

    def function(q, k, v):
        return expressive_attention(q, k, v, is_causal=True, enable_gqa=True, window_size=(3, -1), backend=backend)

    results = [f(*leaves) for f in (function, partial(checkpoint, function, use_reentrant=False))]
    gradients = [torch.autograd.grad(output.square().sum(), leaves) for output in results]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_vmap_of_patterns(backend):
    q, k, v = (torch.randn(3, *x.shape) for x in tensors())
    lengths, slopes = torch.tensor([[1, 6], [0, 4], [5, 3]]), torch.rand(3, 4)

    def function(q, k, v, lengths, slopes):
        return expressive_attention(
            q, k, v, enable_gqa=True, key_lengths=lengths, alibi_slopes=slopes, window_size=(2, 1), backend=backend
        )

    expected = torch.stack([function(*x) for x in zip(q, k, v, lengths, slopes, strict=True)])
    torch.testing.assert_close(vmap(function)(q, k, v, lengths, slopes), expected)
    shared = torch.stack([function(*x, lengths[0], slopes[0]) for x in zip(q, k, v, strict=True)])
    mapped = vmap(function, in_dims=(0, 0, 0, None, None))(q, k, v, lengths[0], slopes[0])
    torch.testing.assert_close(mapped, shared)


def test_lengths_that_change_before_the_backward_pass_are_an_error(backend):
    q, k, v = tensors()
    lengths = torch.tensor([3, 6])
    output = expressive_attention(q, k, v, key_lengths=lengths, enable_gqa=True, backend=backend)
    lengths.sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_of_slopes_through_vmap(backend):
    q, k, v = (x.detach() for x in tensors())
    slopes = torch.rand(3, 4, requires_grad=True)

    def function(slopes):
        return expressive_attention(q, k, v, alibi_slopes=slopes, enable_gqa=True, backend=backend).square().sum()

    mapped = torch.autograd.grad(vmap(function)(slopes).sum(), slopes)
    looped = torch.autograd.grad(sum(function(each) for each in slopes), slopes)
    torch.testing.assert_close(mapped, looped)


def test_slopes_of_a_model_make_no_mask_where_no_gradient_is_wanted(backend, monkeypatch):
    q, k, v = tensors()
    slopes = torch.nn.Parameter(torch.rand(4))
    seen = []
    run = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *arguments: seen.append(arguments[0].attn_mask) or run(*arguments))
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            expressive_attention(q, k, v, alibi_slopes=slopes, enable_gqa=True, backend=backend)
    assert [mask is None for mask in seen] == [backend == "cpu", True]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_has_the_gradients_of_the_others(name):
    """Behind the operator; the public function runs it as the plain torch that it is."""
    mask, visibility, form = CASES[name]
    leaves = [*tensors(torch.float64), *([] if mask is None else [mask])]
    wanted = [x for x in leaves if x.requires_grad]
    found = []
    for backend in ("reference", "blockwise"):
        result = ops.attention(Call(*leaves[:3], mask, visibility, 0.5, form), backend)
        loss = result.output.square().sum() + result.normalizer.sum()
        found.append([result.output, *torch.autograd.grad(loss, wanted)])
    torch.testing.assert_close(*found)
