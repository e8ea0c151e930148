"""Training seeds together against one after the other, on the quick preset's cells.

    python benchmarks/ensemble.py [--pairs N] [--threads N]

A model-step is one optimizer step of one seed. The rival is a plain loop: a module, an optimizer and a backward
pass per seed. Both are checked to give the same losses before they are timed, in turn.
"""

from __future__ import annotations

import sys

# This folder last: `operator.py` beside this file has the name of a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from expressive_attention.study.config import Cell, load_config
from expressive_attention.study.ensemble import stack
from expressive_attention.study.streams import stream
from expressive_attention.study.training import build_model, train_step
from timing import paired

STEPS = 20


def batches(cell: Cell) -> list[Tensor]:
    """A batch per step, ``(seeds, batch, L + 1)``."""
    size = cell.training.batch_size
    streams = [stream(seed, "training") for seed in cell.seeds]
    drawn = [torch.from_numpy(cell.task.training_sequences(bits, STEPS * size)) for bits in streams]
    return list(torch.stack(drawn).unflatten(1, (STEPS, size)).unbind(1))


class Together:
    """All seeds in one program."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.model = stack([build_model(cell.task, cell.model, cell.mechanism, seed) for seed in cell.seeds])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=cell.learning_rate, fused=True)

    def run(self, data: list[Tensor]) -> Tensor:
        steps = [train_step(self.model, self.optimizer, self.cell.task, batch, None) for batch in data]
        return steps[-1]


class OneByOne:
    """A loop over single modules."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.models = [build_model(cell.task, cell.model, cell.mechanism, seed) for seed in cell.seeds]
        self.optimizers = [torch.optim.Adam(m.parameters(), lr=cell.learning_rate, fused=True) for m in self.models]

    def run(self, data: list[Tensor]) -> Tensor:
        scored = self.cell.task.scored
        losses: list[Tensor] = []
        for batch in data:
            losses = []
            for model, optimizer, own in zip(self.models, self.optimizers, batch, strict=True):
                optimizer.zero_grad()
                logits, targets = model(own[:, :-1])[:, scored], own[:, 1:][:, scored]
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return torch.stack(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs per ratio")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; a study's worker has one per cell")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    print(f"model-steps per second, and their ratio over {arguments.pairs} pairs: median (least to most)")
    config, _ = load_config("quick")
    for comparison in config.comparisons():
        cell = comparison.final_cells(config.training.learning_rates[0])[0]
        data = batches(cell)
        together, one_by_one = Together(cell), OneByOne(cell)
        torch.testing.assert_close(together.run(data), one_by_one.run(data), rtol=1e-3, atol=1e-4)
        ratio = paired(lambda t=together, d=data: t.run(d), lambda o=one_by_one, d=data: o.run(d), arguments.pairs)
        steps = STEPS * len(cell.seeds)
        print(
            f"{cell.condition + ', ' + cell.mechanism:48} together {steps / ratio.ours:7.0f}   "
            f"one by one {steps / ratio.rival:6.0f}   ratio {ratio}",
            flush=True,
        )


if __name__ == "__main__":
    main()
