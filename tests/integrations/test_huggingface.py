import ast
import copy
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")

from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, eager_mask  # noqa: E402

from expressive_attention.integrations import ConversionError, convert, huggingface  # noqa: E402
from tests.oldest import OLDEST  # noqa: E402

from .transformers_models import DECODERS, FAMILIES, LLAMA, NEW, build, inputs_of  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")]


def spelled_out(module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
    """DESIGN's section 2 on what a layer is given, with the float mask that transformers makes for its own softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    z = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = z**2 / (1 + z**2)
    for bias in (attention_mask, position_bias):
        weights = weights if bias is None else weights * bias[..., : key.shape[-2]].exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("spelled_out", spelled_out)
AttentionMaskInterface.register("spelled_out", eager_mask)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_definition_in_every_layer(family, left):
    if family == "bert" and not NEW:
        pytest.skip("in transformers 4 it calls torch's attention, and goes through no interface")
    model, inputs = build(family), inputs_of(family, left)
    with torch.no_grad():
        softmax = model(**inputs)[0]
        model.set_attn_implementation("spelled_out")
        wanted = model(**inputs)[0]
        model.set_attn_implementation("sdpa")
    conversion = convert(model)
    assert str(conversion.verify(**inputs)) == f"EA ran in {FAMILIES[family][2]}/{FAMILIES[family][2]} layers"
    with torch.no_grad():
        found = model(**inputs)[0]
        keep = inputs["attention_mask"].bool() if found.shape[:2] == (3, 9) else ...
        torch.testing.assert_close(found[keep], wanted[keep], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found, softmax, atol=1e-3)
        conversion.undo()
        assert torch.equal(model(**inputs)[0], softmax)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_padding_does_not_leak(family, left):
    model, inputs = build(family), inputs_of(family, left)
    convert(model)
    mask = inputs["attention_mask"].bool()
    other = {**inputs, "input_ids": torch.where(mask, inputs["input_ids"], torch.randint(1, 64, mask.shape))}
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        found, again = model(**inputs)[0], model(**other)[0]
    keep = mask if found.shape[:2] == mask.shape else ...
    assert torch.equal(found[keep], again[keep])


@pytest.mark.parametrize("family", DECODERS)
def test_the_future_does_not_leak(family):
    model = build(family)
    convert(model)
    ids = torch.randint(1, 64, (2, 9))
    other = torch.cat([ids[:, :6], torch.randint(1, 64, (2, 3))], 1)
    with torch.no_grad():
        assert torch.equal(model(ids)[0][:, :6], model(other)[0][:, :6])


def test_a_sliding_window_is_one():
    model = build("mistral")
    convert(model)
    ids = torch.randint(1, 64, (1, 12))
    other = torch.cat([torch.randint(1, 64, (1, 1)), ids[:, 1:]], 1)
    with torch.no_grad():
        found, again = model(ids)[0], model(other)[0]
    # Two layers of window 4: what is said at a place depends on the last 7.
    assert torch.equal(found[:, 7:], again[:, 7:])
    assert not torch.equal(found[:, :7], again[:, :7])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("padded", [True, False])
def test_prefill_and_decode_against_a_cache_are_the_whole_pass(family, cache, padded):
    model = build(family)
    convert(model)
    ids, mask = torch.randint(1, 64, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    if padded:
        mask[0, :4], mask[1, :1] = 0, 0  # on the left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        kinds = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}
        made = (
            kinds[cache](config=model.config)
            if cache == "dynamic"
            else kinds[cache](config=model.config, max_cache_len=16)
        )
        parts, start = [], 0
        for size in (5, 3, 1, 1, 2):  # prefill, a second chunk, two tokens, a chunk
            part = slice(start, start + size)
            where = {"position_ids": positions[:, part], "cache_position": torch.arange(start, start + size)}
            seen = mask[:, : start + size] if padded else None
            parts.append(model(ids[:, part], attention_mask=seen, past_key_values=made, **where).logits)
            start += size
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", [*DECODERS, "bart", *(["t5"] if NEW else [])])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generation_with_a_cache_says_what_it_says_without(family, how):
    model, inputs = build(family), inputs_of(family, left=True)
    inputs.pop("decoder_input_ids", None)
    convert(model)
    said = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        said.append(
            model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, use_cache=use_cache, pad_token_id=0, **how)
        )
    assert torch.equal(*said)
    assert said[0].shape[1] >= 9


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_weights_are_returned_when_asked_for(family):
    model, inputs = build(family), inputs_of(family)
    model.set_attn_implementation("spelled_out")
    model.config.output_attentions = False
    convert(model)
    if family == "bert" and not NEW:  # in transformers 4, BERT goes through no interface: its weights are softmax
        with pytest.raises(ConversionError, match="has computed softmax"), torch.no_grad():
            model(**inputs, output_attentions=True)
        return
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape == (3, 4, 9, 9)
        rows = inputs["attention_mask"].bool()
        torch.testing.assert_close(
            weights.sum(-1).transpose(1, 2)[rows], torch.ones_like(weights.sum(-1).transpose(1, 2)[rows])
        )
        assert (weights.permute(0, 3, 1, 2)[~rows] == 0).all()
        if family == "llama":
            assert torch.equal(weights, weights.tril())


@pytest.mark.parametrize("form", ["expressive", "squared"])
def test_the_name_works_wherever_transformers_takes_one(form):
    name = huggingface.IMPLEMENTATIONS[form]
    model, inputs = build("llama"), inputs_of("llama")
    by_name = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation=name).double().eval()
    by_name.load_state_dict(model.state_dict())
    convert(model, form=form)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], by_name(**inputs)[0])
        by_name.set_attn_implementation("sdpa")
        assert not torch.allclose(model(**inputs)[0], by_name(**inputs)[0], atol=1e-3)
        by_name.set_attn_implementation(name)
        assert torch.equal(model(**inputs)[0], by_name(**inputs)[0])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Gemma2ForCausalLM", LLAMA, r"^Gemma2Attention asks for a soft cap of the scores \(softcap\)"),
        (
            "GptOssForCausalLM",
            {**LLAMA, "num_local_experts": 4},
            r"^GptOssAttention asks for attention sinks \(s_aux\)",
        ),
    ],
)
def test_what_expressive_attention_does_not_define_is_an_error(name, options, words):
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**options)).eval()
    with pytest.raises(NotImplementedError, match=words):
        convert(model).verify(**inputs_of("llama"))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "head_mask"])
def test_what_a_layer_is_given_beyond_the_definition_is_named(name):
    layer, qkv = build("llama").model.layers[0].self_attn, torch.randn(3, 3, 4, 9, 4)
    with pytest.raises(NotImplementedError, match=rf"^LlamaAttention asks for .* \({name}\), which EA does not define"):
        huggingface._attention("expressive", layer, *qkv, None, **{name: torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4}, "BloomAttention"),
        ("MptForCausalLM", {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 4}, "MptAttention"),
    ],
)
def test_models_that_take_the_name_and_run_softmax_are_refused(name, options, layer):
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**options)).eval()
    with pytest.raises(
        ConversionError, match=rf"2 of 2 attention layers cannot be switched: .*\({layer}\): it computes"
    ):
        convert(model)


def test_a_mask_of_a_wrong_kind_is_named():
    model = build("llama")
    convert(model)
    layer = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"attention_mask must be broadcastable to \(B, H, L, S\), got \(3, 9\)"):
        huggingface._attention("expressive", layer, *torch.randn(3, 3, 4, 9, 4), torch.ones(3, 9))
    with pytest.raises(ValueError, match=r"attn_mask must .* torch\.int64"):
        huggingface._attention(
            "expressive", layer, *torch.randn(3, 3, 4, 9, 4), torch.ones(3, 1, 9, 9, dtype=torch.int64)
        )


def test_compile_and_export():
    model, ids = build("llama", torch.float32), torch.randint(1, 64, (2, 9))
    convert(model)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        if OLDEST:  # which does not export such a model of transformers, switched or not
            return
        exported = torch.export.export(model, (ids,), {"use_cache": False})
        torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = build("llama"), torch.randint(1, 64, (2, 9))
    convert(model)
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.skipif(not NEW, reason="in transformers 4, BERT goes through no interface")
def test_parts_of_a_model_get_back_what_each_had():
    config = build("bert").config
    model = transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, copy.deepcopy(config))
    )
    model.encoder.set_attn_implementation("eager")
    model.eval()
    before = [part.config._attn_implementation for part in (model, model.encoder, model.decoder)]
    assert len(set(before)) == 2
    inputs = {"input_ids": torch.randint(1, 64, (2, 6)), "decoder_input_ids": torch.randint(1, 64, (2, 4))}
    with torch.no_grad():
        wanted = model(**inputs).logits
    conversion = convert(model)
    assert str(conversion.verify(**inputs)) == "EA ran in 6/6 layers"
    conversion.undo()
    assert [part.config._attn_implementation for part in (model, model.encoder, model.decoder)] == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.skipif(not NEW, reason="in transformers 4, X-CLIP also has attention that convert refuses")
def test_layers_with_a_configuration_that_the_model_does_not_know_are_switched(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**small, "vocab_size": 64, "max_position_embeddings": 16, "pad_token_id": 0}
    vision = {**small, "image_size": 8, "patch_size": 4, "num_frames": 2, "mit_hidden_size": 16,
              "mit_num_hidden_layers": 1, "mit_intermediate_size": 32, "mit_num_attention_heads": 4}  # fmt: skip
    config = transformers.XCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.XCLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    inputs = {"input_ids": torch.randint(1, 64, (1, 5)), "pixel_values": torch.randn(1, 2, 3, 8, 8)}
    with torch.no_grad():
        before = model(**inputs).logits_per_video
        conversion = convert(model)  # and in mit, whose configuration is made of that of the vision model
        assert "mit.encoder.layers.0.self_attn" in conversion.verify(**inputs).calls
        found = model(**inputs).logits_per_video
        assert (found - before).abs() > 1e-2
        model.save_pretrained(tmp_path)
        for again in (AutoModel.from_pretrained(tmp_path), huggingface.from_pretrained(AutoModel, tmp_path)):
            huggingface.check(again)
            torch.testing.assert_close(again(**inputs).logits_per_video, found, rtol=1e-4, atol=1e-4)
        conversion.undo()
        assert torch.equal(model(**inputs).logits_per_video, before)


def test_a_model_inside_of_a_module_is_found():
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = AutoModel.from_config(build("bert").config)

        def forward(self, **inputs):
            return self.body(**inputs)[0]

    conversion = convert(Holder())
    assert str(conversion.verify(**inputs_of("bert"))) == "EA ran in 2/2 layers"


def calls_of(function, text):
    """The calls of a function in a source, without parsing all of it, which takes a minute for all models."""
    for match in re.finditer(rf"\b{function}\(", text):
        ends = (found.end() for found in re.finditer(r"\)", text[match.start() :]))
        for end in ends:
            with suppress(SyntaxError):
                yield ast.parse(text[match.start() : match.start() + end], mode="eval").body
                break


def test_every_argument_that_models_give_to_attention_is_known():
    # Arguments that it may not leave out, those that it reads, and those that say nothing about weights, or say it in
    # the mask, too.
    read = {"attention_mask", "dropout", "scaling", "is_causal", "position_bias", "output_attentions", "sliding_window"}
    read |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"}
    read |= {"indices", "block_indices"} if NEW else set()
    idle = {"deterministic", "query", "key", "value"}
    given = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for call in calls_of("attention_interface", path.read_text(encoding="utf-8")):
            given |= {keyword.arg for keyword in call.keywords}
    assert given >= (read if NEW else read - {"position_bias"})
    assert given - read - idle - {None} <= set(huggingface._UNDEFINED)


# Modeling files that ask for an implementation by its name, and what becomes of it under ours.
NAMED = {
    "decision_transformer": "eager alone, for scores in float32",
    "diffusion_gemma": "whether masks can be made, as they can",
    "falcon": "sdpa alone; convert replaces torch's attention in its layers and leaves the name",
    "gemma4": "sdpa alone, not to cut queries where there is no mask; queries fewer than keys are the last ones here",
    "gemma4_unified": "as gemma4",
    "glm5_next": "sdpa alone, for a bool mask; a mask of floats means the same here",
    "gpt2": "eager alone, for scores in float32",
    "qwen2_5_omni": "eager alone, which it refuses",
    "timm_backbone": "eager alone, to return weights",
    "timm_wrapper": "eager alone, to return weights",
    # A mask of chosen keys is made for eager and sdpa alone; here it is made of the indices.
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4", "hy_v4_vl"), "indices"),
    **dict.fromkeys(("minimax_m3_vl", "mistral_large4"), "indices"),
    # A transformers 4 model: the name is asked for to warn, or to choose among classes of layers, which convert reads.
    "t5gemma": "eager alone, to warn",
}


def asks_by_name(tree):
    """Whether code compares a name of an implementation to a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = any("attn_implementation" in ast.unparse(side) for side in sides)
            parts = [part for side in sides for part in ast.walk(side)]
            if names and any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts):
                return True
    return False


