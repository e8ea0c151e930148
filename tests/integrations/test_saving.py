import copy
import re

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")

from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM  # noqa: E402

from expressive_attention.integrations import ConversionError, calibrate, convert, huggingface  # noqa: E402

from .transformers_models import NEW, VIT, build, inputs_of  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")]


def test_the_choice_is_saved_and_restored(tmp_path):
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    convert(model)
    model.save_pretrained(tmp_path)
    again = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "expressive"
    huggingface.check(plain)
    config = type(model.config).from_pretrained(tmp_path)
    assert config._attn_implementation == "expressive"
    config = type(model.config).from_pretrained(tmp_path, attn_implementation="eager")
    assert config._attn_implementation == "eager"  # what is asked for goes before what was saved
    # Without this package: nothing is registered under that name.
    if NEW:
        kept = AttentionInterface._global_mapping.pop("expressive")
        try:
            with pytest.raises(ValueError, match='attn_implementation="expressive"` is not supported'):
                AutoModelForCausalLM.from_pretrained(tmp_path)
        finally:
            AttentionInterface._global_mapping["expressive"] = kept


def test_a_state_dict_without_numbers_is_taken():
    """As of loaders that first bring a model into shape."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    convert(layer)
    shapes = {name: x.to("meta") for name, x in layer.state_dict().items()}
    assert any(name.endswith("expressive_attention_form") for name in shapes)
    layer.load_state_dict(shapes, assign=True)
    assert layer.linear1.weight.is_meta


def left_out(model):
    """The layers whose entries in the state dict transformers does not save."""
    entry = ".expressive_attention_form"
    return sorted(x.removesuffix(entry) for x in model._keys_to_ignore_on_save or () if x.endswith(entry))


def test_an_undone_choice_is_not_saved(tmp_path):
    model = build("llama", torch.float32)
    conversion = convert(model)
    assert left_out(model) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    conversion.undo()
    assert left_out(model) == []
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()


def test_single_layers_can_be_switched_saved_and_restored(tmp_path):
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    with torch.no_grad():
        softmax = model(**inputs)[0]
    conversion = convert(model, layers="model.layers.1.*")
    found = conversion.verify(**inputs)
    assert found.calls == {"model.layers.1.self_attn": 1}
    assert found.softmax == {"model.layers.0.self_attn": 1}
    model.save_pretrained(tmp_path)
    again = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    if NEW:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(
            ConversionError, match=r"in some of its layers; load it with .*huggingface\.from_pretrained"
        ):
            plain(**inputs)
    conversion.undo()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], softmax)


def test_two_forms_in_one_model_are_saved_and_restored(tmp_path):
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    first = convert(model, layers="model.layers.0.*")
    second = convert(model, layers="model.layers.1.*", form="squared")
    model.save_pretrained(tmp_path)
    again = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path)
    forms = {"expressive": ["model.layers.0.self_attn"], "squared": ["model.layers.1.self_attn"]}
    assert again.config.expressive_attention == forms
    huggingface.check(again)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    second.undo()
    assert model.config.expressive_attention == {"expressive": ["model.layers.0.self_attn"]}
    first.undo()
    assert not hasattr(model.config, "expressive_attention")


def test_layers_switched_one_by_one_are_a_whole(tmp_path):
    model = build("llama", torch.float32)
    for layer in (0, 1):
        convert(model, layers=f"model.layers.{layer}.self_attn")
    assert model.config.expressive_attention == {"expressive": None}
    assert model.config.attn_implementation == "expressive"


def siglip():
    """Its layers go through the attention interface, its pooling head is `torch.nn.MultiheadAttention`."""
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT)).eval()


def test_layers_of_several_kinds_are_saved_and_restored(tmp_path):
    model, image = siglip(), torch.randn(2, 3, 16, 16)
    conversion = convert(model)
    assert len({layer.how for layer in conversion.switched}) == 2
    model.save_pretrained(tmp_path)
    again = huggingface.from_pretrained(transformers.SiglipVisionModel, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(image).pooler_output, model(image).pooler_output)
    if NEW:  # it could restore the first kind alone, and would leave softmax in the head
        plain = transformers.SiglipVisionModel.from_pretrained(tmp_path)
        with pytest.raises(ConversionError, match=r"huggingface\.from_pretrained"):
            plain(image)
    conversion.undo()
    assert not hasattr(model.config, "expressive_attention")


def test_a_model_inside_of_another_module_is_saved_and_restored(tmp_path):
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    convert(nn.ModuleDict({"encoder": model, "head": nn.Linear(2, 2)}), layers="encoder.model.layers.1.*")
    assert model.config.expressive_attention == {"expressive": ["model.layers.1.self_attn"]}
    model.save_pretrained(tmp_path)
    again = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("shards", [1, 4])
def test_gains_are_saved_and_restored(shards, tmp_path):
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    calibrate(convert(model), [inputs])
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 1)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    again = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    assert all(parameter.requires_grad for parameter in again.parameters())
    half = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    # Without its head.
    base = huggingface.from_pretrained(AutoModel, tmp_path)
    with torch.no_grad():
        assert torch.equal(base(**inputs)[0], model.model(**inputs)[0])


def test_the_loader_tells_what_it_loaded_where_asked(tmp_path):
    model = build("llama", torch.float32)
    convert(model)
    model.save_pretrained(tmp_path)
    again, told = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path, output_loading_info=True)
    huggingface.check(again)
    assert not told["missing_keys"]


def test_a_change_behind_the_record_is_found():
    model = build("llama", torch.float32)
    convert(model)
    huggingface.check(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConversionError, match=re.escape("in all layers and has it in no layer")):
        huggingface.check(model)
    convert(copy.deepcopy(model), form="squared")
    assert model.config.expressive_attention == {"expressive": None}


def loaded_by(load, model, folder):
    model.save_pretrained(folder)
    found = load(folder)
    huggingface.check(found)
    return found


@pytest.mark.parametrize(
    "load", [AutoModelForCausalLM.from_pretrained, lambda f: huggingface.from_pretrained(AutoModelForCausalLM, f)]
)
@pytest.mark.parametrize("how", ["convert", "name", "set"])
@pytest.mark.parametrize("form", ["expressive", "squared"])
def test_the_choice_survives_any_number_of_saves(load, how, form, tmp_path):
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    name = huggingface.IMPLEMENTATIONS[form]
    if how == "name":
        plain, model = model, AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation=name)
        model.load_state_dict(plain.state_dict())
    elif how == "set":
        model.set_attn_implementation(name)
    else:
        convert(model, form=form)
    model.eval()
    again = loaded_by(load, loaded_by(load, loaded_by(load, model, tmp_path / "1"), tmp_path / "2"), tmp_path / "3")
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
        model.config._attn_implementation = "sdpa"
    assert again.config._attn_implementation == name
    assert "attn_implementation" not in model.config.to_dict() or how == "convert"


def test_the_choice_survives_fine_tuning_with_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    convert(model)
    model.save_pretrained(tmp_path / "1")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    merged = peft.get_peft_model(loaded, config).merge_and_unload()
    merged.save_pretrained(tmp_path / "2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "2").eval()
    huggingface.check(again)
    model.load_state_dict(merged.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0])


def test_models_inside_of_models_keep_the_choice(tmp_path):
    text = {key: value for key, value in build("llama").config.to_dict().items() if key != "attn_implementation"}
    config = transformers.LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", **VIT, "projection_dim": 8}
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    convert(model)
    model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    huggingface.check(again)
    parts = [
        part.config._attn_implementation for part in again.modules() if isinstance(part, transformers.PreTrainedModel)
    ]
    assert set(parts) == {"expressive"}


def test_gains_that_a_loader_leaves_out_are_missed(tmp_path):
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    calibration = calibrate(convert(model), [inputs])
    huggingface.check(model)
    model.save_pretrained(tmp_path / "1")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    with pytest.raises(ConversionError):
        huggingface.check(plain)
    if NEW:
        with pytest.raises(ConversionError, match=r"huggingface\.from_pretrained"):
            plain(**inputs)
    again = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path / "1")
    huggingface.check(again)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    del model.model.layers[0].self_attn.expressive_gain
    with pytest.raises(ConversionError, match=r"gains in model\.layers\.0\.self_attn, .* has them in model\.layers\.1"):
        huggingface.check(model)
    again.save_pretrained(tmp_path / "2")
    huggingface.check(huggingface.from_pretrained(AutoModelForCausalLM, tmp_path / "2"))
    del again.config.expressive_gains  # as of a model to which gains were given by hand
    with pytest.raises(ConversionError, match=r"gains in no layer and has them in model\.layers\.0"):
        huggingface.check(again)
    model = build("llama", torch.float32)
    calibration = calibrate(convert(model), [inputs])
    calibration.undo()
    model.save_pretrained(tmp_path / "3")
    huggingface.check(AutoModelForCausalLM.from_pretrained(tmp_path / "3"))


def test_models_that_take_the_name_and_run_softmax_are_found():
    config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="expressive")
    with pytest.raises(
        ConversionError, match=r"expressive attention, and softmax in transformer\.h\.0\.self_attention"
    ):
        huggingface.check(model)


def test_weights_without_the_model_are_refused_by_softmax():
    model, plain = build("llama"), build("llama")
    convert(model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.self_attn\.expressive_attention_form"):
        plain.load_state_dict(model.state_dict())
    convert(plain).undo()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(model.state_dict())
    other = build("llama")
    conversion = convert(other, form="squared")
    with pytest.raises(RuntimeError, match="saved with the form 'expressive', and the layer has 'squared'"):
        other.load_state_dict(model.state_dict())
    conversion.undo()
    convert(other)
    other.load_state_dict(model.state_dict())
    other.load_state_dict(plain.state_dict())  # of softmax, as what training starts from
    torch.testing.assert_close(other.lm_head.weight, plain.lm_head.weight)
    twin = copy.deepcopy(other)
    assert twin.state_dict().keys() == other.state_dict().keys()
    twin.load_state_dict(other.state_dict())


def test_gains_are_restored_from_files_of_a_variant_or_missed(tmp_path):
    model, inputs = build("llama", torch.float32), inputs_of("llama")
    calibrate(convert(model), [inputs])
    with torch.no_grad():
        expected = model(**inputs)[0]
    for size in ("1GB", "2KB"):
        model.save_pretrained(tmp_path / size, variant="half", max_shard_size=size)
        again = huggingface.from_pretrained(AutoModelForCausalLM, tmp_path / size, variant="half")
        with torch.no_grad():
            assert torch.equal(again(**inputs)[0], expected)
    torch.save(model.state_dict(), tmp_path / "1GB" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"gains in layers\.0\.self_attn, .* not in its files"):
        huggingface.from_pretrained(AutoModelForCausalLM, tmp_path / "1GB")
