"""Models of expressive attention that are switched to z^2 where their scores are small."""

import copy

import pytest
import torch

from expressive_attention.integrations import ConversionError, convert, linearize
from expressive_attention.nn import MultiheadAttention, SelfAttention, Transformer


def model_of(sizes=(0.02, 1.0), **options):
    """One layer for each size of its scores, about."""
    torch.manual_seed(1)
    model = Transformer(11, 9, 16, len(sizes), 2, gain=True, **options).double().eval()
    for block, size in zip(model.blocks, sizes, strict=True):
        block.attention.gain.weight.data = torch.tensor([size, size / 3], dtype=torch.float64)
    return model


def largest(model, tokens):
    """|z| of the pairs that see each other, for each layer and head, by hand."""
    found = []

    def keep(module, args):
        q, k, _ = module.heads(args[0])
        z = (q @ k.mT / q.shape[-1] ** 0.5).abs()
        found.append(z[..., torch.ones(z.shape[-2:], dtype=torch.bool).tril()].transpose(0, 1).flatten(1))

    handles = [block.attention.register_forward_pre_hook(keep) for block in model.blocks]
    with torch.no_grad():
        for each in tokens:
            model(each)
    for handle in handles:
        handle.remove()
    layers = len(model.blocks)
    return [torch.cat(found[i::layers], 1) for i in range(layers)]


def test_layers_with_small_scores_are_switched_and_others_told():
    model, tokens = model_of(), torch.randint(11, (2, 4, 9))
    z = largest(model, tokens)
    tolerance = 1.01 * float(z[0].square().max())
    assert tolerance < z[1].square().amax(-1).min()
    with torch.no_grad():
        before = model(tokens[0])
    linearization = linearize(model, tokens, tolerance=tolerance)
    assert [(layer.name, layer.kind, layer.at_limit) for layer in linearization.layers] == [
        ("blocks.0.attention", "SelfAttention", True), ("blocks.1.attention", "SelfAttention", False)
    ]  # fmt: skip
    for layer, own in zip(linearization.layers, z, strict=True):
        torch.testing.assert_close(layer.largest, own.amax(-1))
        torch.testing.assert_close(layer.beyond, (own.square() >= tolerance).double().mean(-1))
    assert [block.attention.mechanism for block in model.blocks] == ["squared", "expressive"]
    assert str(linearization.verify(tokens[0])) == "EA of the form 'squared' ran in 1/1 layers"
    other = model_of()
    other.blocks[0].attention.mechanism = "squared"
    with torch.no_grad():
        assert torch.equal(model(tokens[0]), other(tokens[0]))
        assert not torch.equal(model(tokens[0]), before)
        linearization.undo()
        assert torch.equal(model(tokens[0]), before)
    assert linearization.undo() is None
    with pytest.raises(ConversionError, match="there is nothing to verify"):
        linearization.verify(tokens[0])


@pytest.mark.parametrize("heads", [[0], [1], [0, 1]])
def test_one_large_score_of_one_head_keeps_a_layer(heads):
    model, tokens = model_of((1.0,)), torch.randint(11, (1, 4, 9))
    z = largest(model, tokens)[0].amax(-1)
    gain = model.blocks[0].attention.gain.weight.data
    gain.mul_(torch.tensor([0.0999 if head in heads else 0.1001 for head in (0, 1)]) / z)
    with linearize(model, tokens, tolerance=0.01) as linearization:
        assert [int((layer.beyond == 0).sum()) for layer in linearization.layers] == [len(heads)]
        assert model.blocks[0].attention.mechanism == ("squared" if len(heads) == 2 else "expressive")
    assert model.blocks[0].attention.mechanism == "expressive"


def test_the_tolerance_bounds_the_change_of_attention():
    torch.manual_seed(3)
    module, x = SelfAttention(8, 1).double(), torch.randn(4, 30, 8, dtype=torch.float64)
    module.out.weight.data, module.out.bias.data = torch.eye(8).double(), torch.zeros(8).double()
    with torch.no_grad():
        before, values = module(x), module.heads(x)[2].abs().amax()
        z = torch.cat([y.flatten() for y in (module.heads(x)[0] @ module.heads(x)[1].mT) / 8**0.5])
        tolerance = float(z.square().max()) * 1.001
        assert len(linearize(module, [x], tolerance=tolerance).switched) == 1
        change = (module(x) - before).abs().max() / values
    assert 0.01 * tolerance < change < tolerance