# Text that a file must contain for `asks_by_name`: most do not, and parsing all of them takes long.
COMPARED = re.compile(
    r"attn_implementation[\s\S]{0,100}?(==|!=|\bin\b)|(==|!=|\bin\b)[\s\S]{0,100}?attn_implementation"
)


@pytest.mark.skipif(not NEW, reason="the list is that of transformers 5")
def test_every_model_that_asks_for_an_implementation_by_its_name_is_known():
    folder, found = Path(transformers.__file__).parent / "models", set()
    for path in folder.glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if COMPARED.search(text) and asks_by_name(ast.parse(text)):
            found.add(path.parent.name)
    assert found <= set(NAMED), f"new in transformers {transformers.__version__}: {sorted(found - set(NAMED))}"


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="needs Gemma 4")
def test_queries_that_a_model_leaves_out_are_not_missed():
    options = {**LLAMA, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 32}
    options |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}  # not 2 GB
    layers = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(**options, layer_types=layers, max_position_embeddings=64)
    model = transformers.Gemma4ForCausalLM(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        model.set_attn_implementation("spelled_out")
        wanted = model(ids, use_cache=False).logits
        model.set_attn_implementation("sdpa")
        convert(model)
        for kept in (1, 3, 0):
            found = model(ids, logits_to_keep=kept, use_cache=False).logits
            torch.testing.assert_close(found, wanted[:, -kept:], rtol=1e-9, atol=1e-9)


def test_keys_that_a_layer_chooses_are_the_ones_it_sees():
    layer, (q, k, v) = build("llama").model.layers[0].self_attn, torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    indices = torch.tensor([[0, 0], [0, 1], [1, 2], [0, 3], [2, 4]]).expand(2, 5, 2)
    keep = torch.zeros(2, 1, 5, 5).scatter(-1, indices[:, None], 1.0)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    found, _ = huggingface._attention("expressive", layer, q, k, v, causal, indices=indices)
    wanted, _ = spelled_out(layer, q, k, v, (keep * causal).log())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


MLA = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 3,
       "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
       "qk_nope_head_dim": 6, "v_head_dim": 5, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 3, "n_group": 1,
       "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}  # fmt: skip

# Models that choose keys for each query. A layer of the second one takes the choice of the layer before it.
CHOOSING = {
    "deepseek_v32": ("DeepseekV32ForCausalLM", MLA),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", {**MLA, "indexer_types": ["full", "shared", "full"]}),
}


def build_choosing(family):
    name, options = CHOOSING[family]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = model_class(model_class.config_class(**options)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def parts_of(model, ids, mask):
    """Logits of a prefill, a second chunk, two tokens and a chunk against a cache."""
    cache, logits, start = transformers.DynamicCache(config=model.config), [], 0
    for size in (3, 3, 1, 1, 1):
        part = slice(start, start + size)
        logits.append(model(ids[:, part], attention_mask=mask[:, : start + size], past_key_values=cache).logits)
        start += size
    return torch.cat(logits, 1)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", CHOOSING)
def test_models_that_choose_keys_see_the_chosen_ones_alone(family, left, monkeypatch):
    model, inputs = build_choosing(family), inputs_of("llama", left)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    seen = mask.bool()
    # Under this name the model makes its mask by itself; under ours the mask comes from what it has chosen.
    monkeypatch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", spelled_out)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        wanted = model(**inputs, use_cache=False).logits, parts_of(model, ids, mask)
        model.set_attn_implementation("sdpa")
        assert not convert(model).verify(**inputs, use_cache=False).softmax
        found = model(**inputs, use_cache=False).logits, parts_of(model, ids, mask)
        for each, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(each[seen], other[seen], rtol=1e-9, atol=1e-9)
        for module in model.modules():
            if hasattr(module, "index_topk"):
                module.index_topk = 64  # every key, of more than three
        assert (model(**inputs, use_cache=False).logits - wanted[0])[seen].abs().max() > 0.1


PACKED = ["llama", "mistral", "gemma"]


@pytest.mark.parametrize("given", [{"use_cache": False}, {"positions": False}, {"output_attentions": True}])
@pytest.mark.parametrize("family", PACKED)
def test_packed_sequences_are_the_sequences_by_themselves(family, given):
    model, ids = build(family), torch.randint(1, 64, (1, 13))
    convert(model)
    starts = torch.tensor([0, 3, 4, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in starts.diff().tolist()])[None]
    options = {key: value for key, value in given.items() if key != "positions"}
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9}
    if given.get("positions", True):
        packed["position_ids"] = positions

    def gradients(parts):
        model.zero_grad()
        logits = torch.cat(parts, 1)
        (logits.sin() * torch.arange(13)[:, None]).sum().backward()
        return logits, [p.grad.clone() for p in model.parameters()]

    pieces = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
    if "position_ids" in packed:
        wanted = gradients([model(ids[:, a:b]).logits for a, b in pieces])
    else:  # rotary positions are relative: only where sequences begin differs
        wanted = gradients([model(ids[:, a:b], position_ids=torch.arange(a, b)[None]).logits for a, b in pieces])
    found = gradients([model(ids, **packed, **options).logits])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-9)  # Gemma norms in float32


def test_packed_sequences_in_both_ways_are_the_same():
    layer = build("llama").model.layers[0].self_attn
    (q,), (k, v) = torch.randn(1, 1, 4, 7, 4).double(), torch.randn(2, 1, 2, 9, 4).double()
    packed = {"cu_seq_lens_q": torch.tensor([0, 3, 7]), "cu_seq_lens_k": torch.tensor([0, 5, 9])}
    found, _ = huggingface._attention("expressive", layer, q, k, v, None, sliding_window=3, **packed)
    keep = torch.zeros(7, 9, dtype=torch.bool)
    for i in range(7):
        for j in range(9):
            place = i + 2  # of both: the last query is at the place of the last key
            keep[i, j] = (i < 3) == (j < 5) and place - 3 < j <= place
    wanted, _ = spelled_out(layer, q, k, v, keep.double().log()[None, None])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    again, _ = huggingface._attention("expressive", layer, q, k, v, keep[None, None], **packed)
    torch.testing.assert_close(again, wanted, rtol=1e-12, atol=1e-12)
