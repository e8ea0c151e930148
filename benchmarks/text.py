"""Text with a long context: small language models of five kinds of attention, trained and judged alike.

    python benchmarks/text.py [--context N] [--steps N] [--seeds N] [--window N] [--kinds KIND ...] [--json FILE]

The text is Python's own sources, byte by byte; every tenth file is held out. All kinds have the same model (rotary
positions, a learned decay for each head, two layers), texts, seeds, rate and number of steps; only attention differs:
EA of all keys, EA within a window, the squared form, near and far, and softmax. Printed are bits per byte of held-out
texts, over all positions and over those of the last quarter, which have the most context, for each seed.

The defaults take about an hour of a core.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expressive_attention.nn import Transformer
from kinds import KINDS, model_of, train
from sources import sources, spread

_TESTED = 64  # texts


def losses(model: Transformer, tokens: Tensor) -> Tensor:
    """Cross-entropy ``(N, L)`` in bits of tokens ``(N, L + 1)``."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1) / (
        math.log(2)
    )


def judged(model: Transformer, tokens: Tensor) -> tuple[float, float]:
    """Bits per byte of texts ``(N, L + 1)``: of all positions, and of the last quarter."""
    with torch.no_grad():
        bits = torch.cat([losses(model, part) for part in tokens.split(4)])
    return float(bits.mean()), float(bits[:, -(bits.shape[1] // 4) :].mean())


def trained(kind: str, seed: int, text: Tensor, arguments: argparse.Namespace) -> Transformer:
    """A model of one kind; models of a seed read the same texts."""
    model = model_of(
        kind, seed, arguments.window, vocab_size=256, max_length=arguments.context, embed_dim=arguments.embed_dim,
        num_layers=2, num_heads=arguments.heads, position="rope+learned_alibi",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def loss_at(_: int) -> Tensor:
        starts = torch.randint(len(text) - arguments.context, (arguments.batch, 1), generator=generator)
        return losses(model, text[starts + torch.arange(arguments.context + 1)]).mean()

    train(model, arguments.steps, arguments.rate, loss_at)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("context", 2048, "bytes that the last position sees"),
        ("window", 128, "near keys, of near and far and of EA in a window"),
        ("steps", 400, "of training"),
        ("seeds", 2, "models of each kind"),
        ("batch", 4, "texts of a step"),
        ("embed-dim", 128, "width of the models"),
        ("heads", 2, "of a layer"),
        ("threads", 1, "of torch"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--rate", type=float, default=4e-3, help="largest learning rate")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    for name in ("context", "window", "steps", "seeds", "batch", "embed_dim", "heads", "threads"):
        least = 4 if name == "context" else 1
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    torch.set_num_threads(arguments.threads)
    training, held_out = sources()
    tested = spread(held_out, _TESTED, arguments.context + 1)
    print(f"context {arguments.context}, {arguments.steps} steps, window {arguments.window}; bits per byte, held out")
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in arguments.kinds}
    for seed in range(arguments.seeds):  # all kinds of a seed, so that a run that is stopped has pairs
        for kind in arguments.kinds:
            start = time.perf_counter()
            model = trained(kind, seed, training, arguments)
            found[kind].append(judged(model, tested))
            whole, last = found[kind][-1]
            taken = time.perf_counter() - start
            print(f"seed {seed}  {kind:15} {whole:.3f}  last quarter {last:.3f}  {taken:5.0f} s", flush=True)
    for kind, bits in found.items():
        whole, last = np.mean(bits, axis=0)
        print(f"{kind:15} mean {whole:.3f}  last quarter {last:.3f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"bits": found, "arguments": vars(arguments)}, indent=1))


if __name__ == "__main__":
    main()
