"""Tensors that are more than memory: subclasses, modes, torch's causal biases, layouts."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

from expressive_attention import expressive_attention, expressive_attention_varlen
from expressive_attention.integrations import expressive_sdpa
from tests.budget import ON_CPU

Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 3)
STARTS = torch.tensor([0, 2, 5])


class Mine(torch.Tensor):
    pass


class Parameter(torch.nn.Parameter):
    pass


class Told(torch.Tensor):
    calls: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append((func, args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)


class Mode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def packed(q, k, v, **options):
    return expressive_attention_varlen(q, k, v, STARTS, STARTS, 3, 3, **options)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_a_plain_subclass_is_kept(which, backend):
    tensors = [Q, K, V, torch.randn(5, 9)]
    expected = expressive_attention(*tensors, backend=backend)
    tensors[which] = tensors[which].as_subclass(Mine)
    output, normalizer = expressive_attention(*tensors, backend=backend, return_normalizer=True)
    assert type(output) is type(normalizer) is Mine
    assert torch.equal(output.as_subclass(torch.Tensor), expected)


def test_gradients_of_subclasses_and_parameters():
    plain = [x.clone().requires_grad_() for x in (Q, K, V)]
    expected = torch.autograd.grad(expressive_attention(*plain).square().sum(), plain)
    mine = [x.clone().as_subclass(Mine).requires_grad_() for x in (Q, K, V)]
    found = torch.autograd.grad(expressive_attention(*mine).square().sum(), mine)
    assert all(torch.equal(torch.Tensor(a), b) for a, b in zip(found, expected, strict=True))
    for kind in (torch.nn.Parameter, Parameter):
        parameters = [kind(x.clone()) for x in (Q, K, V)]
        output = expressive_attention(*parameters)
        assert type(output) is type(F.scaled_dot_product_attention(*parameters)) is torch.Tensor
        found = torch.autograd.grad(output.square().sum(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert type(expressive_attention(*(torch.nn.Buffer(x) for x in (Q, K, V)))) is torch.Tensor


def test_a_subclass_is_told_of_one_call_with_its_arguments():
    for which in range(3):
        Told.calls.clear()
        tensors = [Q, K, V]
        tensors[which] = tensors[which].as_subclass(Told)
        expressive_attention(*tensors, None, 0.0, True, scale=0.5, window_size=(2, 3), form="squared")
        ((func, args, kwargs),) = Told.calls
        assert func is expressive_attention
        torch.testing.assert_close(
            func(*(x.as_subclass(torch.Tensor) for x in args[:3]), *args[3:], **kwargs),
            expressive_attention(Q, K, V, is_causal=True, scale=0.5, window_size=(2, 3), form="squared"),
        )
    Told.calls.clear()
    assert type(packed(*(x.as_subclass(Told) for x in torch.randn(3, 5, 2, 8)), causal=True)) is Told
    assert [call[0] for call in Told.calls] == [expressive_attention_varlen]


def test_a_mode_is_told_of_one_call():
    with Mode() as mode:
        output = expressive_attention(Q, K, V, causal_upper_left(5, 9))
        packed(*torch.randn(3, 5, 2, 8))
    ours = [func for func in mode.calls if getattr(func, "__module__", "").startswith("expressive_attention")]
    assert ours == [expressive_attention, expressive_attention_varlen]
    with Mode() as mode:
        expressive_attention(Q, K, V, backend="reference")
    assert mode.calls == [expressive_attention]
    assert torch.equal(output, expressive_attention(Q, K, V, is_causal=True))


def test_a_type_may_replace_the_function():
    class Lazy:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func.__name__, kwargs["scale"]

    assert expressive_attention(Lazy(), K, V, scale=2.0) == ("expressive_attention", 2.0)


BIASES = {"upper_left": causal_upper_left, "lower_right": causal_lower_right}


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("alignment", BIASES)
@pytest.mark.parametrize("sizes", [(5, 9), (9, 5), (5, 5), (1, 9)])
def test_causal_biases_of_torch(backend, alignment, sizes):
    rows, keys = sizes
    q, k, v = torch.randn(2, 4, rows, 8), torch.randn(2, 4, keys, 8), torch.randn(2, 4, keys, 3)
    bias = BIASES[alignment](rows, keys)
    expected = expressive_attention(q, k, v, bias._materialize(), backend="reference")
    found = expressive_attention(q, k, v, bias, backend=backend)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected)
    with expressive_sdpa():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), expected)


def test_a_causal_bias_beside_other_limits():
    bias, mask = causal_lower_right(5, 9), causal_lower_right(5, 9)._materialize()
    for options in (
        {"is_causal": True},
        {"window_size": (2, 6)},
        {"key_lengths": torch.tensor([9, 6])},
        {"alibi_slopes": torch.rand(4)},
        {"dropout_p": 1.0},
    ):
        torch.testing.assert_close(
            expressive_attention(Q, K, V, bias, **options), expressive_attention(Q, K, V, mask, **options)
        )
    assert type(expressive_attention(Q.as_subclass(Mine), K, V, bias)) is Mine


def test_a_causal_bias_of_another_size_is_a_mask_of_that_size():
    with pytest.raises(ValueError, match=r"attn_mask must be broadcastable to .* \(2, 4, 5, 9\), got shape \(4, 9\)"):
        expressive_attention(Q, K, V, causal_lower_right(4, 9))
    one_row = expressive_attention(Q, K, V, causal_upper_left(1, 9))
    torch.testing.assert_close(one_row, V[:, :, :1].expand(-1, -1, 5, -1))


def test_causal_biases_compile():
    for bias in (causal_lower_right(5, 9), causal_upper_left(5, 9)):
        compiled = torch.compile(lambda q, bias: expressive_attention(q, K, V, bias), backend="aot_eager")
        torch.testing.assert_close(compiled(Q, bias), expressive_attention(Q, K, V, bias))


LAYOUTS = {
    "torch.sparse_coo": lambda x: x.to_sparse(),
    "torch.sparse_csr": lambda x: x.flatten(0, -2).to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "torch._mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "alibi_slopes", "q", "k", "v"])
def test_layouts_are_named(layout, name):
    q = torch.randn(2, 2, 5, 8)
    arguments = {"query": q, "key": q, "value": q}
    if name in ("q", "k", "v"):
        arguments = {"q": q[0], "k": q[0], "v": q[0]}
    change = {"attn_mask": torch.randn(2, 2, 5, 5), "alibi_slopes": torch.rand(2, 2)}
    arguments[name] = LAYOUTS[layout](change.get(name, arguments.get(name)))
    with pytest.raises(ValueError, match=rf"{name} must be dense, of layout torch.strided, got.*{layout}"):
        packed(**arguments) if "q" in arguments else expressive_attention(**arguments)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_and_complex_numbers_are_named():
    quantized = torch.quantize_per_tensor(K, 0.1, 0, torch.qint8)
    for x, dtype in ((quantized, "torch.qint8"), (K.to(torch.complex64), "torch.complex64")):
        with pytest.raises(ValueError, match=rf"key must be float16, .* got {dtype}"):
            expressive_attention(Q, x, V)
        with pytest.raises(ValueError, match=rf"attn_mask must be bool .* got {dtype}"):
            expressive_attention(Q, K, V, x[..., 0, :1])
    lengths = torch.tensor([9, 9]).to_sparse()
    with pytest.raises(ValueError, match="key_lengths must be dense"):
        expressive_attention(Q, K, V, key_lengths=lengths)
    with pytest.raises(ValueError, match="cu_seqlens_k must be dense"):
        expressive_attention_varlen(*(torch.randn(5, 2, 8),) * 3, STARTS, STARTS.to_sparse(), 3, 3)
