"""Dropout: the generator, which weights it drops in every backend, and what torch does to the numbers it draws."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from expressive_attention import expressive_attention
from expressive_attention.backends import dropout
from expressive_attention.call import Call, Visibility
from expressive_attention.varlen import expressive_attention_varlen
from tests.budget import FUSED, Case, assert_within_budget, fused, threads_of_torch

BACKENDS = ("reference", *FUSED)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_has_the_known_answers(counter, key, words):
    """The numbers of Random123, the authors' library."""
    first, second = (torch.tensor(x) for x in key)
    assert tuple(int(x) for x in dropout.philox(tuple(torch.tensor(x) for x in counter), (first, second))) == words


@pytest.mark.parametrize("p", [0.0, 2.0**-24, 0.1, 0.5, 1 - 2.0**-24, 1.0])
def test_the_probability_is_exact(p):
    assert dropout.threshold(p) == round(p * 2**24) or dropout.threshold(p) == int(p * 2**24) + 1
    assert dropout.threshold(p) / 2**24 == pytest.approx(p, abs=2.0**-24)


def kept(q, k, p):
    """The pattern of a call with these queries and keys, after `torch.manual_seed(0)`."""
    torch.manual_seed(0)
    call = Call(q, k, k, None, Visibility(), 1.0, "expressive", p, dropout.draw(q))
    return dropout.kept(call, *(torch.arange(n) for n in (*q.shape[:3], k.shape[2])))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys"), [(2, 4, 70, 130), (1, 2, 1, 4500), (2, 2, 7, 64), (1, 4, 300, 33)]
)
def test_every_backend_drops_the_same_weights(name, dtype, batch, heads, rows, keys):
    """Values are one-hot: the output is the weights, and the gradient of the values, too."""
    torch.manual_seed(1)
    q, k = torch.randn(batch, heads, rows, 16).to(dtype), torch.randn(batch, 2, keys, 16).to(dtype)
    expected = kept(q, k, 0.3)
    width = min(keys, 512)
    for start in {0, keys - width}:
        v = torch.eye(keys)[:, start : start + width].to(dtype).expand(batch, 2, keys, width)
        v = v.contiguous().requires_grad_()
        for threads in (1, 3):
            with fused(name) as backend, threads_of_torch(threads):
                torch.manual_seed(0)
                output = expressive_attention(q, k, v, None, 0.3, enable_gqa=True, backend=backend)
                (gradient,) = torch.autograd.grad(output.sum(), v)
            assert torch.equal(output != 0, expected[..., start : start + width])
            seen = expected.unflatten(1, (2, -1)).any(2).any(-2)  # (B, Hkv, S)
            assert torch.equal((gradient != 0).any(-1), seen)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_that_of_sdpa_for_a_given_mask(name, causal):
    """Weights are dropped after they are normalized; those that are kept are divided by 1 - p."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 150, 32, requires_grad=True) for _ in range(3))
    upstream = torch.randn(2, 3, 150, 32)
    keep = kept(q, k, 0.25)
    with fused(name) as backend:
        torch.manual_seed(0)
        output, normalizer = expressive_attention(q, k, v, None, 0.25, causal, return_normalizer=True, backend=backend)
        got = (output, normalizer, *torch.autograd.grad(output, (q, k, v), upstream))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    z = exact[0] @ exact[1].mT / 32**0.5
    weight = z.square() / (1 + z.square())
    weight = weight.tril() if causal else weight
    shares = weight / weight.sum(-1, keepdim=True)
    want = torch.where(keep, shares, 0.0) / 0.75 @ exact[2]
    for x, y in zip(got, (want, weight.sum(-1), *torch.autograd.grad(want, exact, upstream.double())), strict=True):
        torch.testing.assert_close(x.double(), y.detach(), rtol=1e-5, atol=1e-5 * float(y.detach().abs().max()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_keys_than_a_tile_within_budget(dtype, causal):
    """Random problems have fewer than the tiles of all backends."""
    q, k, v = (torch.randn(1, heads, n, 8).to(dtype) for heads, n in ((2, 270), (1, 600), (1, 600)))
    options = {"dropout_p": 0.4, "enable_gqa": True, "is_causal": causal, "causal_alignment": "lower_right"}
    assert_within_budget(Case(q, k, v, None, options), *FUSED)


@pytest.mark.parametrize("name", BACKENDS)
def test_all_dropped_is_0(name):
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    with fused(name) as backend:
        output = expressive_attention(q, k, v, None, 1.0, backend=backend)
        gradients = torch.autograd.grad(output.sum(), (q, k, v))
    assert all(x.abs().max() == 0 for x in (output, *gradients))


def test_calls_differ_and_seeds_repeat_them():
    q = torch.randn(1, 2, 40, 8)
    torch.manual_seed(3)
    first, second = (expressive_attention(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, expressive_attention(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_rows_heads_and_batches_are_independent():
    call = Call(torch.empty(3, 4, 64, 1), torch.empty(3, 4, 640, 1), torch.empty(3, 4, 640, 1), None, Visibility(), 1.0,
                "expressive", 0.5, torch.tensor([[123456789, 987654321, 0]]))  # fmt: skip
    bits = dropout.kept(call, *(torch.arange(n) for n in (3, 4, 64, 640))).flatten(0, 2).double() - 0.5
    shares = bits @ bits.mT / (640 * 0.25)
    assert (shares - torch.eye(len(shares), dtype=shares.dtype)).abs().max() < 6 / 640**0.5
    assert bits.mean().abs() < 4 * 0.5 / bits.numel() ** 0.5


@pytest.mark.parametrize("backend", ["reference", "blockwise", "cpu"])
def test_checkpoints_drop_the_same_weights_again(backend):
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        return expressive_attention(q, k, v, None, 0.5, backend=backend)

    torch.manual_seed(4)
    want = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(4)
    got = torch.autograd.grad(checkpoint(attend, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_calls_have_one_pattern_forward_and_backward(backend):
    torch.compiler.reset()
    q, k, v = torch.randn(1, 1, 70, 8), torch.randn(1, 1, 90, 8), torch.eye(90).view(1, 1, 90, 90).requires_grad_()
    compiled = torch.compile(
        lambda q, k, v: expressive_attention(q, k, v, None, 0.5, backend=backend), fullgraph=True, backend="aot_eager"
    )
    output = compiled(q, k, v)
    upstream = torch.rand(1, 1, 70, 90)
    (gradient,) = torch.autograd.grad(output, v, upstream)
    torch.testing.assert_close(gradient, output.detach().mT @ upstream)  # the output is the weights
    assert 0.4 < (output != 0).double().mean() < 0.6


def test_modes_of_randomness_of_vmap():
    q = torch.randn(1, 2, 20, 8).expand(3, 1, 2, 20, 8).contiguous()

    def attend(q, backend="cpu"):
        return expressive_attention(q, q, q, dropout_p=0.5, backend=backend)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(attend)(q)
    same, different = (torch.vmap(attend, randomness=mode)(q) for mode in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    leaf = q.clone().requires_grad_()
    torch.manual_seed(6)
    torch.vmap(attend, randomness="different")(leaf).square().sum().backward()
    torch.manual_seed(6)
    by_reference = partial(attend, backend="reference")
    other = q.clone().requires_grad_()
    torch.vmap(by_reference, randomness="different")(other).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_derivatives_of_every_kind_drop_the_same_weights():
    q, k, v = (torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        torch.manual_seed(5)
        return expressive_attention(q, k, v, None, 0.4, backend="cpu")

    assert torch.autograd.gradcheck(attend, (q, k, v))
    assert torch.autograd.gradgradcheck(attend, (q, k, v))

    def automatic(q):
        torch.manual_seed(5)
        return expressive_attention(q, k.detach(), v.detach(), None, 0.4).square().sum()

    (want,) = torch.autograd.grad(automatic(q), q)
    torch.testing.assert_close(torch.func.grad(automatic)(q.detach()), want)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "cpu"])
def test_packed_sequences_are_dropped_each_in_its_own_way(backend):
    torch.manual_seed(7)
    q, k = torch.randn(1, 2, 8).expand(60, 2, 8).contiguous(), torch.randn(1, 2, 8).expand(60, 2, 8).contiguous()
    v = torch.randn(1, 30, 2, 8).expand(2, 30, 2, 8).reshape(60, 2, 8)
    starts = torch.tensor([0, 30, 60])
    results = {}
    for name in ("reference", backend):
        torch.manual_seed(8)
        results[name] = expressive_attention_varlen(q, k, v, starts, starts, 30, 30, 0.5, backend=name)
    torch.testing.assert_close(results[backend], results["reference"])
    assert not torch.equal(results[backend][:30], results[backend][30:])