def test_the_table():
    model, tokens = model_of(), torch.randint(11, (1, 4, 9))
    z = [float(own.max()) for own in largest(model, tokens)]
    linearization = linearize(model, tokens, tolerance=0.05)
    lines = str(linearization).splitlines()
    assert lines[0].split() == ["layer", "class", "largest", "|z|", "heads", "at", "the", "limit"]
    assert lines[1].split() == ["blocks.0.attention", "SelfAttention", f"{z[0]:.2g}", "2", "of", "2", "switched"]
    assert lines[2].endswith(f"left alone: z² reaches {z[1] ** 2:.2g}")
    assert lines[3] == "1 of 2 layers switched to z², tolerance 0.05"
    linearization.undo()
    assert str(linearization).endswith("1 of 2 layers switched to z², undone")
    assert "<pre>" in linearization._repr_html_()


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_multi_head_attention(kind):
    torch.manual_seed(0)
    module = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    if kind == "ours":
        module.self_attn = MultiheadAttention(16, 2, batch_first=True).eval()
    else:
        conversion = convert(module)
    expressive = copy.deepcopy(module.state_dict())
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        before = module(x)
    linearization = linearize(module, [x], tolerance=100.0)
    assert module.self_attn.form == "squared"
    assert linearization.verify(x).calls == {"self_attn": 1}
    if kind == "torch":
        with pytest.raises(RuntimeError, match="saved with the form 'expressive', and the layer has 'squared'"):
            module.load_state_dict(expressive)
        with pytest.raises(ConversionError, match="`linearize` has switched these layers since: self_attn; undo it fi"):
            conversion.undo()
    with torch.no_grad():
        assert not torch.equal(module(x), before)
        linearization.undo()
        assert torch.equal(module(x), before)
    assert module.load_state_dict(expressive)
    if kind == "torch":
        conversion.undo()
        assert type(module.self_attn) is torch.nn.MultiheadAttention


def test_wrong_arguments_and_models_are_named():
    model, tokens = model_of(), torch.randint(11, (1, 4, 9))
    for options, message in (
        ({"tolerance": 0.0}, r"tolerance must be positive, got 0\.0"),
        ({"batches": []}, "batches must hold at least one input of the model, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            linearize(model, **{"batches": tokens} | options)
    with pytest.raises(ConversionError, match="Linear has no attention layer of the form 'expressive'; see `convert`"):
        linearize(torch.nn.Linear(2, 2), [torch.zeros(1, 2)])
    apart = torch.nn.ModuleDict({"used": SelfAttention(8, 2), "not": SelfAttention(8, 2)})
    apart.forward = apart["used"].__call__  # a module would become a child
    with pytest.raises(ValueError, match="batches must reach every switched layer, but these were not: not"):
        linearize(apart, [torch.randn(1, 3, 8)])
    assert [module.mechanism for module in apart.values()] == ["expressive", "expressive"]


def test_scores_that_are_not_numbers_keep_a_layer():
    module, x = SelfAttention(8, 2), torch.randn(1, 5, 8)
    x[0, 3, 1] = torch.nan
    linearization = linearize(module, [x], tolerance=1e9)
    assert module.mechanism == "expressive"
    assert linearization.layers[0].largest.isnan().all()


def test_what_verify_finds():
    model, tokens = model_of((0.01,)), torch.randint(11, (1, 4, 9))
    linearization = linearize(model, tokens)
    model.blocks[0].attention.mechanism = "expressive"
    with pytest.raises(
        ConversionError, match=r"EA of the form .squared. ran in 0/1 layers; not in: blocks\.0\.attention"
    ):
        linearization.verify(tokens[0])
    copied = copy.deepcopy(linearization)
    with pytest.raises(ConversionError, match="a copy of a linearization cannot undo it"):
        copied.undo()


# ---- transformers ----


def llama():
    pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    from .transformers_models import build

    torch.manual_seed(0)
    model = build("llama")
    first = model.model.layers[0].self_attn
    first.q_proj.weight.data *= 1e-3
    return model, torch.randint(1, 64, (2, 9))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("how", ["convert", "name"])
def test_a_model_of_transformers_is_switched_saved_and_generates(how, tmp_path):
    from expressive_attention.integrations import huggingface

    model, ids = llama()
    conversion = convert(model) if how == "convert" else model.set_attn_implementation("expressive")
    with torch.no_grad():
        before = model(ids).logits
    linearization = linearize(conversion or model, [{"input_ids": ids}])
    assert [layer.at_limit for layer in linearization.layers] == [True, False]
    assert linearization.verify(ids).calls == {"model.layers.0.self_attn": 1}
    kinds = [type(layer).__name__ for layer in huggingface.squared_cache(model).layers]
    assert kinds == ["StateLayer", "DynamicLayer"]
    said = [
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **options)
        for options in ({}, {"past_key_values": huggingface.squared_cache(model)})
    ]
    assert torch.equal(*said)
    model.save_pretrained(tmp_path / "squared")
    loaded = huggingface.from_pretrained(type(model), tmp_path / "squared", dtype=torch.float64).eval()
    huggingface.check(loaded)
    assert [huggingface.form_of_layer(x.self_attn) for x in loaded.model.layers] == ["squared", "expressive"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert not torch.equal(model(ids).logits, before)
        linearization.undo()
        assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path / "undone")
    loaded = huggingface.from_pretrained(type(model), tmp_path / "undone", dtype=torch.float64).eval()
    assert [huggingface.form_of_layer(x.self_attn) for x in loaded.model.layers] == ["expressive", "expressive"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_calls_that_linear_time_declines_are_told():
    model, ids = llama()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    conversion = convert(model)
    padded = linearize(conversion, [{"input_ids": ids, "attention_mask": mask}], tolerance=1e9)
    assert "switched, but not in linear time: masks have no linear form" in str(padded)
    padded.undo()
    assert "not in linear time" not in str(linearize(conversion, [ids], tolerance=1e9))
