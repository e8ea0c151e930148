"""Recall at a distance: small models that are trained on multi-query associative recall, by five kinds of attention.

    python benchmarks/recall.py [--pairs N] [--steps N] [--seeds N] [--window N] [--kinds KIND ...] [--json FILE]

Pairs of key and value come first, and each key is asked for again later (`study.tasks`, ``mqar``). All kinds have the
same model, examples, seeds, rate and number of steps; only attention differs: EA of all keys, EA within a window, the
squared form, near and far, and softmax. A position reads its token and the one before, as from a convolution of width
two: to learn which token came before takes longer than all the rest, and is not the question. The number of pairs
grows to `--pairs` in the first half of the training, for all kinds alike. Printed is the share of values that are
recalled, on examples of the full number of pairs that were not trained on, for each seed.

The defaults take some three minutes of a core. For many pairs, in some hours:

    python benchmarks/recall.py --pairs 256 --vocab 1024 --steps 4000 --embed-dim 128
    python benchmarks/recall.py --pairs 1024 --vocab 4096 --steps 10000 --embed-dim 256 --tokens 8192
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expressive_attention import expressive_attention
from expressive_attention.nn import SelfAttention, Transformer
from expressive_attention.study.tasks.base import IGNORED
from expressive_attention.study.tasks.recall.mqar import MQARTask

KINDS = ("EA", "EA in a window", "squared", "near and far", "softmax")
_TESTED = 256  # examples, from their own stream


class Windowed(SelfAttention):
    """EA of the last `window` keys alone."""

    window: int

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = self.heads(x)
        y = expressive_attention(q, k, v, is_causal=True, window_size=(self.window - 1, -1))
        return self.out(y.transpose(-3, -2).flatten(-2))


def model_of(kind: str, seed: int, arguments: argparse.Namespace) -> Transformer:
    """The model of one kind; those of a seed start with the same parameters."""
    torch.manual_seed(seed)
    mechanism = {"squared": "squared", "softmax": "dot_product"}.get(kind, "expressive")
    window = arguments.window if kind == "near and far" else None
    model = Transformer(
        arguments.vocab, 4 * arguments.pairs, arguments.embed_dim, arguments.layers, arguments.heads, mechanism,
        position="none", gain=True, window=window, mlp_ratio=2, input_dim=2 * arguments.vocab,
    )  # fmt: skip
    if kind == "EA in a window":
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.__class__ = Windowed
                module.window = arguments.window
    return model


def examples(pairs: int, count: int, arguments: argparse.Namespace, stream: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``(count, 4 pairs)``."""
    task = MQARTask(pairs=pairs, vocab=arguments.vocab)
    drawn = task.draw(np.random.Philox(np.random.SeedSequence(list(stream))), count)
    return torch.from_numpy(drawn.inputs), torch.from_numpy(drawn.targets)


def with_earlier(inputs: Tensor, vocab: int) -> Tensor:
    """Tokens ``(count, L)`` and those before them, as vectors ``(count, L, 2 vocab)``; 0 comes before the first."""
    both = torch.stack([inputs, F.pad(inputs[:, :-1], (1, 0))], -1)
    return F.one_hot(both, vocab).flatten(-2).float()


def pairs_at(step: int, arguments: argparse.Namespace) -> int:
    """Doubled from 4 in equal parts of the first half, and `--pairs` in the second one."""
    doublings = max(0, math.ceil(math.log2(arguments.pairs / 4)))
    done = int(2 * step / arguments.steps * doublings) if doublings else 0
    return min(arguments.pairs, 4 << min(done, doublings))


def recalled(model: Transformer, arguments: argparse.Namespace) -> float:
    """The share of asked values that are the most likely token."""
    inputs, targets = examples(arguments.pairs, _TESTED, arguments, (1, 0))
    with torch.no_grad():
        found = torch.cat([model(with_earlier(part, arguments.vocab)).argmax(-1) for part in inputs.split(64)])
    asked = targets != IGNORED
    return float((found == targets)[asked].float().mean())


def train(kind: str, seed: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """The share that is recalled after training, and the seconds that it took."""
    model = model_of(kind, seed, arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.0)
    warm = max(1, arguments.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * n / arguments.steps))
    )
    start = time.perf_counter()
    for step in range(arguments.steps):
        pairs = pairs_at(step, arguments)
        count = max(1, arguments.tokens // (4 * pairs))  # of the same number of tokens at any length
        inputs, targets = examples(pairs, count, arguments, (0, seed, step))
        asked = targets != IGNORED
        loss = F.cross_entropy(model(with_earlier(inputs, arguments.vocab))[asked], targets[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return recalled(model, arguments), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("pairs", 64, "pairs of key and value"),
        ("vocab", 256, "tokens, even, at least 2 (pairs + 1)"),
        ("window", 16, "near keys, of near and far and of EA in a window"),
        ("steps", 400, "of training"),
        ("seeds", 3, "models of each kind"),
        ("tokens", 2048, "of a step"),
        ("embed-dim", 64, "width of the models"),
        ("layers", 1, "of the models"),
        ("heads", 2, "of a layer"),
        ("threads", 1, "of torch"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    for name in ("pairs", "window", "steps", "seeds", "tokens", "embed_dim", "layers", "heads", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.pairs} pairs, {4 * arguments.pairs} tokens, {arguments.steps} steps, window {arguments.window}")
    print(f"chance: {2 / arguments.vocab:.1%}; a value of the sequence at random: {1 / arguments.pairs:.1%}")
    found: dict[str, list[float]] = {kind: [] for kind in arguments.kinds}
    for seed in range(arguments.seeds):  # all kinds of a seed, so that a run that is stopped has pairs
        for kind in arguments.kinds:
            share, taken = train(kind, seed, arguments)
            found[kind].append(share)
            print(f"seed {seed}  {kind:15} {share:6.1%}  {taken:5.0f} s", flush=True)
    for kind, shares in found.items():
        print(f"{kind:15} mean {np.mean(shares):6.1%}  " + "  ".join(f"{share:6.1%}" for share in shares))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"recalled": found, "arguments": vars(arguments)}, indent=1))


if __name__ == "__main__":
    main()
