import inspect

import pytest
import torch
import torch.nn.functional as F

from expressive_attention import expressive_attention
from tests.budget import ON_CPU

Q = torch.randn(2, 4, 5, 8)
KV = torch.randn(2, 2, 6, 8)


def test_positional_arguments_are_those_of_torch():
    ours = list(inspect.signature(expressive_attention).parameters)
    assert ours[:6] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    documented = F.scaled_dot_product_attention.__doc__ or ""
    assert all(name in documented for name in [*ours[:6], "scale", "enable_gqa"])


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((5, 8), (6, 8), (6, 3)),
        ((4, 5, 8), (4, 6, 8), (4, 6, 3)),
        ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 3)),
        ((3, 2, 4, 5, 8), (3, 2, 4, 6, 8), (3, 2, 4, 6, 3)),
        ((2, 4, 5, 8), (4, 6, 8), (1, 4, 6, 3)),
        ((4, 5, 8), (2, 1, 6, 8), (2, 4, 6, 3)),
        ((2, 1, 5, 8), (2, 4, 6, 8), (2, 4, 6, 3)),
        ((0, 4, 5, 8), (0, 4, 6, 8), (0, 4, 6, 3)),
    ],
)
def test_leading_dimensions_broadcast_as_in_a_matrix_product(backend, query, key, value):
    q, k, v = torch.randn(query), torch.randn(key), torch.randn(value)
    z = (q @ k.mT) / 8**0.5
    w = z * z / (1 + z * z)
    expected = w / w.sum(-1, keepdim=True) @ v
    output, normalizer = expressive_attention(q, k, v, backend=backend, return_normalizer=True)
    torch.testing.assert_close(output, expected)
    assert output.shape == expected.shape
    torch.testing.assert_close(normalizer, w.sum(-1).expand(expected.shape[:-1]))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", [(), (6,), (5, 1), (4, 5, 6), (2, 1, 1, 6), (3, 1, 4, 5, 6), (3, 2, 1, 1, 1)])
def test_masks_broadcast(backend, shape):
    q, k, v = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 4, 6, 8), torch.randn(3, 2, 4, 6, 3)
    bias = torch.randn(shape)
    whole = bias.expand(3, 2, 4, 5, 6)
    got = expressive_attention(q, k, v, bias, backend=backend)
    torch.testing.assert_close(got, expressive_attention(q, k, v, whole.contiguous(), backend="reference"))
    got = expressive_attention(q, k, v, bias > 0, backend=backend)
    torch.testing.assert_close(got, expressive_attention(q, k, v, whole > 0, backend="reference"))


def test_grouped_queries_read_the_head_that_torch_gives_them():
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    repeated = expressive_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    for backend in ON_CPU:
        torch.testing.assert_close(expressive_attention(q, k, v, enable_gqa=True, backend=backend), repeated)


@pytest.mark.parametrize(("length", "keys"), [(5, 5), (3, 7), (7, 3)])
@pytest.mark.parametrize("backend", ON_CPU)
def test_causal_alignments(backend, length, keys):
    q, k, v = torch.randn(2, length, 4), torch.randn(2, keys, 4), torch.randn(2, keys, 4)
    for alignment, offset in (("upper_left", 0), ("lower_right", keys - length)):
        keep = torch.tensor([[j <= i + offset for j in range(keys)] for i in range(length)])
        got = expressive_attention(q, k, v, is_causal=True, causal_alignment=alignment, backend=backend)
        torch.testing.assert_close(got, expressive_attention(q, k, v, keep, backend="reference"))


def test_causality_and_a_mask_combine():
    q, k, v = torch.randn(3, 2, 6, 4).unbind(0)
    keep = torch.rand(6, 6) < 0.5
    both = expressive_attention(q, k, v, keep & torch.ones(6, 6).tril().bool())
    torch.testing.assert_close(expressive_attention(q, k, v, keep, is_causal=True), both)


def test_the_scale_of_the_squared_form_cancels_in_the_output_but_not_in_the_normalizer():
    q, k, v = torch.randn(3, 2, 6, 4, dtype=torch.float64).unbind(0)
    a, n = expressive_attention(q, k, v, form="squared", return_normalizer=True)
    b, m = expressive_attention(q, k, v, form="squared", scale=3.0, return_normalizer=True)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(m / n, torch.full_like(n, (3.0 * 2.0) ** 2))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_tensors_without_numbers_give_the_shapes(is_causal, dropout):
    query, key, value = (
        torch.empty(2, 4, *size, device="meta", requires_grad=True) for size in ((5, 8), (6, 8), (6, 3))
    )
    output, normalizer = expressive_attention(query, key, value, None, dropout, is_causal, return_normalizer=True)
    assert (output.shape, output.device.type) == ((2, 4, 5, 3), "meta")
    assert (normalizer.shape, normalizer.device.type) == ((2, 4, 5), "meta")
    output.sum().backward()
    assert query.grad is not None
    assert query.grad.shape == query.shape


