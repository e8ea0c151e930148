"""Generation of models of transformers with a cache of constant size, against the cache that they make themselves."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")

from expressive_attention.integrations import ConversionError, calibrate, convert  # noqa: E402
from expressive_attention.integrations.huggingface import squared_cache  # noqa: E402
from expressive_attention.integrations.states import StateLayer  # noqa: E402

from .transformers_models import LLAMA, NEW, build  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")]

FAMILIES = ["gpt2", "llama", "gemma"]


def squared(family):
    model = build(family)
    convert(model, form="squared")
    return model


def padded(length=9):
    ids, mask = torch.randint(1, 64, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[1, :2] = 0
    mask[2, : length - 1] = 0
    return ids, mask


def generate(model, ids, mask, cache, **how):
    torch.manual_seed(1)
    kept = {} if cache is None else {"past_key_values": cache}
    options = {"max_new_tokens": 15, "min_new_tokens": 15, "pad_token_id": 0} | kept | how
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5, "num_return_sequences": 2}])
def test_the_same_is_said_as_with_keys_and_values(family, how, left):
    model, (ids, mask) = squared(family), padded()
    mask = mask if left else torch.ones_like(mask)
    cache = squared_cache(model)
    said = generate(model, ids, mask, cache, **how)
    assert torch.equal(said, generate(model, ids, mask, None, **how))
    assert [(type(layer), layer.length) for layer in cache.layers] == 2 * [(StateLayer, 9 + 14)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("layers", ["*", "*0*", "*1*"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_are_the_whole_pass(family, layers, left):
    """Where other layers keep keys and values, masks are of all tokens."""
    model = build(family)
    convert(model, form="squared", layers=layers)
    if layers != "*":
        convert(model, strict=False)
    ids, mask = padded(12)
    mask = mask if left else torch.ones_like(mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, parts, start = squared_cache(model), [], 0
    assert [type(layer) is StateLayer for layer in cache.layers] == [layers in ("*", "*0*"), layers in ("*", "*1*")]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for size in (5, 3, 1, 1, 2):
            part = slice(start, start + size)
            where = {"position_ids": positions[:, part]}
            where |= {} if NEW else {"cache_position": torch.arange(start, start + size)}
            start += size
            parts.append(model(ids[:, part], attention_mask=mask[:, :start], past_key_values=cache, **where).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=1e-9, atol=1e-9)


def test_its_size_does_not_grow_and_it_can_be_used_again():
    model, (ids, mask) = squared("llama"), padded()
    cache, sizes, said = squared_cache(model), [], []
    for new in (2, 40, 2):
        said.append(generate(model, ids, mask, cache, max_new_tokens=new, min_new_tokens=new))
        sizes.append(cache.nbytes)
        assert cache.get_seq_length() == 9 + new - 1
        cache.reset()
    assert sizes == 3 * [2 * 3 * 2 * 10 * (4 + 1) * 8]  # layers, examples, heads, products, values and moment, bytes
    assert torch.equal(said[0], said[2])


def test_examples_are_repeated_and_chosen():
    model, (ids, mask) = squared("llama"), padded()
    cache = squared_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0]))
        more = torch.cat([mask[[2, 0]], torch.ones(2, 1, dtype=torch.long)], 1)
        token = torch.tensor([[3], [4]])
        positions = more.sum(-1, keepdim=True) - 1
        found = model(token, attention_mask=more, position_ids=positions, past_key_values=cache).logits
        ids = torch.cat([ids[[2, 0]], token], 1)
        wanted = model(ids, attention_mask=more, position_ids=(more.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(found[:, 0], wanted[:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["mistral", "llama", "bart"])
def test_models_without_such_layers_are_refused(family):
    model = build(family)
    convert(model, form="expressive" if family == "llama" else "squared")
    reason = (
        "share keys or attend to an encoder" if family == "bart" else "no layer of the form 'squared' that sees all"
    )
    with pytest.raises(ConversionError, match=reason):
        squared_cache(model)


def test_layers_with_a_window_keep_their_keys():
    options = {**LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**options, use_sliding_window=True)).double().eval()
    convert(model, form="squared")
    cache = squared_cache(model)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "StateLayer"]
    ids, mask = padded()
    assert torch.equal(generate(model, ids, mask, cache), generate(model, ids, mask, None))


def test_tokens_cannot_be_taken_back():
    model, (ids, mask) = squared("llama"), padded()
    with pytest.raises(ValueError, match="cache that can be cropped" if NEW else "cannot take tokens back"):
        generate(model, ids[:1], mask[:1], squared_cache(model), prompt_lookup_num_tokens=2, eos_token_id=63)
    with torch.no_grad():
        model(ids, past_key_values=(cache := squared_cache(model)))
    cache.crop(0 if NEW else 9)
    with pytest.raises(ValueError, match="a state of constant size cannot take tokens back"):
        cache.crop(-1)


@pytest.mark.parametrize("kind", ["hole", "bias", "heads", "earlier"])
def test_masks_that_hide_more_than_padding_are_refused(kind):
    model = squared("llama")
    ids = torch.randint(1, 64, (1, 6))
    mask, message = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(), "must be causal, and hide padding alone"
    with torch.no_grad():
        cache = squared_cache(model)
        if kind == "hole":
            mask[..., 4, 2] = False
        elif kind == "bias":
            mask, message = torch.zeros(1, 1, 6, 6, dtype=torch.float64), "must hide keys or leave them as they are"
            mask[..., 3] = -1.0
        elif kind == "heads":
            mask, message = mask.expand(1, 4, 6, 6), "must be the same for all heads of a state, got 4"
        else:
            model(ids, attention_mask=mask, past_key_values=cache)
            ids, mask = ids[:, :1], torch.ones(1, 1, 1, 7, dtype=torch.bool)
            mask[..., 2] = False
        with pytest.raises(ValueError, match=message):
            model(ids, attention_mask=mask, past_key_values=cache)


def test_layers_that_change_or_ask_for_more_are_refused():
    model, (ids, _) = squared("llama"), padded()
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match=r"^LlamaAttention asks for weights of attention"):
            model(ids, past_key_values=squared_cache(model), output_attentions=True)
        cache = squared_cache(model)
        model(ids, past_key_values=cache)
        model.set_attn_implementation("expressive")
        with pytest.raises(ConversionError, match="has a state of the form 'squared' and computes 'expressive'"):
            model(ids[:, :1], past_key_values=cache)
        model.set_attn_implementation("expressive_squared")
        with pytest.raises(ConversionError, match="a layer has not attended to its state"):
            model(ids[:, :1], past_key_values=cache)


def test_gains_are_part_of_the_scores():
    model = build("llama")
    ids, mask = padded()
    calibrate(convert(model, form="squared"), [ids])
    assert torch.equal(generate(model, ids, mask, squared_cache(model)), generate(model, ids, mask, None))
