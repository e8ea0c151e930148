import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expressive_attention.nn import MultiheadAttention


def by_hand(module, query, key, value, bias):
    """Output and weights ``(L, D)``, ``(H, L, S)`` of one sequence; `bias` is ``(H, L, S)``."""
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = [0, 0, 0] if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if module.bias_k is not None:
        k, v = torch.cat([k, module.bias_k[0]]), torch.cat([v, module.bias_v[0]])
    if module.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros(1, x.shape[1], dtype=x.dtype)]) for x in (k, v))
    rows, heads = [], []
    for h, part in enumerate(torch.arange(q.shape[1]).chunk(module.num_heads)):
        z = q[:, part] @ k[:, part].T / len(part) ** 0.5
        w = z**2 / (1 + z**2) if module.form == "expressive" else z**2
        hidden = torch.zeros_like(w)
        hidden[:, : bias.shape[2]] = bias[h]
        w = w * hidden.exp()
        total = w.sum(-1, keepdim=True)
        w = torch.where(total > 0, w / total.where(total > 0, 1), 0)
        rows.append(w)
        heads.append(w @ v[:, part])
    bias = 0 if module.out_proj.bias is None else module.out_proj.bias
    return torch.cat(heads, -1) @ module.out_proj.weight.T + bias, torch.stack(rows)


options = st.fixed_dictionaries({
    "bias": st.booleans(), "add_bias_kv": st.booleans(), "add_zero_attn": st.booleans(),
    "kdim": st.sampled_from([None, 5]), "vdim": st.sampled_from([None, 7]), "batch_first": st.booleans(),
    "form": st.sampled_from(["expressive", "squared"]),
})  # fmt: skip


def random_mask(kind, shape):
    if kind == "bool":
        return torch.rand(shape) < 0.4
    return torch.randn(shape, dtype=torch.float64).masked_fill(torch.rand(shape) < 0.3, -torch.inf)


@settings(max_examples=150, deadline=None)
@given(
    options, st.sampled_from([None, "bool", "float"]), st.sampled_from([None, "bool", "float"]), st.booleans(),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_it_is_the_definition_with_the_masks_of_torch(chosen, attn, padding, per_head, need_weights, seed):
    torch.manual_seed(seed)
    batch, heads, length, keys = 2, 2, 3, 4
    module = MultiheadAttention(8, heads, **chosen, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    query = torch.randn(batch, length, 8, dtype=torch.float64)
    key = torch.randn(batch, keys, module.kdim, dtype=torch.float64)
    value = torch.randn(batch, keys, module.vdim, dtype=torch.float64)
    attn_mask = (
        None if attn is None else random_mask(attn, (batch * heads, length, keys) if per_head else (length, keys))
    )
    padding_mask = None if padding is None else random_mask(padding, (batch, keys))
    inputs = (query, key, value) if module.batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))
    output, weights = module(*inputs, padding_mask, need_weights, attn_mask, average_attn_weights=False)
    output = output if module.batch_first else output.transpose(0, 1)
    bias = torch.zeros(batch, heads, length, keys, dtype=torch.float64)
    for mask, shape in ((attn_mask, (-1, heads, length, keys) if per_head else (1, 1, length, keys)),
                        (padding_mask, (batch, 1, 1, keys))):  # fmt: skip
        if mask is not None:
            part = (
                torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
                if mask.dtype == torch.bool
                else mask
            )
            bias = bias + part.view(shape)
    for n in range(batch):
        wanted, shares = by_hand(module, query[n], key[n], value[n], bias[n])
        torch.testing.assert_close(output[n], wanted, rtol=1e-9, atol=1e-9)
        if need_weights:
            torch.testing.assert_close(weights[n], shares, rtol=1e-9, atol=1e-12)
    assert need_weights or weights is None


def softmax_twin(module):
    """torch's own module with the same parameters."""
    twin = nn.MultiheadAttention(
        module.embed_dim, module.num_heads, add_bias_kv=module.bias_k is not None, batch_first=module.batch_first
    )
    twin.load_state_dict(module.state_dict())
    return twin


@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("unbatched", [False, True])
def test_exactly_what_torch_blocks_is_blocked(add_bias_kv, unbatched):
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, add_bias_kv=add_bias_kv, batch_first=True)
    x = torch.randn(3, 6, 8)
    attn_mask, padding = torch.rand(6, 6) < 0.4, torch.rand(3, 6) < 0.3
    attn_mask.fill_diagonal_(False)
    padding[:, 0] = attn_mask[:, 0] = False  # torch has NaN where all keys are blocked
    if unbatched:
        x, padding = x[0], padding[0]
    for masks in (
        {},
        {"attn_mask": attn_mask},
        {"key_padding_mask": padding},
        {"attn_mask": attn_mask, "key_padding_mask": padding},
    ):
        (ours, weights), (theirs, expected) = (m(x, x, x, **masks) for m in (module, softmax_twin(module)))
        assert torch.equal(weights == 0, expected == 0)
        assert ours.shape == theirs.shape
        assert not torch.allclose(ours, theirs)


