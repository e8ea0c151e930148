"""Train a small language model with expressive attention, then run it in linear time: its loss before and after.

    python examples/linearize.py [--steps N] [--gain G] [--tolerance T]

The model reads Python's own sources, byte by byte, as in `train_text.py`; with the default of 60 steps it takes about a
minute, and has learned little. Loss is in bits per byte, on files held out.

A factor on all scores that is small, and not trained, keeps the model where z^2 / (1 + z^2) is z^2: attention does not
change with the factor there. With ``--gain 1`` scores are of the usual size, and layers may be left alone.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from expressive_attention.integrations import linearize
from expressive_attention.nn import SquaredCache, Transformer

LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--gain", type=float, default=1e-3, help="factor on all scores")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="bound of z^2 in the layers that are switched")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    files = sorted(Path(argparse.__file__).parent.glob("*.py"))  # the standard library
    held_out = files[::10]
    training, validation = (
        torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in part)), dtype=torch.uint8).long()
        for part in (sorted(set(files) - set(held_out)), held_out)
    )

    def batch(text: torch.Tensor, count: int) -> torch.Tensor:
        return text[torch.randint(len(text) - LENGTH - 1, (count, 1)) + torch.arange(LENGTH + 1)]

    options = {"position": "rope", "gain": True, "initial_gain": arguments.gain}
    model = Transformer(256, LENGTH, embed_dim=128, num_layers=2, num_heads=2, **options)
    for block in model.blocks:
        block.attention.gain.requires_grad_(False)
    optimizer = torch.optim.AdamW((x for x in model.parameters() if x.requires_grad), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=arguments.steps)
    for _ in range(arguments.steps):
        loss = _loss(model, batch(training, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval()
    measured, judged = batch(training, 64), batch(validation, 64)
    with torch.no_grad():
        print(f"loss with f(z) = z²/(1 + z²): {_loss(model, judged) / math.log(2):.4f} bits per byte, held out")
        linearization = linearize(model, measured[:, :-1].split(16), tolerance=arguments.tolerance)
        print(linearization)
        print(f"loss after the switch: {_loss(model, judged) / math.log(2):.4f}")
    if linearization.switched:
        print(linearization.verify(judged[:1, :-1]))
    caches = [block.attention.new_cache(1 << 20) for block in model.blocks]
    kept = sum(isinstance(cache, SquaredCache) for cache in caches)
    print(f"for a million tokens, {kept} of {len(caches)} layers keep a state of constant size")


def _loss(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


if __name__ == "__main__":
    main()
