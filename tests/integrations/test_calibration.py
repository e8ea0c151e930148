import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expressive_attention.integrations import ConversionError, calibrate, convert, merge_gains
from expressive_attention.integrations.calibration import spread


class Block(nn.Module):
    """Two heads of width 8, whose scores are of very different sizes."""

    def __init__(self, causal=False):
        super().__init__()
        self.qkv, self.causal = nn.Linear(16, 48), causal
        with torch.no_grad():
            self.qkv.weight[:8] *= 50
            self.qkv.weight[8:16] *= 0.02

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


def by_hand(block, x):
    """Root mean square of z of each head, over the pairs that the mask leaves."""
    q, k, _ = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in block.qkv(x).chunk(3, -1))
    z = q @ k.mT / 8**0.5
    keep = torch.ones(z.shape[-2:]).tril() if block.causal else torch.ones(z.shape[-2:])
    return (z.square() * keep).sum((0, 2, 3)).div(len(x) * keep.sum()).sqrt()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("target", [1.0, 0.5])
def test_scores_come_to_the_target(causal, target):
    model, x = nn.Sequential(Block(causal), Block(causal)), torch.randn(4, 6, 16)
    sizes = by_hand(model[0], x).detach()
    conversion = convert(model)
    before = model(x)
    calibration = calibrate(conversion, [x[:2], x[2:]], target=target, rounds=3)
    torch.testing.assert_close(calibration.before["0"].root_mean_square, sizes)
    torch.testing.assert_close(calibration.gains["0"], target / sizes, rtol=1e-4, atol=0)
    for name in ("0", "1"):
        torch.testing.assert_close(
            calibration.after[name].root_mean_square, torch.full((2,), target), rtol=0.02, atol=0
        )
    assert calibration.before["0"].saturated[0] > 0.5
    assert calibration.after["0"].saturated.max() < 0.2
    assert not torch.allclose(model(x), before, atol=1e-3)
    lines = str(calibration).splitlines()
    assert lines[0].split() == [
        "layer",
        "gain",
        "rms",
        "of",
        "z",
        "before",
        "after",
        "|z|",
        ">",
        "3",
        "before",
        "after",
    ]
    assert len(lines) == 3
    calibration.undo()
    assert torch.equal(model(x), before)
    assert not any("expressive_gain" in name for name, _ in model.named_parameters())


def test_the_saturated_are_those_above_3_that_the_mask_leaves():
    class Given(nn.Module):
        def forward(self, q, k, mask):
            return F.scaled_dot_product_attention(q, k, k, mask, scale=1.0)

    q = torch.ones(1, 1, 2, 1)
    k = torch.tensor([2.9, -3.1, 3.1, 0.5, 9.0]).view(1, 1, 5, 1)
    bias = torch.tensor([0.0, 0.0, -torch.inf, 0.0, torch.finfo(torch.float32).min]).expand(2, 5)
    for mask in (bias, bias == 0):  # three keys are left
        found = spread(convert(Given()), [(q, k, mask)])[""]
        assert found.saturated.item() == pytest.approx(1 / 3)
        assert found.root_mean_square.item() == pytest.approx(((2.9**2 + 3.1**2 + 0.5**2) / 3) ** 0.5)


def test_gains_are_parameters_of_the_layers():
    model, x = nn.Sequential(Block()), torch.randn(4, 6, 16)
    calibrate(convert(model), [(x,)])
    assert "0.expressive_gain" in dict(model.named_parameters())
    model(x).square().sum().backward()
    assert model[0].expressive_gain.grad.abs().min() > 0
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    again = nn.Sequential(Block())
    calibrate(convert(again), [x])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_gains_are_set_twice_unless_told_otherwise():
    model, x = nn.Sequential(Block(), Block()), torch.randn(4, 6, 16)
    conversion = convert(model)

    def gains(**options):
        calibration = calibrate(conversion, [x], **options)
        found = calibration.gains["1"].detach().clone()
        calibration.undo()
        return found

    assert torch.equal(gains(), gains(rounds=2))
    assert not torch.equal(gains(), gains(rounds=1))


def test_a_second_calibration_starts_from_the_first():
    model, x = nn.Sequential(Block()), torch.randn(4, 6, 16)
    conversion = convert(model)
    first = calibrate(conversion, [x])
    gains = first.gains["0"].detach().clone()
    second = calibrate(conversion, [x], target=2.0)
    torch.testing.assert_close(second.gains["0"], 2 * gains)
    second.undo()
    torch.testing.assert_close(model[0].expressive_gain, gains)


