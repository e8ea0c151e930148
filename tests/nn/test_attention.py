import pytest
import torch
import torch.nn.functional as F

from expressive_attention import expressive_attention, functional
from expressive_attention.nn import HeadGain, KeyValueCache, RotaryPositions, SelfAttention, alibi_bias
from expressive_attention.nn.mechanisms import attend


def by_hand(module, x, attend):
    """The module written out for one input ``(L, D)``, head by head."""
    qkv = x @ module.qkv.weight.T + (0 if module.qkv.bias is None else module.qkv.bias)
    q, k, v = qkv.chunk(3, -1)
    heads = []
    for h in range(module.num_heads):
        part = slice(h * q.shape[1] // module.num_heads, (h + 1) * q.shape[1] // module.num_heads)
        qh, kh, vh = q[:, part], k[:, part], v[:, part]
        if module.qk_norm:
            qh, kh = (x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() for x in (qh, kh))
        if module.rope is not None:
            qh, kh = module.rope(qh), module.rope(kh)
        z = qh @ kh.T / qh.shape[1] ** 0.5
        if module.gain is not None:
            z = z * module.gain.weight[h]
        bias = torch.zeros_like(z)
        if "alibi" in module.position.split("+"):
            bias = bias + alibi_bias(module.num_heads, len(x), len(x))[h]
        if module.alibi is not None:
            i = torch.arange(len(x))
            bias = bias - module.alibi.log_slopes[h].exp() * (i[:, None] - i).abs()
        if module.relative is not None:
            bias = bias + module.relative(len(x), len(x))[h]
        heads.append(attend(z, bias.to(z.dtype)) @ vh)
    return torch.cat(heads, -1) @ module.out.weight.T + module.out.bias


def expressive(z, bias):
    w = (z * z / (1 + z * z) * bias.exp()).tril()
    return w / w.sum(-1, keepdim=True)


def softmax(z, bias):
    hidden = torch.ones_like(z).tril() == 0
    return torch.softmax((z + bias).masked_fill(hidden, -torch.inf), -1)


SEVERAL = ["rope+relative", "rope+learned_alibi", "learned+relative", "alibi+learned_alibi+relative+rope"]


@pytest.mark.parametrize("position", ["none", "rope", "alibi", "relative", "learned", "learned_alibi", *SEVERAL])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(("mechanism", "attend"), [("expressive", expressive), ("dot_product", softmax)])
def test_is_attention_of_its_mechanism(mechanism, attend, position, gain, qk_norm):
    torch.manual_seed(0)
    options = {"position": position, "gain": gain, "qk_norm": qk_norm, "max_length": 9}
    module = SelfAttention(12, 2, mechanism, **options).double()
    for name, parameter in module.named_parameters():
        if name in ("gain.weight", "relative.table", "alibi.log_slopes"):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    expected = torch.stack([by_hand(module, row, attend) for row in x])
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x[:, None])[:, 0], expected)
    torch.testing.assert_close(module(x[0]), expected[0])


@pytest.mark.parametrize("mechanism", ["expressive", "dot_product"])
@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("position", ["none", "alibi", "relative", "learned_alibi", "rope+learned_alibi"])
def test_masks_work_with_both_mechanisms(mechanism, kind, position):
    torch.manual_seed(1)
    module = SelfAttention(8, 2, mechanism, position=position, max_length=5)
    x = torch.randn(2, 5, 8)
    keep = torch.tensor([True, True, False, True, True])
    mask = keep if kind == "bool" else torch.zeros(5).masked_fill(~keep, -torch.inf)
    changed = x.clone()
    changed[:, 2] += 1.0
    same = [0, 1, 3, 4]
    torch.testing.assert_close(module(x, mask)[:, same], module(changed, mask)[:, same])
    assert not torch.allclose(module(x)[:, 3:], module(changed)[:, 3:])


@pytest.mark.parametrize("mechanism", ["expressive", "dot_product"])
def test_the_future_does_not_leak(mechanism):
    torch.manual_seed(2)
    module = SelfAttention(8, 2, mechanism, position="rope")
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] = torch.randn(1, 2, 8)
    assert torch.equal(module(x)[:, :4], module(changed)[:, :4])
    full = SelfAttention(8, 2, mechanism, is_causal=False)
    assert not torch.allclose(full(x)[:, :4], full(changed)[:, :4])


def test_dot_product_is_torchs_own(monkeypatch):
    called = []
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or own(*a, **k))
    SelfAttention(8, 2, "dot_product")(torch.randn(1, 4, 8))
    assert called == [1]
    SelfAttention(8, 2, "expressive")(torch.randn(1, 4, 8))
    assert called == [1]