def test_no_keys_give_zeros():
    for backend in ON_CPU:
        output, normalizer = expressive_attention(
            torch.randn(2, 5, 4), torch.randn(2, 0, 4), torch.randn(2, 0, 3), return_normalizer=True, backend=backend
        )
        assert torch.equal(output, torch.zeros(2, 5, 3))
        assert torch.equal(normalizer, torch.zeros(2, 5))


@pytest.mark.parametrize("backend", [None, *ON_CPU])
@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_computes_in_the_dtype_of_the_region(backend, enabled):
    q, k, v = torch.randn(3, 2, 6, 4).unbind(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        output = expressive_attention(q, k, v.double() if not enabled else v, backend=backend) if enabled else None
        plain = expressive_attention(q, k, v, backend=backend)
    if not enabled:
        assert plain.dtype == torch.float32
        return
    halves = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(output, expressive_attention(*halves, backend=backend))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": [[1.0]]}, TypeError, ["query", "torch.Tensor", "list"]),
        ({"key": KV.int()}, ValueError, ["key", "torch.int32", "float32"]),
        ({"value": KV.double()}, ValueError, ["value", "torch.float64", "torch.float32"]),
        ({"key": KV.to("meta")}, ValueError, ["key", "meta", "cpu"]),
        ({"query": Q[0, 0, 0]}, ValueError, ["query", "2 dimensions", "(8,)"]),
        ({"key": KV[..., :7]}, ValueError, ["key", "E = 8", "(2, 2, 6, 7)"]),
        ({"value": KV[..., :5, :]}, ValueError, ["value", "S = 6", "(2, 2, 5, 8)"]),
        ({"query": Q[..., :0], "key": KV[..., :0]}, ValueError, ["query", "at least 1"]),
        ({"key": KV[:, :0]}, ValueError, ["at least one head", "0"]),
        ({"query": Q[:, :3]}, ValueError, ["query", "multiple of the 2 heads", "3"]),
        ({"enable_gqa": False}, ValueError, ["key", "4 heads", "got 2", "enable_gqa=True"]),
        ({"value": torch.randn(2, 3, 6, 8)}, ValueError, ["value", "2 heads", "3"]),
        ({"query": torch.randn(3, 4, 5, 8)}, ValueError, ["leading dimensions", "(3,)", "(2,)"]),
        ({"attn_mask": torch.zeros(5, 6).int()}, ValueError, ["attn_mask", "bool", "torch.int32"]),
        ({"attn_mask": torch.zeros(6, 5)}, ValueError, ["attn_mask", "(2, 4, 5, 6)", "(6, 5)"]),
        ({"attn_mask": torch.zeros(5, 6, device="meta")}, ValueError, ["attn_mask", "meta"]),
        ({"attn_mask": [[True]]}, TypeError, ["attn_mask", "list"]),
        ({"dropout_p": 1.5}, ValueError, ["dropout_p", "[0, 1]", "1.5"]),
        ({"dropout_p": "no"}, TypeError, ["dropout_p", "str"]),
        ({"scale": float("nan")}, ValueError, ["scale", "finite", "nan"]),
        ({"scale": "auto"}, TypeError, ["scale", "str"]),
        ({"form": "softmax"}, ValueError, ["form", "expressive", "'softmax'"]),
        ({"causal_alignment": "left"}, ValueError, ["causal_alignment", "lower_right", "'left'"]),
        ({"window_size": (3,)}, ValueError, ["window_size", "(left, right)", "(3,)"]),
        ({"window_size": (1.5, 0)}, ValueError, ["window_size", "two integers", "(1.5, 0)"]),
        ({"alibi_slopes": torch.ones(2)}, ValueError, ["alibi_slopes", "4 heads", "(2,)"]),
        ({"alibi_slopes": torch.ones(3, 4)}, ValueError, ["alibi_slopes", "(2, 4)", "(3, 4)"]),
        ({"alibi_slopes": torch.ones(4).half()}, ValueError, ["alibi_slopes", "float32", "torch.float16"]),
        ({"alibi_slopes": [1.0]}, TypeError, ["alibi_slopes", "list"]),
        ({"alibi_slopes": torch.tensor([0.0, 1.0, -2.0, 1.0])}, ValueError, ["alibi_slopes", "at least 0", "-2.0"]),
        ({"relative_bias": torch.ones(3, 11)}, ValueError, ["relative_bias", "(2, 4)", "(3, 11)"]),
        ({"relative_bias": torch.ones(4, 9)}, ValueError, ["relative_bias", "2 M - 1", "at least the 6", "(4, 9)"]),
        ({"relative_bias": torch.ones(4, 12)}, ValueError, ["relative_bias", "odd", "(4, 12)"]),
        ({"relative_bias": torch.ones(4, 11).int()}, ValueError, ["relative_bias", "float32", "torch.int32"]),
        ({"relative_bias": torch.ones(11, device="meta")}, ValueError, ["relative_bias", "cpu", "meta"]),
        ({"relative_bias": [1.0]}, TypeError, ["relative_bias", "list"]),
        ({"key_lengths": torch.tensor([6, 7])}, ValueError, ["key_lengths", "0 to the 6 keys", "6 to 7"]),
        ({"key_lengths": torch.tensor([-1, 6])}, ValueError, ["key_lengths", "0 to the 6 keys", "-1 to 6"]),
        ({"key_lengths": torch.tensor([1, 2, 3])}, ValueError, ["key_lengths", "(2,)", "(3,)"]),
        ({"key_lengths": torch.ones(2)}, ValueError, ["key_lengths", "int32 or int64", "torch.float32"]),
        ({"key_lengths": torch.ones(2, device="meta").int()}, ValueError, ["key_lengths", "cpu", "meta"]),
        ({"backend": "cuda"}, ValueError, ["backend", "blockwise", "'cuda'"]),
    ],
)
def test_wrong_arguments_are_named(change, error, words):
    arguments = {"query": Q, "key": KV, "value": KV, "enable_gqa": True, **change}
    with pytest.raises(error) as caught:
        expressive_attention(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("backend", ON_CPU)
def test_lengths_and_slopes_have_the_leading_dimensions(backend):
    q, k, v = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 1, 4, 6, 8), torch.randn(4, 6, 3)
    lengths, slopes = torch.tensor([[6], [2], [0]]), torch.rand(3, 2, 4)
    j = torch.arange(6)
    bias = -slopes[..., None, None] * (torch.arange(5)[:, None] - j).abs()
    bias = bias.masked_fill(j >= lengths[..., None, None, None], -torch.inf)
    got = expressive_attention(q, k, v, key_lengths=lengths, alibi_slopes=slopes, backend=backend)
    torch.testing.assert_close(got, expressive_attention(q, k, v, bias, backend="reference"))
    one_head = expressive_attention(q[0, 0, 0], k[0, 0, 0], v[0], key_lengths=torch.tensor(4), backend=backend)
    torch.testing.assert_close(one_head, expressive_attention(q[0, 0, 0], k[0, 0, 0, :4], v[0, :4]))


