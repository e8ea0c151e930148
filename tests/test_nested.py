"""Jagged nested tensors: each sequence by itself, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from expressive_attention import expressive_attention
from expressive_attention.integrations import expressive_sdpa
from tests.budget import ON_CPU
from tests.oldest import not_on_oldest

ROWS, KEYS = [4, 0, 7, 1], [6, 3, 7, 9]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


def jagged(parts):
    """Parts ``(H, L, E)`` as one of ``(B, H, j, E)``."""
    return torch.nested.nested_tensor([x.transpose(0, 1) for x in parts], layout=torch.jagged).transpose(1, 2)


def parts_of(x):
    """The parts ``(H, L, E)`` of ``(B, H, j, E)``."""
    return [part.transpose(0, 1) for part in x.transpose(1, 2).unbind()]


def problem(heads=4, kv_heads=4, dtype=torch.float32):
    sizes = ((ROWS, heads, 8), (KEYS, kv_heads, 8), (KEYS, kv_heads, 3))
    return [[torch.randn(h, n, e, dtype=dtype) for n in lengths] for lengths, h, e in sizes]


def check(nested, parts, **options):
    """The call of nested tensors against the parts, one by one: output, normalizer and gradients."""
    leaves = [[x.clone().requires_grad_() for x in group] for group in parts]
    expected = [expressive_attention(*x, return_normalizer=True, **options) for x in zip(*leaves, strict=True)]
    nested = [x.detach().requires_grad_() for x in nested]
    output, normalizer = expressive_attention(*nested, return_normalizer=True, **options)
    assert output.layout is normalizer.layout is torch.jagged
    assert output.shape[:3] == normalizer.shape
    assert output.shape[2] == nested[0].shape[2]
    for got, (want, _) in zip(parts_of(output), expected, strict=True):
        torch.testing.assert_close(got, want)
    for got, (_, want) in zip(normalizer.transpose(1, 2).unbind(), expected, strict=True):
        torch.testing.assert_close(got.T, want)
    (output.values().square().sum() + normalizer.values().sum()).backward()
    sum(o.square().sum() + n.sum() for o, n in expected).backward()
    for x, group in zip(nested, leaves, strict=True):
        for got, want in zip(parts_of(x.grad), group, strict=True):
            torch.testing.assert_close(got, want.grad)


@pytest.mark.parametrize("backend", [None, *ON_CPU])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "lower_right", "scale": 0.3},
        {"window_size": (2, 1), "form": "squared"},
        {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 3.0])},
    ],
)
def test_each_sequence_by_itself(backend, options):
    parts = problem(dtype=torch.float64)
    check([jagged(x) for x in parts], parts, backend=backend, **options)


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (1, 4)])
def test_heads_that_are_shared(heads):
    parts = problem(*heads, dtype=torch.float64)
    check([jagged(x) for x in parts], parts, enable_gqa=True)
    with pytest.raises(ValueError, match=r"key must have the 4 heads of query, got 2; with enable_gqa"):
        expressive_attention(*(jagged(x) for x in problem(4, 2)))


def test_autocast():
    nested = [jagged(x) for x in problem()]
    with torch.autocast("cpu", torch.bfloat16):
        output = expressive_attention(*nested)
    torch.testing.assert_close(output.values(), expressive_attention(*(x.bfloat16() for x in nested)).values())


def test_the_key_lengths_of_each():
    parts = problem()
    lengths = torch.tensor([2, 3, 0, 8])
    found = expressive_attention(*(jagged(x) for x in parts), key_lengths=lengths)
    for got, q, k, v, n in zip(parts_of(found), *parts, lengths, strict=True):
        torch.testing.assert_close(got, expressive_attention(q, k[:, :n], v[:, :n]))
    with pytest.raises(ValueError, match=r"key_lengths must be broadcastable to \(4,\), got \(3,\)"):
        expressive_attention(*(jagged(x) for x in parts), key_lengths=lengths[:3])


def test_holes_hold_nothing():
    """Rows beyond the lengths are no queries and no keys, whatever they hold, and keep their places."""
    dense = [torch.randn(2, n, 4, 8) for n in (6, 7, 7)]
    starts, sizes = torch.tensor([1, 0]), [torch.tensor([3, 5]), *(torch.tensor([4, 2]),) * 2]
    parts = [
        [x[b, starts[b] : starts[b] + size[b]].transpose(0, 1) for b in range(2)]
        for x, size in zip(dense, sizes, strict=True)
    ]
    for x, size in zip(dense, sizes, strict=True):
        for b in range(2):
            x[b, starts[b] + size[b] :] = torch.nan
    nested = [torch.nested.narrow(x, 1, starts, n, layout=torch.jagged) for x, n in zip(dense, sizes, strict=True)]
    nested = [x.detach().requires_grad_() for x in nested]
    output = expressive_attention(*(x.transpose(1, 2) for x in nested), is_causal=True, causal_alignment="lower_right")
    for got, q, k, v in zip(parts_of(output), *parts, strict=True):
        expected = expressive_attention(q, k, v, is_causal=True, causal_alignment="lower_right")
        torch.testing.assert_close(got, expected)
    output.values().sum().backward()
    assert all(x.grad.values().isfinite().all() for x in nested)
    assert (output.transpose(1, 2) + nested[0]).shape == nested[0].shape  # a residual connection


def test_sequences_without_heads_and_with_more_dimensions():
    parts = problem()
    flat = [torch.nested.nested_tensor([x[0] for x in group], layout=torch.jagged) for group in parts]
    for got, *x in zip(expressive_attention(*flat).unbind(), *parts, strict=True):
        torch.testing.assert_close(got, expressive_attention(*(part[0] for part in x)))
    deep = [x.values().unflatten(0, (2, 2)) for x in map(jagged, parts)]
    offsets = [torch.tensor([0, *n]).cumsum(0) for n in (ROWS, KEYS, KEYS)]
    deep = [torch.nested.nested_tensor_from_jagged(x, o, jagged_dim=3) for x, o in zip(deep, offsets, strict=True)]
    output = expressive_attention(*deep)
    torch.testing.assert_close(output.values().flatten(0, 1), expressive_attention(*map(jagged, parts)).values())


def test_ragged_heads_are_a_dense_problem():
    """As for SDPA: (B, j, L, E) has sequences of one length."""
    parts = [[torch.randn(n, 5, 8) for n in (2, 3)] for _ in range(3)]
    nested = [torch.nested.nested_tensor(group, layout=torch.jagged) for group in parts]
    mask = torch.rand(5, 5) < 0.7
    output, normalizer = expressive_attention(*nested, mask, return_normalizer=True)
    for o, n, *x in zip(output.unbind(), normalizer.unbind(), *parts, strict=True):
        torch.testing.assert_close((o, n), expressive_attention(*x, mask, return_normalizer=True))


def test_dropout_and_sdpa_as_a_context():
    parts = problem()
    q, k, v = (jagged(x) for x in parts)
    with expressive_sdpa():
        found = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found.values(), expressive_attention(q, k, v).values())
    torch.manual_seed(0)
    ones = torch.nested.nested_tensor_from_jagged(torch.ones(4, sum(KEYS), 1), k.offsets(), jagged_dim=2)
    output = expressive_attention(q, k, ones, dropout_p=0.5).values()
    assert not torch.allclose(output, torch.ones_like(output))
    torch.testing.assert_close(expressive_attention(q, k, ones).values(), torch.ones_like(output))


@not_on_oldest("its compiler does not trace the properties of nested tensors")
def test_compiles_as_one_graph():
    def function(q, k, v):
        return expressive_attention(q, k, v, is_causal=True).values().square().sum()

    nested = [jagged(x).detach().requires_grad_() for x in problem()]
    # Keys and values of one model have the same offsets.
    k = nested[1]
    nested[2] = torch.nested.nested_tensor_from_jagged(
        torch.randn(4, sum(KEYS), 3), k.offsets(), jagged_dim=2
    ).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*nested), nested) for f in (compiled, function)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.values(), b.values())


Q, K, V = (jagged(x) for x in problem())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": torch.randn(4, 4, 6, 8)}, ["key must be a jagged nested tensor as query is", "torch.strided"]),
        ({"query": torch.randn(4, 4, 6, 8)}, ["query must be a jagged nested tensor as key is"]),
        ({"attn_mask": torch.ones(4, 4, 6, 6)}, ["attn_mask must be None for jagged"]),
        ({"key": Q}, ["value must have the lengths of key"]),
        ({"value": jagged(problem()[2][:3])}, ["value must have the 4 dimensions and the 4 parts of query"]),
        ({"query": Q.transpose(1, 2)}, ["query must be ragged in its last dimension but one"]),
        ({"query": Q.double()}, ["key must have the dtype of query, torch.float64, got torch.float32"]),
        ({"dropout_p": 2.0}, ["dropout_p"]),
        ({"scale": "x"}, ["scale"]),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        expressive_attention(**{"query": Q, "key": K, "value": V, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)
