"""Recall at a distance: small models that are trained on multi-query associative recall, by five kinds of attention.

    python benchmarks/recall.py [--pairs N] [--steps N] [--seeds N] [--window N] [--kinds KIND ...] [--json FILE]

Pairs of key and value come first, and each key is asked for again later (`study.tasks`, ``mqar``). All kinds have the
same model, examples, seeds, rate and number of steps; only attention differs: EA of all keys, EA within a window, the
squared form, near and far, and softmax. A position reads its token and the one before, as from a convolution of width
two: to learn which token came before takes longer than all the rest, and is not the question. The number of pairs
grows to `--pairs` in the first half of the training, for all kinds alike. Printed is the share of values that are
recalled, on examples of the full number of pairs that were not trained on, for each seed.

The defaults take some three minutes of a core. More pairs take a quarter of an hour, and about an hour, for one seed:

    python benchmarks/recall.py --pairs 256 --vocab 1024 --steps 1000 --tokens 4096 --embed-dim 128 --seeds 1
    python benchmarks/recall.py --pairs 1024 --vocab 4096 --steps 600 --tokens 8192 --embed-dim 128 --seeds 1
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expressive_attention.nn import Transformer
from expressive_attention.study.tasks.base import IGNORED
from expressive_attention.study.tasks.recall.mqar import MQARTask
from kinds import KINDS, model_of, train

_TESTED = 256  # examples, from their own stream


class TokenAndEarlier(nn.Module):
    """The sum of a vector of the token and one of the token before it, as from a convolution of width two."""

    def __init__(self, token: nn.Embedding) -> None:
        super().__init__()
        self.token, self.earlier = token, copy.deepcopy(token)
        nn.init.normal_(self.earlier.weight, std=float(token.weight.detach().std()))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.earlier(F.pad(tokens[..., :-1], (1, 0)))  # 0 comes before the first


def examples(pairs: int, count: int, arguments: argparse.Namespace, stream: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``(count, 4 pairs)``."""
    task = MQARTask(pairs=pairs, vocab=arguments.vocab)
    drawn = task.draw(np.random.Philox(np.random.SeedSequence(list(stream))), count)
    return torch.from_numpy(drawn.inputs), torch.from_numpy(drawn.targets)


def pairs_at(step: int, arguments: argparse.Namespace) -> int:
    """Doubled from 4 in equal parts of the first half, and `--pairs` in the second one."""
    doublings = max(0, math.ceil(math.log2(arguments.pairs / 4)))
    done = int(2 * step / arguments.steps * doublings) if doublings else 0
    return min(arguments.pairs, 4 << min(done, doublings))


def recalled(model: Transformer, arguments: argparse.Namespace) -> float:
    """The share of asked values that are the most likely token."""
    inputs, targets = examples(arguments.pairs, _TESTED, arguments, (1, 0))
    with torch.no_grad():
        found = torch.cat([model(part).argmax(-1) for part in inputs.split(max(1, 16384 // inputs.shape[1]))])
    asked = targets != IGNORED
    return float((found == targets)[asked].float().mean())


def trained(kind: str, seed: int, arguments: argparse.Namespace) -> Transformer:
    """A model of one kind; models of a seed see the same examples."""
    model = model_of(
        kind, seed, arguments.window, vocab_size=arguments.vocab, max_length=4 * arguments.pairs,
        embed_dim=arguments.embed_dim, num_layers=arguments.layers, num_heads=arguments.heads, position="none",
        gain=True, mlp_ratio=2, embedding_std=0.05,
    )  # fmt: skip
    model.embedding = cast(nn.Embedding, TokenAndEarlier(cast(nn.Embedding, model.embedding)))

    def loss_at(step: int) -> Tensor:
        pairs = pairs_at(step, arguments)
        count = max(1, arguments.tokens // (4 * pairs))  # of the same number of tokens at any length
        inputs, targets = examples(pairs, count, arguments, (0, seed, step))
        asked = targets != IGNORED
        return F.cross_entropy(model(inputs)[asked], targets[asked])

    train(model, arguments.steps, arguments.rate, loss_at)
    return model.eval()


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
            start = time.perf_counter()
            share = recalled(trained(kind, seed, arguments), arguments)
            found[kind].append(share)
            print(f"seed {seed}  {kind:15} {share:6.1%}  {time.perf_counter() - start:5.0f} s", flush=True)
    for kind, shares in found.items():
        print(f"{kind:15} mean {np.mean(shares):6.1%}  " + "  ".join(f"{share:6.1%}" for share in shares))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"recalled": found, "arguments": vars(arguments)}, indent=1))


if __name__ == "__main__":
    main()