def test_the_bounds_of_arguments_are_among_them():
    def attend(**options):
        return expressive_attention(Q, KV, KV, enable_gqa=True, **options)

    plain = attend()
    for options in (
        {"alibi_slopes": torch.zeros(4)},
        {"key_lengths": torch.tensor([6, 6])},
        {"window_size": (-1, -1)},
        {"window_size": (4, 5)},
        {"dropout_p": 0},
    ):
        torch.testing.assert_close(attend(**options), plain)
    assert attend(dropout_p=1).abs().max() == 0
    assert attend(key_lengths=torch.tensor([0, 6]))[0].abs().max() == 0


@pytest.mark.parametrize("backend", ON_CPU)
def test_slopes_can_be_learned(backend):
    slopes = torch.rand(4, requires_grad=True)
    distance = (torch.arange(5)[:, None] - torch.arange(6)).abs()

    def gradient(bias, **options):
        output = expressive_attention(Q, KV, KV, bias, enable_gqa=True, backend=backend, **options)
        return torch.autograd.grad(output.square().sum(), slopes)

    torch.testing.assert_close(gradient(None, alibi_slopes=slopes), gradient(-slopes[:, None, None] * distance))


@pytest.mark.parametrize("backend", ON_CPU)
def test_windows_that_are_wider_than_everything(backend):
    q, k = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 7, 8)
    options = {"enable_gqa": True, "key_lengths": torch.tensor([7, 3]), "backend": backend}
    for alignment in ("upper_left", "lower_right"):
        whole = expressive_attention(q, k, k, causal_alignment=alignment, **options)
        for size in (2**28, 2**30, 2**31 - 1, 2**40, 2**63 - 1):
            for window in ((size, -1), (-1, size), (size, size)):
                got = expressive_attention(q, k, k, causal_alignment=alignment, window_size=window, **options)
                torch.testing.assert_close(got, whole)


def test_a_window_is_what_a_cache_keeps():
    """The last of many queries, and alone against the keys of its window."""
    q, k, v = torch.randn(3, 2, 4, 50, 8).unbind(0)
    whole = expressive_attention(q, k, v, is_causal=True, window_size=(9, -1))
    alone = expressive_attention(q[..., -1:, :], k[..., -10:, :], v[..., -10:, :])
    torch.testing.assert_close(whole[..., -1:, :], alone)


def test_the_automatic_choice_drops_the_weights_that_the_reference_drops():
    torch.manual_seed(0)
    automatic = expressive_attention(Q, Q, Q, dropout_p=0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(automatic, expressive_attention(Q, Q, Q, dropout_p=0.5, backend="reference"))
    assert not torch.equal(automatic, expressive_attention(Q, Q, Q))
