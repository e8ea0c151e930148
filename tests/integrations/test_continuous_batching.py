"""Continuous batching of transformers computes what generating one sequence after the other does."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 has it for CUDA alone", allow_module_level=True)

import expressive_attention.integrations.huggingface as huggingface  # noqa: E402
from expressive_attention.integrations import calibrate, convert  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


def built(kind):
    if kind == "grouped":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, **WINDOW))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def generated(model, prompts, together):
    """New tokens; together, in pages of 4 and at most 16 tokens a pass, so that a prompt of 20 comes in pieces."""
    how = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    if not together:
        return [model.generate(torch.tensor([p]), generation_config=how)[0, len(p) :].tolist() for p in prompts]
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    pages = ContinuousBatchingConfig(num_blocks=64, page_size=4, max_batch_tokens=16)
    found = model.generate_batch(prompts, generation_config=how, continuous_batching_config=pages)
    return [found[name].generated_tokens for name in sorted(found)]


@pytest.mark.parametrize("layers", [None, "model.layers.1.*"])
@pytest.mark.parametrize("kind", ["grouped", "window"])
def test_sequences_together_and_one_by_one_are_the_same(kind, layers):
    model = built(kind)
    model.generation_config.eos_token_id = None
    prompts = [torch.randint(1, 64, (length,)).tolist() for length in (5, 11, 3, 20)]
    softmax = generated(model, prompts, together=False)
    conversion = convert(model, layers=layers)
    calibrate(conversion, [torch.tensor([prompts[3]])])
    wanted = generated(model, prompts, together=False)
    assert generated(model, prompts, together=True) == wanted
    assert wanted != softmax
    huggingface.check(model)
    conversion.undo()
    assert generated(model, prompts, together=True) == softmax
