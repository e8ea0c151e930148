"""Adapters of PEFT in models that have been converted, or that are converted then."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="needs peft")

from expressive_attention.integrations import ConversionError, calibrate, convert, merge_gains  # noqa: E402
from expressive_attention.nn import MultiheadAttention  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")]


@pytest.mark.parametrize("first", ["convert", "peft"])
def test_lora_of_multi_head_attention(first):
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)).double().eval()
    x, config = (
        torch.randn(2, 5, 16).double(),
        peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False),
    )
    twin = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    if first == "convert":
        convert(model)
    adapted = peft.get_peft_model(model, config).double().eval()
    adapted.load_state_dict(twin.state_dict())
    if first == "peft":
        assert str(convert(adapted).verify(x)) == "EA ran in 1/1 layers"
    merged = twin.merge_and_unload()
    with torch.no_grad():
        softmax = merged(x)
    convert(merged)
    found = adapted(x)
    torch.testing.assert_close(found, merged(x))
    assert not torch.allclose(found, softmax, atol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(x), merged(x))


@pytest.mark.parametrize("holder", ["a module", "an encoder layer of torch", "an encoder of torch"])
def test_lora_of_the_class_of_this_package(holder):
    attention = MultiheadAttention(16, 4, batch_first=True)
    model = Holder(attention)
    if holder != "a module":
        model = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
        model.self_attn = attention
    if holder == "an encoder of torch":
        model = nn.TransformerEncoder(model, 2, enable_nested_tensor=False)
    model = nn.Sequential(model).double()
    twin = copy.deepcopy(model)  # of torch's class, converted after PEFT
    for module in list(twin.modules()):
        if isinstance(getattr(module, "self_attn", None), MultiheadAttention):
            softmax = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
            softmax.load_state_dict(module.self_attn.state_dict())
            module.self_attn = softmax
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    adapted, twin = peft.get_peft_model(model, config), peft.get_peft_model(twin, config)
    twin.load_state_dict(adapted.state_dict())
    convert(twin)
    x = torch.randn(2, 5, 16).double()
    for mode in (adapted.eval, adapted.train):
        mode()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(adapted(x), twin(x))
    adapted(x).square().sum().backward()
    twin(x).square().sum().backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert gradients
    for name, p in twin.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad)
    before = adapted.eval()(x)
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(merged(x), before)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), before)


def test_the_class_of_this_package_with_other_widths_is_refused_for_that_reason():
    model = nn.Sequential(Holder(MultiheadAttention(16, 4, kdim=8, batch_first=True)))
    with pytest.raises(ValueError, match="Only same"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["self_attn"], r=2))


class Holder(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, attention):
        super().__init__()
        self.self_attn = attention

    def forward(self, x):
        return self.self_attn(x, x, x)[0]


def llama():
    transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    from .transformers_models import LLAMA

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return model, torch.randint(1, 64, (2, 9))


def test_adapters_with_attention_of_their_own_are_named_and_refused():
    model, ids = llama()
    config = peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=3, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with pytest.raises(
        ConversionError, match=r"1\.self_attn \(AdaptedAttention\): it adds softmax attention of its own"
    ):
        convert(adapted)
    conversion = convert(adapted, strict=False)
    assert [layer.why_not for layer in conversion.layers if layer.why_not] == ["it adds softmax attention of its own"]
    assert len(conversion.switched) == 2
    (softmax,) = conversion.verify(ids).softmax
    assert softmax.endswith("1.self_attn")
    # Put on afterwards, it is in the layer's place.
    conversion = convert(model)
    peft.get_peft_model(model, config).eval()
    with pytest.raises(ConversionError, match=r"not in: model\.layers\.1\.self_attn"):
        conversion.verify(ids)


def test_prefixes_are_keys_of_the_layers_that_there_are():
    model, ids = llama()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(model, config).double().eval()
    with torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight.normal_()
    conversion = convert(adapted)
    found = conversion.verify(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert str(found) == "EA ran in 2/2 layers"
    seen = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(lambda _, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True)
    with torch.no_grad():
        cache = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).past_key_values
        kwargs, (output, _) = seen[0]
        q, k, v = (p(kwargs["hidden_states"]).unflatten(-1, (-1, 4)).transpose(1, 2) for p in
                   (layer.q_proj, layer.k_proj, layer.v_proj))  # fmt: skip
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert keys.shape[-2] == 12
    torch.testing.assert_close(keys[:, :, 3:], k)
    torch.testing.assert_close(values[:, :, 3:], v)
    z = q @ keys.repeat_interleave(2, 1).mT / 2
    weights = z**2 / (1 + z**2) * torch.ones(9, 12).tril(3)
    wanted = weights / weights.sum(-1, keepdim=True) @ values.repeat_interleave(2, 1)
    torch.testing.assert_close(output, layer.o_proj(wanted.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("how", ["requires_grad", "modules_to_save"])
def test_gains_are_trained_beside_adapters(how):
    model, ids = llama()
    calibration = calibrate(convert(model), [ids])
    twin = copy.deepcopy(model)
    kept = {"modules_to_save": ["self_attn"]} if how == "modules_to_save" else {}
    config = peft.LoraConfig(target_modules=["gate_proj"], r=2, task_type="CAUSAL_LM", **kept)
    adapted = peft.get_peft_model(model, config).double()
    if how == "requires_grad":
        for gain in calibration.gains.values():
            gain.requires_grad_(True)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "expressive_gain" in name}
    assert len(trained) == 2
    # As adapters are 0 at first, the gradient is that of the model without them.
    twin(ids, labels=ids).loss.backward()
    wanted = [layer.self_attn.expressive_gain for layer in twin.model.layers]
    optimizer = torch.optim.SGD(trained.values(), 0.1)
    adapted(ids, labels=ids).loss.backward()
    optimizer.step()
    for found, gain in zip(trained.values(), wanted, strict=True):
        assert gain.grad.abs().min() > 0
        torch.testing.assert_close(found.detach(), gain.detach() - 0.1 * gain.grad)
    with torch.no_grad():
        before = adapted(ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, before)
        assert merge_gains(merged) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        torch.testing.assert_close(merged(ids).logits, before)
