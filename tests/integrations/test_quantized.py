"""Models with quantized weights: converted, verified, calibrated, and used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expressive_attention.integrations import ConversionError, calibrate, convert, merge_gains

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")]


class Weights(torch.Tensor):
    """With few operations, as quantized weights have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.any:
            raise NotImplementedError("any")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_warning_never_breaks_a_call():
    class Attn(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.qkv.weight = nn.Parameter(self.qkv.weight.detach().as_subclass(Weights))

        def forward(self, x):
            return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))

    assert str(convert(Attn()).verify(torch.randn(2, 5, 8))) == "EA ran in 1/1 layers"


def torchao(make):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    return lambda model: quantization.quantize_(model, make(quantization))


def torchao_int8():
    return torchao(lambda module: module.Int8WeightOnlyConfig())


def torchao_int4():
    return torchao(lambda module: module.IntxWeightOnlyConfig(torch.int4))


def torchao_int4_packed():
    """With torchao's kernel for the CPU, whose weights have few operations; `Int4WeightOnlyConfig` is for GPUs."""
    pytest.importorskip("torchao", reason="needs torchao")
    int4 = pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow", reason="needs torchao 0.18")
    return torchao(lambda _: int4.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))


def bitsandbytes(make):
    module = pytest.importorskip("bitsandbytes.nn", reason="needs bitsandbytes")

    def quantize(model):
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(parent, name, make(module, linear).to("cpu"))

    return quantize


def bitsandbytes_int8():
    def linear(module, old):
        new = module.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
        new.weight = module.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        return new

    return bitsandbytes(linear)


def bitsandbytes_nf4():
    def linear(module, old):
        new = module.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
        new.weight = module.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        return new

    return bitsandbytes(linear)


def llama():
    transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [
        (torchao_int8, 1e-3),
        (torchao_int4, 1e-3),
        (torchao_int4_packed, 1e-3),
        (bitsandbytes_int8, 0.1),  # it rounds activations, too
        (bitsandbytes_nf4, 1e-3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_a_quantized_model_computes_what_its_weights_say(quantization, tolerance):
    quantize = quantization()
    model, plain, ids = llama(), llama(), torch.randint(64, (2, 5))
    plain.load_state_dict(model.state_dict())
    quantize(model)
    for name, linear in plain.named_modules():
        if isinstance(linear, nn.Linear):
            rows = torch.eye(linear.in_features)
            linear.weight.copy_(model.get_submodule(name)(rows).mT)
    softmax = plain(ids).logits
    conversion = convert(model)
    assert str(conversion.verify(ids)) == "EA ran in 2/2 layers"
    other = convert(plain)
    assert str(other.verify(ids)) == "EA ran in 2/2 layers"
    for calibrated in (False, True):
        if calibrated:
            for each in (conversion, other):
                calibrate(each, [ids])
        wanted = plain(ids).logits
        error = (model(ids).logits - wanted).norm() / wanted.norm()
        assert error < tolerance
        assert error < (softmax - wanted).norm() / wanted.norm() / 3
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape == (2, 9)
    with pytest.raises(ConversionError, match="no query projection"):
        merge_gains(conversion)
    conversion.undo()
    other.undo()
    error = (model(ids).logits - softmax).norm() / softmax.norm()
    assert error < tolerance
