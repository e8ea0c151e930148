"""Time Hugging Face transformers models with expressive attention against the same models with softmax.

    python benchmarks/models.py [--lengths N ...] [--tokens N] [--rounds N] [--threads N] [--only TEXT] [--small]

The model is a GPT-2 with 12 layers, 12 heads, width 768 and random weights, at batch 1, in float32, eager. The script
times the forward pass, a training step (forward, backward, AdamW), and generation of as many tokens as the prompt has.
The rival is ``attn_implementation="sdpa"``, timed in turn in the same process. The last rows compare a forward pass
under `geometry.capture` with one without it, for each model. Before timing, the script verifies that expressive
attention runs in every layer, and compares its logits with those of the reference backend.

Then come training steps with dropout of 0.1 on everything, attention weights included, in float32 and bfloat16: of the
same GPT-2, of a BERT of its size, and of a ViT (224 pixels, patches of 16), at batch 2. The goal is 0.9 of SDPA's time.
"""

from __future__ import annotations

import sys

# This folder goes last: its `operator.py` is named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from expressive_attention.geometry import capture
from expressive_attention.integrations import convert
from timing import paired

DROPOUT = 0.1
GOAL = 0.9  # our time over SDPA's, of a training step with dropout
SHAPES = {"gpt2": (12, 12, 768, 50257), "small": (2, 4, 64, 1000)}


def build(shape: str, positions: int) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """Return a verified model with expressive attention, and its twin with softmax."""
    layers, heads, width, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width, n_positions=positions,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    softmax = GPT2LMHeadModel(config).eval()  # uses sdpa
    assert softmax.config._attn_implementation == "sdpa"
    ours = copy.deepcopy(softmax)
    conversion = convert(ours)
    ids = torch.randint(vocabulary, (1, 64))
    print(conversion.verify(ids))
    with torch.no_grad():
        found = ours(ids).logits
        with mock.patch("expressive_attention.functional.AUTOMATIC", ("reference",)):
            wanted = ours(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    return ours, softmax


def trained_models(small: bool) -> Iterator[tuple[str, Any, dict[str, Tensor]]]:
    """Models in training mode with dropout, and a batch of each."""
    layers, heads, width, vocabulary = SHAPES["small" if small else "gpt2"]
    length, pixels = (64, 32) if small else (512, 224)
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
    sizes |= {"intermediate_size": 4 * width, "hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT}
    ids = torch.randint(vocabulary, (2, length))
    gpt2 = GPT2Config(
        vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width, n_positions=length,
        resid_pdrop=DROPOUT, embd_pdrop=DROPOUT, attn_pdrop=DROPOUT, bos_token_id=0, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    yield "GPT-2", GPT2LMHeadModel(gpt2), {"input_ids": ids, "labels": ids}
    bert = BertConfig(vocab_size=vocabulary, max_position_embeddings=length, **sizes)
    yield "BERT", BertForMaskedLM(bert), {"input_ids": ids, "labels": ids}
    vit = ViTConfig(image_size=pixels, patch_size=16, **sizes)
    images, labels = torch.randn(2, 3, pixels, pixels), torch.tensor([0, 1])
    yield "ViT", ViTForImageClassification(vit), {"pixel_values": images, "labels": labels}


def training_rows(small: bool, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Training steps with dropout: the name, ours and that of SDPA. It verifies that expressive attention runs."""
    for name, softmax, batch in trained_models(small):
        softmax = softmax.to(dtype)
        batch = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
        assert softmax.config._attn_implementation == "sdpa"
        ours = copy.deepcopy(softmax)
        print(f"{name}, {dtype}: {convert(ours).verify(**batch)}")
        steps = [training_step(model.train(), batch) for model in (ours, softmax)]
        yield f"{name}, dropout, {str(dtype).removeprefix('torch.')}", steps[0], steps[1]


def forward(model: GPT2LMHeadModel, ids: Tensor) -> Callable[[], object]:
    """One pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    return run


def captured(model: GPT2LMHeadModel, ids: Tensor) -> Callable[[], object]:
    """One pass without gradients, its attention recorded."""
    plain = forward(model, ids)

    def run() -> None:
        with capture(model):
            plain()

    return run


def training_step(model: Any, batch: dict[str, Tensor]) -> Callable[[], object]:
    """Forward, backward and an optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return run


def generation(model: Any, prompt: Tensor, tokens: int) -> Callable[[], object]:
    """Greedy generation with a cache."""

    def run() -> None:
        mask = torch.ones_like(prompt)
        model.generate(
            prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="lengths of sequences")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the prompt, and to generate")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs per ratio")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--small", action="store_true", help="a model of two layers, to try this script")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, softmax = build("small" if arguments.small else "gpt2", max(*arguments.lengths, 2 * arguments.tokens))
    vocabulary = ours.config.vocab_size
    print(f"torch {torch.__version__}, {arguments.threads} threads; time of EA / time of sdpa, median (least to most)")
    rows = []
    for length in arguments.lengths:
        ids = torch.randint(vocabulary, (1, length))
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
        rows.append((f"forward, L = {length}", *(forward(model, ids) for model in (ours, softmax))))
        rows.append((f"training step, L = {length}", *(training_step(model, batch) for model in (ours, softmax))))
    prompt = torch.randint(vocabulary, (1, arguments.tokens))
    both = (generation(model, prompt, arguments.tokens) for model in (ours, softmax))
    rows.append((f"generate {arguments.tokens} tokens after {arguments.tokens}", *both))
    longest = torch.randint(vocabulary, (1, max(arguments.lengths)))
    for name, model in (("EA", ours), ("sdpa", softmax)):
        rows.append((f"{name} captured, L = {longest.numel()}", captured(model, longest), forward(model, longest)))
    for name, mine, rival in rows:
        if arguments.only not in name:
            continue
        ratio = paired(rival, mine, arguments.rounds)  # rival first: the ratio is our time over its time
        print(f"{name:34} {ratio}   {ratio.rival:.3f} s, {ratio.ours:.3f} s", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        for name, mine, rival in training_rows(arguments.small, dtype):
            if arguments.only not in name:
                continue
            ratio = paired(rival, mine, arguments.rounds)
            verdict = f"<= {GOAL} {'met' if ratio.median <= GOAL else 'missed'}"
            print(f"{name:34} {ratio}   {ratio.rival:.3f} s, {ratio.ours:.3f} s  {verdict}", flush=True)


if __name__ == "__main__":
    main()