def test_is_causal_stands_for_the_causal_mask_with_or_without_it():
    torch.manual_seed(0)
    for module in (MultiheadAttention(8, 2), MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True)):
        x = torch.randn(5, 3, 8)
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 3:] = True
        for masks in ({}, {"key_padding_mask": padding}):
            for need_weights in (False, True):
                wanted, _ = module(x, x, x, attn_mask=mask, need_weights=need_weights, **masks)
                for attn_mask in (None, mask, mask == -torch.inf):
                    found, _ = module(x, x, x, attn_mask=attn_mask, is_causal=True, need_weights=need_weights, **masks)
                    torch.testing.assert_close(found, wanted)


def test_weights_are_returned_as_torch_does():
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    output, each = module(x, x, x, average_attn_weights=False)
    fast, nothing = module(x, x, x, need_weights=False)
    assert nothing is None
    torch.testing.assert_close(output, fast)
    torch.testing.assert_close(each.sum(-1), torch.ones(3, 2, 5))
    torch.testing.assert_close(module(x, x, x)[1], each.mean(1))
    assert module(x[0], x[0], x[0])[1].shape == (5, 5)


def test_dropout_drops_weights_in_training_alone():
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, dropout=0.5)
    x = torch.randn(40, 3, 8)
    _, weights = module(x, x, x, average_attn_weights=False)
    assert (weights == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(module(x, x, x, need_weights=False)[0], module(x, x, x, need_weights=False)[0])
    module.eval()
    assert torch.equal(module(x, x, x, need_weights=False)[0], module(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}, {"bias": False}, {"add_bias_kv": True}])
def test_constructor_and_state_dict_are_those_of_torch(options):
    torch.manual_seed(0)
    ours = MultiheadAttention(8, 2, **options)
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **options)
    assert {name: x.tolist() for name, x in ours.state_dict().items()} == {
        name: x.tolist() for name, x in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        inputs = [torch.randn(4, 1, width) for width in (8, ours.kdim, ours.vdim)]
        assert torch.equal(twin(*inputs)[0], ours(*inputs)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # by torch's own fused path
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("padded", [False, True])
def test_layers_of_torch_call_it_in_every_mode(mode, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(8, 2, batch_first=True)
    with pytest.warns(UserWarning, match="enable_nested_tensor is True, but self.use_nested_tensor is False"):
        encoder = nn.TransformerEncoder(layer, 2)
    softmax = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    softmax.load_state_dict(encoder.state_dict())
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if padded else None
    wanted = encoder.train()(x, src_key_padding_mask=padding)  # where no fused path exists
    for model in (encoder, softmax):
        model.train(mode == "train")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        found, other = (model(x, src_key_padding_mask=padding) for model in (encoder, softmax))
    torch.testing.assert_close(found.clone(), wanted.detach().clone() if mode != "train" else wanted)
    assert not torch.allclose(found, other, atol=1e-3)


def test_the_decoder_layer_of_torch_calls_it():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    softmax = copy.deepcopy(layer)
    for name in ("self_attn", "multihead_attn"):
        module = MultiheadAttention(8, 2, batch_first=True)
        module.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, module)
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    found = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
    changed = torch.cat([x[:, :3], torch.randn(3, 2, 8)], 1)
    assert torch.equal(layer(changed, memory, tgt_mask=mask, tgt_is_causal=True)[:, :3], found[:, :3])
    assert not torch.allclose(found, softmax(x, memory, tgt_mask=mask), atol=1e-3)


def test_torch_compile_takes_it_whole():
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, batch_first=True)
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for need_weights in (False, True):
        found, wanted = (m(x, x, x, key_padding_mask=padding, need_weights=need_weights) for m in (compiled, module))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attn_mask": torch.zeros(4, 5)}, r"attn_mask must have the shape \(5, 5\) or \(6, 5, 5\), got \(4, 5\)"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "attn_mask must be of dtype bool or floating point"),
        ({"key_padding_mask": torch.zeros(5, 3)}, r"key_padding_mask must have the shape \(3, 5\), got \(5, 3\)"),
        ({"query": torch.zeros(5, 3, 6)}, r"query must have the width 8, got \(5, 3, 6\)"),
        ({"key": torch.zeros(5, 8)}, r"must all have 2 or all 3 dimensions, got key \(5, 8\)"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    x = torch.randn(5, 3, 8)
    with pytest.raises(ValueError, match=words):
        MultiheadAttention(8, 2)(**{"query": x, "key": x, "value": x, **change})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:`torch.jit.script` is deprecated")
def test_a_nested_tensor_and_a_script_are_refused():
    module = MultiheadAttention(8, 2, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(ValueError, match=r"query must not be a nested tensor; .*enable_nested_tensor=False"):
        module(nested, nested, nested)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot compile expressive attention"):
        torch.jit.script(module)
    with pytest.raises(ValueError, match=r"form must be one of \('expressive', 'squared'\), got 'softmax'"):
        MultiheadAttention(8, 2, form="softmax")
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 8 and 3"):
        MultiheadAttention(8, 3)