@pytest.mark.parametrize("library", ["torch", "transformers", "x_transformers"])
def test_every_way_of_switching_takes_gains(library):
    if library == "torch":
        model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        batch = {
            "src": torch.randn(3, 5, 16),
            "src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5]),
        }
    elif library == "transformers":
        transformers = pytest.importorskip("transformers")
        options = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(**options, num_attention_heads=4, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config)
        mask = torch.ones(3, 5, dtype=torch.long)
        mask[0, :2] = 0
        batch = {"input_ids": torch.randint(64, (3, 5)), "attention_mask": mask, "use_cache": False}
    else:
        x_transformers = pytest.importorskip("x_transformers")
        model = x_transformers.Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
        batch = {"x": torch.randn(3, 5, 16), "mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5])}
    conversion = convert(model.eval())
    calibration = calibrate(conversion, [batch], target=0.7)
    (name,) = calibration.gains
    torch.testing.assert_close(
        spread(conversion, [batch])[name].root_mean_square,
        torch.full_like(calibration.gains[name], 0.7),
        rtol=1e-3,
        atol=0,
    )
    other = {key: x.roll(1, 0) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
    torch.testing.assert_close(
        spread(conversion, [other])[name].root_mean_square, calibration.after[name].root_mean_square
    )


def test_heads_without_scores_keep_their_gain():
    model, x = Block(), torch.randn(4, 6, 16)
    with torch.no_grad():
        model.qkv.weight[:8] = model.qkv.bias[:8] = 0
    calibration = calibrate(convert(model), [x])
    assert calibration.gains[""][0] == 1
    assert calibration.after[""].root_mean_square[0] == 0


def test_wrong_arguments_are_named():
    model, x = nn.ModuleDict({"used": Block(), "other": Block()}), torch.randn(2, 3, 16)

    def used_alone(x):
        return model["used"](x)

    model.forward = used_alone
    conversion = convert(model)
    with pytest.raises(ValueError, match="batches must reach every switched layer, but these were not: other"):
        calibrate(conversion, [x])
    with pytest.raises(ValueError, match="batches must hold at least one input"):
        calibrate(conversion, [])
    with pytest.raises(ValueError, match="target must be positive, got 0"):
        calibrate(conversion, [x], target=0)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        calibrate(conversion, [x], rounds=0)


def test_undoing_the_conversion_takes_the_gains_away():
    model, x = nn.Sequential(Block()), torch.randn(4, 6, 16)
    before, state = model(x), model.state_dict().keys()
    conversion = convert(model)
    calibrate(conversion, [x])
    conversion.undo()
    assert model.state_dict().keys() == state
    assert torch.equal(model(x), before)


def test_gains_have_the_dtype_of_the_queries():
    class Core(nn.Module):
        """Without parameters of its own."""

        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    model, inputs = Core(), tuple((10 * torch.randn(3, 2, 4, 6, 8, dtype=torch.bfloat16)).unbind(0))
    calibration = calibrate(convert(model), [inputs])
    assert model.expressive_gain.dtype == torch.bfloat16
    assert model(*inputs).dtype == torch.bfloat16
    torch.testing.assert_close(calibration.after[""].root_mean_square, torch.ones(4), rtol=0.02, atol=0)


def test_heads_in_the_batch_are_refused():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1) for y in self.qkv(x).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v)

    model = Folded()
    calibrate(convert(model), [torch.randn(3, 5, 8)])
    with pytest.raises(ValueError, match="gain must have an entry for each of the 4 heads of query, got 6; a layer"):
        model(torch.randn(2, 5, 8))


def test_a_second_conversion_leaves_the_gains_of_the_first():
    pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    from .transformers_models import build, inputs_of

    model, inputs = build("llama"), inputs_of("llama")
    calibrate(convert(model), [inputs])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConversionError, match=r"2 of 2 .*: it is switched already"):
        convert(model, form="squared")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def models_with_gains():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
    yield layer, {"src": torch.randn(3, 5, 16).double()}
    yield (
        nn.MultiheadAttention(8, 2, kdim=3, vdim=5).double(),
        dict(zip(("query", "key", "value"), (torch.randn(4, 2, size).double() for size in (8, 3, 5)), strict=True)),
    )
    x_transformers = pytest.importorskip("x_transformers")
    yield (
        x_transformers.Encoder(dim=16, depth=1, heads=2, attn_dim_head=8).double(),
        {"x": torch.randn(3, 5, 16).double()},
    )
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    yield vit.double(), {"x": torch.randn(2, 3, 16, 16).double()}
    from .transformers_models import build, inputs_of

    for family in ("bert", "gpt2", "llama", "vit", "bart"):
        yield build(family), inputs_of(family)


def test_merged_gains_are_part_of_the_weights():
    for model, inputs in models_with_gains():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)  # many start at 0, and then any factor would do
        conversion = convert(model.eval())
        calibration = calibrate(conversion, [inputs], target=0.7)
        names = [layer.name for layer in conversion.switched]
        with torch.no_grad():
            before = model(**inputs)
            assert merge_gains(conversion) == names
            after = model(**inputs)
        before, after = (x if isinstance(x, torch.Tensor) else x[0] for x in (before, after))
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
        assert not any("expressive_gain" in name for name, _ in model.named_parameters())
        for name, found in spread(conversion, [inputs]).items():
            torch.testing.assert_close(found.root_mean_square, calibration.after[name].root_mean_square)


def test_gains_that_a_norm_would_undo_are_not_merged():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model, x = timm.models.VisionTransformer(**sizes, qk_norm=True).eval(), torch.randn(2, 3, 16, 16)
    conversion = convert(model)
    calibrate(conversion, [x])
    before = model(x)
    with pytest.raises(ConversionError, match=r"blocks\.0\.attn \(Attention\) has gains, and no query proj"):
        merge_gains(conversion)
    assert torch.equal(model(x), before)


def test_a_merged_model_is_saved_as_an_ordinary_one(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    from expressive_attention.integrations import huggingface

    from .transformers_models import build, inputs_of

    model, inputs = build("llama", torch.float32), inputs_of("llama")
    calibrate(convert(model), [inputs])
    merge_gains(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    huggingface.check(again)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def test_an_optimizer_that_existed_before_trains_gains_that_it_is_given():
    model, x = nn.Sequential(Block(), Block()), torch.randn(4, 6, 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    calibration = calibrate(convert(model), [x])
    gains = list(calibration.gains.values())
    optimizer.add_param_group({"params": gains})
    model(x).square().mean().backward()
    wanted = [gain.detach() - 0.1 * gain.grad for gain in gains]
    assert all(gain.grad.abs().max() > 0 for gain in gains)
    optimizer.step()
    torch.testing.assert_close([gain.detach() for gain in gains], wanted)
