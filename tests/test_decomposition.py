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


BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
HIDING = {
    "bool mask": (torch.arange(6) < 4, Visibility()),
    "float mask": (torch.zeros(6).masked_fill(torch.arange(6) >= 4, -torch.inf), Visibility()),
    "lengths": (None, Visibility(key_lengths=torch.tensor([4, 4]))),
    "lengths and bias": (BIAS, Visibility(key_lengths=torch.tensor([4, 4]))),
    "lengths and slopes": (None, Visibility(key_lengths=torch.tensor([4, 4]), slopes=torch.full((1, 4), 0.2))),
    "window": (None, Visibility(left=6, right=-2)),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("how", "what"), [*((how, what) for how in HIDING for what in ("key", "value")), ("lengths and bias", "bias")]
)
def test_what_is_hidden_has_no_influence(how, what, bad):
    mask, visibility = HIDING[how]
    if mask is not None and mask.ndim == 1:
        mask = mask[None, None, None]
    rows, key, value = (3 if how == "window" else 6), K.clone(), V.clone()
    wanted = ops.attention(Call(Q[:, :, :rows], key, value, mask, visibility, 0.3, "expressive"), "reference")
    if what == "bias":
        mask = mask.clone()
        mask[..., 4:] = BAD[bad]
    else:
        {"key": key, "value": value}[what][:, :, 4:] = BAD[bad]
    found = DECOMPOSED(Q[:, :, :rows], key, value, mask, *visibility, 0.3, "expressive", "reference")
    for x, y in zip(found, wanted, strict=True):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["query", "key", "value", "bias"])
def test_rows_that_see_no_numbers_are_those_of_the_reference(what, bad):
    tensors = {"query": Q.clone(), "key": K.clone(), "value": V.clone(), "bias": BIAS.clone()}
    if what == "bias":
        tensors[what][..., 1, 2] = BAD[bad]
    else:
        tensors[what][0, 1, 2] = BAD[bad]
    masks = (tensors["bias"],) if what == "bias" else (None, BIAS)
    for mask in masks:
        arguments = tensors["query"], tensors["key"], tensors["value"], mask, Visibility(right=0)
        wanted = ops.attention(Call(*arguments, 0.3, "expressive"), "reference")
        found = DECOMPOSED(*arguments[:4], *arguments[4], 0.3, "expressive", "reference")
        torch.testing.assert_close(found[0], wanted.output, rtol=1e-9, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(found[1], wanted.normalizer, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_key_with_score_0_hides_no_others_behind_its_bias():
    key, bias = K.float(), torch.zeros(1, 1, 6, 6)
    key[:, :, 3], bias[..., 3] = 0.0, 500.0
    arguments = Q.float(), key, V.float(), bias, Visibility()
    wanted = expressive_attention(Q, key.double(), V, scale=0.3)
    found, _, largest = DECOMPOSED(*arguments[:4], *arguments[4], 0.3, "expressive", "reference")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not largest.any()
    bias[..., 3] = torch.finfo(torch.float32).max
    found, *_ = DECOMPOSED(*arguments[:4], *arguments[4], 0.3, "expressive", "reference")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("query", "key"), [(1e-30, 1e30), (1e30, 1e-12), (1e25, 1e25), (1e-9, 1e-9)])
def test_sizes_of_query_and_key_do_not_overflow_on_the_way(query, key):
    wanted = expressive_attention(query * Q, key * K, V, scale=0.3)
    found, *_ = DECOMPOSED(
        (query * Q).float(), (key * K).float(), V.float(), None, *Visibility(), 0.3, "expressive", "reference"
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


class Hidden(nn.Module):
    """Keys that are hidden by lengths, a bool mask and a key of score 0 with a large bias."""

    def forward(self, q, k, v, lengths, keep, bias):
        return (
            expressive_attention(q, k, v, key_lengths=lengths),
            expressive_attention(q, k, v, keep),
            expressive_attention(q, k, v, bias),
        )


def test_onnx_runtime_leaves_out_what_is_hidden(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    q, k, v = Q.float(), K.float(), V.float()
    lengths, keep = torch.tensor([4, 4]), (torch.arange(6) < 4).expand(1, 1, 6, 6).clone()
    bias = torch.zeros(1, 1, 6, 6)
    bias[..., 4:] = -torch.inf
    bias[..., 1] = 200.0
    k[:, :, 1] = 0.0
    wanted = expressive_attention(Q, k[:, :, :4].double(), V[:, :, :4]).float()
    k[:, :, 4:], v[:, :, 4] = torch.nan, torch.nan
    v[:, :, 5] = torch.inf
    inputs = (q, k, v, lengths, keep, bias)
    torch.onnx.export(Hidden(), inputs, str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    given = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    for found in session.run(None, given):
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)


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
