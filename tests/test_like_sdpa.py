"""Whatever scaled_dot_product_attention takes: the same tensors, modes and transforms go through, with right values."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from expressive_attention import expressive_attention
from tests.budget import ON_CPU
from tests.oldest import OLDEST, not_on_oldest

Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 3)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "compiler", "dynamic"),
    [(None, "aot_eager", None), (None, "eager", True), ("reference", "eager", None)],
)
def test_a_scale_that_varies_is_compiled(backend, compiler, dynamic):
    q = Q.clone().requires_grad_()
    function = partial(expressive_attention, q, K, V, backend=backend)
    compiled = torch.compile(lambda s: function(scale=s), fullgraph=True, backend=compiler, dynamic=dynamic)
    for scale in (0.1, -0.5, 2):
        output, expected = compiled(scale), function(scale=scale)
        torch.testing.assert_close(output, expected)
        gradients = [torch.autograd.grad(x.square().sum(), q) for x in (output, expected)]
        torch.testing.assert_close(*gradients)
    # The compiler of torch 2.6 does not say what it has caught.
    with pytest.raises(Exception, match="Observed exception" if OLDEST else "scale must be finite"):
        compiled(float("nan"))


def test_a_dropout_that_varies_is_compiled():
    compiled = torch.compile(lambda p: expressive_attention(Q, K, torch.ones_like(K), dropout_p=p), backend="aot_eager")
    zeros = []
    for p in (0.0, 0.3, 0.6, 1.0):
        torch.manual_seed(0)
        output = compiled(p)
        torch.manual_seed(0)
        torch.testing.assert_close(output, expressive_attention(Q, K, torch.ones_like(K), dropout_p=p))
        zeros.append(output.sum().item())
    assert zeros[-1] == 0.0
    assert zeros[0] == pytest.approx(output.numel())


def loss(q):
    return expressive_attention(q, K, V, is_causal=True).square().sum()


DERIVATIVES = {
    "grad": grad(loss),
    "vjp": lambda q: vjp(lambda q: expressive_attention(q, K, V), q)[1](torch.ones(2, 4, 5, 3))[0],
    "jacrev": jacrev(lambda q: expressive_attention(q, K, V).sum(-1)),
    "vmap of grad": lambda q: vmap(grad(loss))(torch.stack([q, 2 * q])),
    "jvp": lambda q: jvp(lambda q: expressive_attention(q, K, V), (q,), (torch.ones_like(q),))[1],
    "hessian": lambda q: jacrev(jacrev(lambda q: expressive_attention(q, K[0, 0], V[0, 0]).sum()))(q[0, 0]),
    "vmap": lambda q: vmap(lambda q: expressive_attention(q, K, V))(torch.stack([q, 2 * q])),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_transforms_within_a_compiled_function(name):
    function = DERIVATIVES[name]
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(Q), function(Q))


@not_on_oldest("its gradient of a compiled function, compiled, is the value, of SDPA as well")
def test_a_function_compiled_within_and_without_a_transform():
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q), loss(Q))
    torch.testing.assert_close(torch.compile(grad(compiled), backend="aot_eager", fullgraph=True)(Q), grad(loss)(Q))
    torch.testing.assert_close(compiled(Q), loss(Q))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("sizes", [(0, 4, 5, 9), (2, 4, 0, 9), (2, 4, 5, 0), (2, 4, 0, 0), (0, 4, 0, 0), (2, 4, 1, 1)])
def test_sizes_of_nothing_have_gradients(backend, sizes):
    batch, heads, rows, keys = sizes
    shapes = ((rows, 8), (keys, 8), (keys, 3))
    q, k, v = (torch.randn(batch, heads, *shape, requires_grad=True) for shape in shapes)
    mask = torch.randn(rows, keys, requires_grad=True)
    output = expressive_attention(q, k, v, mask, backend=backend)
    assert output.shape == F.scaled_dot_product_attention(q, k, v, mask).shape
    if not keys:
        assert not output.any()
    output.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v, mask))


@pytest.mark.parametrize("backend", ON_CPU)
def test_views_of_all_kinds(backend):
    call = partial(expressive_attention, backend=backend)
    expanded = K[:1, :1].expand(2, 4, -1, -1)
    torch.testing.assert_close(call(Q, expanded, V), call(Q, expanded.contiguous(), V))
    nothing = torch.randn(1, 1, 1, 1).expand(2, 4, 9, 8)
    torch.testing.assert_close(call(Q, nothing, V), call(Q, nothing.contiguous(), V))
    last = Q.to(memory_format=torch.channels_last)
    torch.testing.assert_close(call(last, K, V), call(Q, K, V))
    complex_keys = torch.complex(K, V[..., :1].expand_as(K))
    torch.testing.assert_close(call(Q, complex_keys.conj().imag, V), call(Q, -V[..., :1].expand_as(K).clone(), V))
    flipped = torch.randn(9, 5)
    torch.testing.assert_close(call(Q, K, V, flipped.mT), call(Q, K, V, flipped.mT.contiguous()))
    leaves = [x.clone().requires_grad_() for x in (Q[:, :, :, :1], K[:, :, :, :1], V[:, :, :1])]
    views = (leaves[0].expand(-1, -1, -1, 8), leaves[1].expand(-1, -1, -1, 8), leaves[2].expand(-1, -1, 9, -1))
    found = torch.autograd.grad(call(*views).square().sum(), leaves)
    copies = [x.contiguous() for x in views]
    torch.testing.assert_close(found, torch.autograd.grad(call(*copies).square().sum(), leaves))


@pytest.mark.parametrize("backend", ON_CPU)
def test_traced_without_numbers(backend):
    call = partial(expressive_attention, is_causal=True, backend=backend)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in (Q, K, V))
        assert call(q, k, v).shape == (2, 4, 5, 3)
    graph = make_fx(call)(Q, K, V)
    torch.testing.assert_close(graph(2 * Q, K, V), call(2 * Q, K, V))
    symbolic = make_fx(call, tracing_mode="symbolic")(Q, K, V)
    torch.testing.assert_close(symbolic(Q[:1, :, :3], K[:1], V[:1]), call(Q[:1, :, :3], K[:1], V[:1]))
    functional = torch.func.functionalize(call)
    torch.testing.assert_close(functional(Q, K, V), call(Q, K, V))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.value = torch.nn.Parameter(K.clone()), torch.nn.Parameter(V.clone())

    def forward(self, query):
        return expressive_attention(query, self.key, self.value, is_causal=True)


def test_exported_with_lengths_that_vary():
    layer = Layer()
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(layer, (Q,), dynamic_shapes=({2: rows},))
    query = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(program.module()(query), layer(query))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_checkpointed_copied_and_watched():
    layer = Layer()
    twin = copy.deepcopy(layer)
    layer(Q).square().sum().backward()
    checkpoint(twin, Q.clone().requires_grad_(), use_reentrant=True).square().sum().backward()
    assert torch.equal(twin.key.grad, layer.key.grad)
    with torch.autograd.detect_anomaly(check_nan=True):
        twin = copy.deepcopy(layer)
        twin.zero_grad()
        twin(Q).square().sum().backward()
    assert torch.equal(twin.key.grad, layer.key.grad)
    with torch.inference_mode():
        output = layer(Q)
    assert output.is_inference()
    torch.testing.assert_close(output.clone(), layer(Q))
    with torch.no_grad():
        assert not layer(Q).requires_grad


@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_masks_under_autocast_and_vmap(backend):
    mask = torch.randn(5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = expressive_attention(Q, K, V, mask, backend=backend)
    halves = [x.bfloat16() for x in (Q, K, V)]
    torch.testing.assert_close(found, expressive_attention(*halves, mask, backend=backend))
    masks = torch.rand(3, 5, 9) < 0.6
    found = vmap(lambda m: expressive_attention(Q, K, V, m, backend=backend))(masks)
    expected = torch.stack([expressive_attention(Q, K, V, m, backend=backend) for m in masks])
    torch.testing.assert_close(found, expected)
    found = vmap(lambda q, k, v, m: expressive_attention(q, k, v, m, backend=backend))(
        Q[0], K[0], V[0], masks[[0, 1, 2, 0]]
    )
    expected = torch.stack(
        [expressive_attention(Q[0, i], K[0, i], V[0, i], masks[i % 3], backend=backend) for i in range(4)]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_mask_alone_may_require_a_gradient(backend):
    mask = torch.randn(4, 1, 9, requires_grad=True)
    gradients = [
        torch.autograd.grad(expressive_attention(Q, K, V, m, backend=backend).square().sum(), mask)
        for m in (mask, mask.expand(2, 4, 5, 9))
    ]
    torch.testing.assert_close(*gradients)


def test_a_default_device_and_dtype_change_nothing():
    expected = expressive_attention(Q, K, V, window_size=(2, 1), dropout_p=0.0, backend="reference")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = expressive_attention(Q, K, V, window_size=(2, 1), backend="reference")
            automatic = expressive_attention(
                Q, K, V, window_size=(2, 1), alibi_slopes=torch.zeros(4, dtype=torch.float32, device="cpu")
            )
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    torch.testing.assert_close(automatic, expected)