def test_dropout_only_in_training():
    torch.manual_seed(3)
    for mechanism in ("expressive", "dot_product"):
        module = SelfAttention(8, 2, mechanism, dropout_p=0.5)
        x = torch.randn(1, 9, 8)
        assert not torch.allclose(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))


def test_the_gain_multiplies_z():
    torch.manual_seed(4)
    gain = HeadGain(2)
    torch.nn.init.constant_(gain.weight, 3.0)
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
    expected = expressive_attention(q, k, v, scale=3.0 / 2.0)
    torch.testing.assert_close(expressive_attention(gain(q), k, v), expected)


def test_rope_turns_by_the_base_that_it_is_told():
    torch.manual_seed(5)
    x = torch.randn(1, 7, 16)
    for options, base in (({}, 10_000.0), ({"rope_base": 30.0}, 30.0)):
        module, plain = SelfAttention(16, 2, position="rope", **options), SelfAttention(16, 2)
        plain.load_state_dict(module.state_dict())
        turned = RotaryPositions(8, base)(plain.heads(x)[0])
        assert torch.equal(module.heads(x)[0], turned)


def test_the_gain_starts_where_it_is_told():
    assert SelfAttention(8, 2, gain=True).gain.weight.tolist() == [1.0, 1.0]
    assert SelfAttention(8, 2, gain=True, initial_gain=0.25).gain.weight.tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 3), ["embed_dim", "num_heads", "10 and 3"]),
        ((8, 0), ["embed_dim", "num_heads"]),
        ((8, 2, "softmax"), ["mechanism", "dot_product", "'softmax'"]),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=r".*".join(words)):
        SelfAttention(*arguments)
    with pytest.raises(ValueError, match=r"position must be one of .*'rotary'"):
        SelfAttention(8, 2, position="rotary")
    with pytest.raises(ValueError, match="max_length must be given for relative positions"):
        SelfAttention(8, 2, position="rope+relative")
    with pytest.raises(ValueError, match="head_dim must be even"):
        RotaryPositions(3)


@pytest.mark.parametrize("position", ["learned_alibi", "rope+learned_alibi"])
def test_slopes_are_trained_in_16_bits_as_well(position):
    """A row of large numbers per head would be too coarse for bfloat16."""
    torch.manual_seed(6)
    module = SelfAttention(16, 2, position=position)
    x = torch.randn(1, 300, 16)
    exact = module(x)
    module(x).sum().backward()
    assert (module.alibi.log_slopes.grad != 0).all()
    torch.testing.assert_close(module.bfloat16()(x.bfloat16()).float(), exact, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("mechanism", ["expressive", "squared"])
@pytest.mark.parametrize("position", ["alibi", "rope+learned_alibi", "alibi+learned_alibi"])
def test_decay_is_a_slope_and_no_mask(mechanism, position, monkeypatch):
    """The same holds for queries that continue a cache."""
    torch.manual_seed(7)
    module = SelfAttention(8, 2, mechanism, position=position)
    x = torch.randn(1, 7, 8)
    calls = []
    monkeypatch.setattr(functional, "call_hooks", [calls.append])
    whole = module(x)
    assert calls[0].attn_mask is None
    masked = module.out(
        attend(mechanism, *module.heads(x), module.position_bias(x), is_causal=True).transpose(-3, -2).flatten(-2)
    )
    torch.testing.assert_close(whole, masked)
    if module.alibi is not None:
        slopes = module.alibi.log_slopes
        found, expected = (torch.autograd.grad(y.square().sum(), slopes)[0] for y in (whole, masked))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    calls.clear()
    cache = KeyValueCache(7)
    parts = [module(part, cache=cache) for part in x.split([3, 1, 3], 1)]
    assert all(call.attn_mask is None for call in calls)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("mechanism", ["expressive", "squared"])
def test_relative_positions_are_a_table_and_no_mask(mechanism, monkeypatch):
    """The same holds for queries that continue a cache."""
    module = SelfAttention(8, 2, mechanism, position="relative", max_length=7)
    torch.nn.init.normal_(module.relative.table)
    x = torch.randn(1, 7, 8)
    calls = []
    monkeypatch.setattr(functional, "call_hooks", [calls.append])
    whole = module(x)
    assert calls[0].attn_mask is None
    (found,) = torch.autograd.grad(whole.square().sum(), module.relative.table)
    masked = module.out(
        attend(mechanism, *module.heads(x), module.position_bias(x), is_causal=True).transpose(-3, -2).flatten(-2)
    )
    torch.testing.assert_close(whole, masked)
    torch.testing.assert_close(found, torch.autograd.grad(masked.square().sum(), module.relative.table)[0])
    cache = KeyValueCache(7)
    parts = [module(part, cache=cache) for part in x.split([3, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match="keys must be at most 7, got 8"):
        module(torch.randn(1, 8, 8))
