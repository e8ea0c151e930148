"""Train a small language model with expressive attention on Python's own sources, and let it write.

    python examples/train_text.py [--steps N]

With the default of 500 steps it takes some minutes on two cores. Loss is in bits per byte, on files held out.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from expressive_attention.nn import Transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    files = sorted(Path(argparse.__file__).parent.glob("*.py"))  # the standard library
    held_out = files[::10]
    training, validation = (
        torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in part)), dtype=torch.uint8).long()
        for part in (sorted(set(files) - set(held_out)), held_out)
    )

    def batch(text: torch.Tensor) -> torch.Tensor:
        starts = torch.randint(len(text) - 129, (32, 1))
        return text[starts + torch.arange(129)]  # (32, 129): 128 bytes, each followed by the next

    # Wide heads and a learned decay with distance suit expressive attention.
    model = Transformer(256, 128, embed_dim=128, num_layers=2, num_heads=2, position="rope+learned_alibi")
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(1, steps + 1):
        tokens = batch(training)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                tokens = batch(validation)
                held = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            print(f"step {step}: {loss.item() / math.log(2):.2f} bits, held out {held.item() / math.log(2):.2f}")

    prompt = torch.tensor(list(b"def main("))
    written = model.eval().generate(prompt, 200, temperature=0.7)
    print(bytes(written.tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
