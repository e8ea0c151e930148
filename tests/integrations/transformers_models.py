"""Tiny models of transformers, randomly initialized."""

import torch
import transformers

NEW = int(transformers.__version__.split(".")[0]) >= 5

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {
    **SMALL,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 16,
       "patch_size": 4}  # fmt: skip

# Model class, configuration, and layers of attention.
FAMILIES = {
    "bert": ("BertModel", SMALL, 2),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 64}, 2),
    "llama": ("LlamaForCausalLM", LLAMA, 2),
    "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 4}, 2),
    "gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 6}, 2),
    "t5": ("T5ForConditionalGeneration", T5, 6),
    "bart": ("BartForConditionalGeneration", BART, 6),
    "vit": ("ViTModel", VIT, 2),
}
DECODERS = ["gpt2", "llama", "mistral", "gemma"]
if not NEW:
    del FAMILIES["t5"]  # its softmax is its own in transformers 4


def build(family, dtype=torch.float64):
    name, options, _ = FAMILIES[family]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**options)).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)  # as they are made, scores are too small to tell anything
    return model


def inputs_of(family, left=False):
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    ids, mask = torch.randint(1, 64, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = 0 if left else 1
    mask[2, -3:] = 1 if left else 0
    found = {"input_ids": ids, "attention_mask": mask}
    if family in ("t5", "bart"):
        found["decoder_input_ids"] = torch.randint(1, 64, (3, 5))
    return found
