"""A model of Hugging Face transformers with expressive attention: convert, verify, generate, save and load.

    pip install '.[huggingface]'
    python examples/convert_huggingface.py

The model is small and untrained, so nothing is downloaded; a model of `from_pretrained` works in the same way.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from expressive_attention.integrations import convert
from expressive_attention.integrations.huggingface import from_pretrained


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(256, (1, 8))

    conversion = convert(model)
    print(conversion)
    print(conversion.verify(prompt))

    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    print(f"generated: {generated[0, 8:].tolist()}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = from_pretrained(AutoModelForCausalLM, folder).eval()
    with torch.no_grad():
        print(f"saved and loaded, the same logits: {torch.equal(again(prompt).logits, model(prompt).logits)}")


if __name__ == "__main__":
    main()
