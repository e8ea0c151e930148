"""Time training seeds together against training them one by one, on cells of a preset.

    python benchmarks/ensemble.py [--preset NAME] [--only TEXT] [--pairs N] [--threads N] [--profile] [--compile]

A model-step is one optimizer step of one seed. The rival is a plain loop: a module, an optimizer and a backward
pass per seed. Both are checked to give the same losses, then timed in turn. `--profile` shows which operations take the
time of the program that trains seeds together. `--compile` adds a comparison with torch.compile.
"""

from __future__ import annotations

import sys

# This folder goes last: its `operator.py` is named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from expressive_attention.study.config.cells import Cell
from expressive_attention.study.config.load import load_config
from expressive_attention.study.config.presets import preset_names
from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.rng import stream
from expressive_attention.study.training.ensemble import stack
from expressive_attention.study.training.model import build_model
from expressive_attention.study.training.optimization import make_optimizer, train_step
from timing import paired

STEPS = 20


Batch = tuple[Tensor, Tensor]


def batches(cell: Cell) -> list[Batch]:
    """Inputs ``(seeds, batch, L)`` or ``(..., C)`` and targets of each step."""
    size = cell.training.batch_size
    drawn = [cell.task.training_examples(stream(seed, "training"), STEPS * size) for seed in cell.seeds]
    inputs, targets = (
        torch.stack([torch.from_numpy(getattr(examples, name)) for examples in drawn]).unflatten(1, (STEPS, size))
        for name in ("inputs", "targets")
    )
    return list(zip(inputs.unbind(1), targets.unbind(1), strict=True))


class Together:
    """All seeds in one program."""

    def __init__(self, cell: Cell) -> None:
        self.model = stack([build_model(cell.task, cell.model, cell.mechanism, seed) for seed in cell.seeds])
        self.optimizer = make_optimizer(self.model, cell.learning_rate, cell.training)

    def run(self, data: list[Batch]) -> Tensor:
        steps = [train_step(self.model, self.optimizer, inputs, targets, None) for inputs, targets in data]
        return steps[-1]


class OneByOne:
    """A loop over single modules."""

    def __init__(self, cell: Cell) -> None:
        self.models = [build_model(cell.task, cell.model, cell.mechanism, seed) for seed in cell.seeds]
        self.optimizers = [make_optimizer(m, cell.learning_rate, cell.training) for m in self.models]

    def run(self, data: list[Batch]) -> Tensor:
        losses: list[Tensor] = []
        for batch in data:
            losses = []
            for model, optimizer, inputs, targets in zip(self.models, self.optimizers, *batch, strict=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return torch.stack(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="quick", choices=preset_names(), help="preset with the cells to train")
    parser.add_argument("--only", default="", metavar="TEXT", help="only conditions whose name contains this")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--compile", action="store_true", help="also compare the compiled program with the plain one")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs per ratio")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; a study's worker uses one per cell")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    print(f"model-steps per second, and their ratio over {arguments.pairs} pairs: median (least to most)")
    config, _ = load_config(arguments.preset)
    chosen = [comparison for comparison in config.arms() if arguments.only in comparison.condition]
    if not chosen:
        parser.error(f"--only must be part of a condition of {arguments.preset}, got {arguments.only!r}")
    for comparison in chosen:
        cell = comparison.final_cells(config.training.settings[0])[0]
        data = batches(cell)
        together, one_by_one = Together(cell), OneByOne(cell)
        torch.testing.assert_close(together.run(data), one_by_one.run(data), rtol=1e-3, atol=1e-4)
        ratio = paired(lambda t=together, d=data: t.run(d), lambda o=one_by_one, d=data: o.run(d), arguments.pairs)
        steps = STEPS * len(cell.seeds)
        print(
            f"{cell.condition + ', ' + cell.mechanism:72} together {steps / ratio.ours:7.0f}   "
            f"one by one {steps / ratio.rival:6.0f}   ratio {ratio}",
            flush=True,
        )
        if arguments.compile:
            compare_compiled(cell, together, data, arguments.pairs)
        if arguments.profile:
            profile(together, data)


def compare_compiled(cell: Cell, together: Together, data: list[Batch], pairs: int) -> None:
    """Print the speed-up by torch.compile for the program of all seeds, and the time of its first steps."""
    compiled = Together(cell)
    compiled.model.compile(dynamic=False)
    start = time.perf_counter()
    compiled.run(data)
    first = time.perf_counter() - start
    gain = paired(lambda: compiled.run(data), lambda: together.run(data), pairs)
    steps = STEPS * len(cell.seeds)
    print(
        f"{'  the same, compiled':72} together {steps / gain.ours:7.0f}   not compiled {steps / gain.rival:6.0f}   "
        f"ratio {gain}   first {STEPS} steps {first:.1f} s",
        flush=True,
    )


def profile(together: Together, data: list[Batch]) -> None:
    """Print the operations that take most of the time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        together.run(data)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=48))


if __name__ == "__main__":
    main()
