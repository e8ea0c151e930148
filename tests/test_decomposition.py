"""The operator in plain operators of torch: the same numbers, and files that others can run."""

import pytest
import torch
from torch import nn

from expressive_attention import expressive_attention, ops
from expressive_attention.call import Call, Visibility
from expressive_attention.decomposition import decompositions
from expressive_attention.integrations import convert

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")]

(DECOMPOSED,) = decompositions().values()
Q, K, V = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind(0)
MASK = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.6
BIAS = torch.randn(1, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
VISIBILITIES = {
    "plain": Visibility(),
    "causal": Visibility(right=0),
    "window": Visibility(left=2, right=1, lower_right=True),
    "lengths": Visibility(right=0, key_lengths=torch.tensor([3, 6])),
    "slopes": Visibility(right=0, slopes=torch.tensor([[0.5, 1.0, 0.1, 0.0]])),
}


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("mask", [None, MASK, BIAS, torch.zeros(1, 1, 6, 6, dtype=torch.bool)])
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_it_is_the_operator(form, mask, visibility, size):
    arguments = (size * Q, K[:, :2], V[:, :2], mask)
    found = DECOMPOSED(*arguments, *VISIBILITIES[visibility], 0.3, form, "reference")
    wanted = ops.attention(Call(*arguments, VISIBILITIES[visibility], 0.3, form), "reference")
    # The normalizer of the squared form is 1e40 or 1e-40 of what it was.
    for name, x, y in zip(("output", "normalizer", "bias_max"), found, wanted, strict=True):
        if y is None:
            assert x.numel() == 0
            continue
        if name == "output" or size == 1.0:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


class Decoder(nn.Module):
    """Two layers, causal, with a mask and grouped queries."""

    def __init__(self):
        super().__init__()
        self.qkv, self.encoder = nn.Linear(16, 32), nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)

    def forward(self, x, keep):
        q, k, v = self.qkv(x).split((16, 8, 8), -1)
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
        y = expressive_attention(q, k, v, keep[:, None, None, :], is_causal=True, enable_gqa=True)
        return self.encoder(x + y.transpose(1, 2).flatten(2), src_key_padding_mask=~keep)


def decoder():
    model = Decoder().eval()
    convert(model)
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[1, 3:] = False
    return model, (torch.randn(2, 5, 16), keep)


def test_onnx_runtime_computes_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    model, inputs = decoder()
    torch.onnx.export(model, inputs, str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    x, keep = torch.randn(2, 5, 16), inputs[1].roll(1, 0)
    (found,) = session.run(None, {name: y.numpy() for name, y in zip(names, (x, keep), strict=True)})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x, keep), rtol=1e-4, atol=1e-5)


def test_exported_programs_have_plain_operators_alone():
    model, inputs = decoder()
    exported = torch.export.export(model, inputs).run_decompositions(decompositions())
    assert not [node for node in exported.graph.nodes if "expressive" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_aot_inductor_computes_the_same(tmp_path):
    model, inputs = decoder()
    exported = torch.export.export(model, inputs).run_decompositions(decompositions())
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
