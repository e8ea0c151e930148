"""Models with quantized weights: converted, verified, calibrated, and used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expressive_attention.integrations import calibrate, convert

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


def eight_bits():
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    return torchao.Int8WeightOnlyConfig()


def four_bits():
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    return torchao.IntxWeightOnlyConfig(torch.int4)


@pytest.mark.parametrize("config", [eight_bits, four_bits])
def test_torchao(config):
    transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    config = config()
    from torchao.quantization import quantize_

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    plain = transformers.LlamaForCausalLM(model.config).eval()
    quantize_(model, config)
    plain.load_state_dict({
        name: x.dequantize() if hasattr(x, "dequantize") and type(x) is not torch.Tensor else x
        for name, x in model.state_dict().items()
    })  # fmt: skip
    ids = torch.randint(64, (2, 5))
    conversion = convert(model)
    assert str(conversion.verify(ids)) == "EA ran in 2/2 layers"
    calibrate(conversion, [ids])
    calibrate(other := convert(plain), [ids])
    assert str(other.verify(ids)) == "EA ran in 2/2 layers"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape == (2, 9)
    conversion.undo()
    model(ids)
