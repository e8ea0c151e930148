"""Train the seeds of a cell together, and measure each of them alone."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Transformer
from .config import Cell, ModelConfig, TrainingConfig
from .ensemble import stack
from .measures import accuracy, rollouts, windows_seen
from .results import CURVE_SCHEMA, SEED_SCHEMA
from .streams import stream
from .tasks import Task

__all__ = [
    "CellResult",
    "Trajectory",
    "build_model",
    "learning_rate_factor",
    "train_cell",
    "train_step",
    "trained_model",
]

# Training sequences are drawn this many steps at a time.
_STEPS_DRAWN = 128


@dataclass(frozen=True)
class CellResult:
    """What is kept of a cell.

    Attributes:
        seeds: One row per seed, `SEED_SCHEMA`.
        curves: One row per seed and evaluation, `CURVE_SCHEMA`.
        weights: Trained parameters, ``(R, ...)`` each.
        seconds: Time of the training.
    """

    seeds: pl.DataFrame
    curves: pl.DataFrame
    weights: dict[str, Tensor]
    seconds: float


def build_model(task: Task, model: ModelConfig, mechanism: str, seed: int) -> Transformer:
    """The untrained model of one seed: its parameters depend on task, model and seed, not on the mechanism."""
    base = max(10.0, 2.0 * task.length) if model.rope_base is None else model.rope_base
    built = Transformer(
        task.vocab_size,
        task.length,
        model.embed_dim,
        model.layers,
        model.heads,
        mechanism,
        position=model.position,
        rope_base=base,
        norm=model.norm,
        norm_affine=model.norm_affine,
        mlp_ratio=model.mlp_ratio,
        activation=model.activation,
        gain=model.gain,
        qkv_bias=model.qkv_bias,
        bias=model.bias,
        embedding_std=model.embedding_std,
    )
    bits = stream(seed, "parameters")
    built.initialize(torch.Generator().manual_seed(int(bits.random_raw() >> np.uint64(1))))
    return built


def learning_rate_factor(step: int, training: TrainingConfig) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, then constant or a cosine to 0."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    if training.schedule == "constant":
        return 1.0
    progress = (step - training.warmup) / max(1, training.steps - training.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class Trajectory:
    """The evaluations of one seed, and what follows from them."""

    training: TrainingConfig
    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    diverged_at: int | None = None

    @property
    def streak(self) -> int:
        """Number of evaluations at the end that reach the accuracy of a solved task."""
        count = 0
        for value in reversed(self.accuracies):
            if value < self.training.solved_accuracy:
                break
            count += 1
        return count

    @property
    def solved(self) -> bool:
        """Whether the last evaluations reach the accuracy of a solved task."""
        return self.diverged_at is None and self.streak >= self.training.solved_evaluations

    @property
    def ended(self) -> bool:
        """Whether nothing is to be learned from training on."""
        return self.diverged_at is not None or (self.training.early_stop and self.solved)

    def add(self, step: int, loss: float, value: float) -> None:
        """Record an evaluation, unless the seed has ended."""
        if self.ended:
            return
        self.steps.append(step)
        self.losses.append(loss)
        self.accuracies.append(value)
        if not math.isfinite(loss):
            self.diverged_at = step


def train_cell(cell: Cell, report: Callable[[int, float], None] | None = None) -> CellResult:
    """Train all seeds of a cell in one program.

    Seeds share no operation, so a seed's result does not depend on those beside it, but for the order in which
    the processor adds.

    Args:
        cell: What to train.
        report: Called after each evaluation with the step and the mean accuracy.
    """
    start = time.perf_counter()
    task, training = cell.task, cell.training
    model = stack([build_model(task, cell.model, cell.mechanism, seed) for seed in cell.seeds])
    kept = copy.deepcopy(model)  # each seed's parameters as of its end
    optimizer = torch.optim.Adam(model.parameters(), lr=cell.learning_rate, betas=training.betas, fused=True)
    batches = _Batches(task, cell.seeds, training)
    validation = torch.from_numpy(task.held_out_sequences(training.validation_sequences, "validation"))

    trajectories = [Trajectory(training, [], [], []) for _ in cell.seeds]
    active = list(range(len(cell.seeds)))
    losses, since = torch.zeros(len(active)), 0
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = cell.learning_rate * learning_rate_factor(step, training)
        losses += train_step(model, optimizer, task, batches.next(active), training.gradient_clip)
        since += 1
        if (step + 1) % training.evaluate_every and step + 1 < training.steps:
            continue
        values = accuracy(model, task, validation, len(active))
        # The last step can ruin parameters that no loss has seen yet.
        finite = torch.stack([p.detach().flatten(1).isfinite().all(1) for p in model.parameters()]).all(0)
        losses = torch.where(finite, losses, torch.nan)
        for place, index in enumerate(active):
            trajectories[index].add(step + 1, float(losses[place]) / since, float(values[place]))
        if report is not None:
            report(step + 1, float(np.mean([t.accuracies[-1] for t in trajectories])))
        going = [place for place, index in enumerate(active) if not trajectories[index].ended]
        if len(going) < len(active) or step + 1 == training.steps:
            _keep(kept, model, active)
            _drop(model, optimizer, going)
            active = [active[place] for place in going]
        if not active:
            break
        losses, since = torch.zeros(len(active)), 0
    return _measured(cell, kept, trajectories, start)


class _Batches:
    """Training batches: each seed's own stream, whichever seeds are beside it."""

    def __init__(self, task: Task, seeds: tuple[int, ...], training: TrainingConfig) -> None:
        self.task, self.size = task, training.batch_size
        self.streams = [stream(seed, "training") for seed in seeds]
        self.drawn: list[Tensor] = []  # (seeds, batch, L + 1) each, the next one last

    def next(self, active: list[int]) -> Tensor:
        """The next batch of the seeds with these indices, ``(len(active), batch, L + 1)``."""
        if not self.drawn:
            nothing = np.empty((_STEPS_DRAWN * self.size, self.task.length + 1), dtype=np.int64)
            parts = [self.draw(bits) if i in active else nothing for i, bits in enumerate(self.streams)]
            self.drawn = list(torch.from_numpy(np.stack(parts)).unflatten(1, (_STEPS_DRAWN, -1)).unbind(1))[::-1]
        return self.drawn.pop()[active]

    def draw(self, bits: np.random.Philox) -> np.ndarray:
        return self.task.training_sequences(bits, _STEPS_DRAWN * self.size)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, batch: Tensor, gradient_clip: float | None
) -> Tensor:
    """One step of every member; their losses ``(R,)``, the mean cross-entropy of the scored tokens."""
    optimizer.zero_grad()
    logits = model(batch[:, :, :-1])[:, :, task.scored]
    targets = batch[:, :, 1:][:, :, task.scored]
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(len(batch), -1).mean(1)
    losses.sum().backward()
    if gradient_clip is not None:
        _clip(list(model.parameters()), gradient_clip)
    optimizer.step()
    return losses.detach()


def _clip(parameters: list[nn.Parameter], limit: float) -> None:
    """Scale each member's gradient to a norm of at most `limit`."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *(1,) * (g.ndim - 1)))


@torch.no_grad()
def _keep(kept: nn.Module, model: nn.Module, active: list[int]) -> None:
    """Copy the parameters of the model, whose members are the seeds `active`."""
    for mine, theirs in zip(kept.parameters(), model.parameters(), strict=True):
        mine[active] = theirs


def _drop(model: nn.Module, optimizer: torch.optim.Optimizer, going: list[int]) -> None:
    """Go on with the members `going` alone: the others would only cost time."""
    for parameter in model.parameters():
        parameter.data, parameter.grad = parameter.data[going], None
        state = optimizer.state[parameter]
        state.update({name: x[going] for name, x in state.items() if x.ndim})


def _measured(cell: Cell, model: nn.Module, trajectories: list[Trajectory], start: float) -> CellResult:
    """Final measures, on test sequences that no decision was taken on."""
    task, training, members = cell.task, cell.training, len(cell.seeds)
    test = task.held_out_sequences(training.test_sequences, "test")
    accuracies = accuracy(model, task, torch.from_numpy(test), members)
    digits, exact = rollouts(model, task, test[: training.rollouts], training.rollout_digits, members)
    rows, curves = [], []
    for index, (seed, trajectory) in enumerate(zip(cell.seeds, trajectories, strict=True)):
        steps = trajectory.steps[-1]
        solved = trajectory.solved and float(accuracies[index]) >= training.solved_accuracy
        rows.append({
            "seed": seed,
            "steps": steps,
            "loss": trajectory.losses[-1],
            "accuracy": float(accuracies[index]),
            "solved": solved,
            "steps_to_solve": trajectory.steps[-trajectory.streak] if solved else None,
            "rollout_digits": float(digits[index]),
            "rollout_exact": float(exact[index]),
            "windows_seen": windows_seen(task, _training_sequences(task, seed, steps, training), test),
            "diverged_at": trajectory.diverged_at,
        })  # fmt: skip
        curves += [
            {"seed": seed, "step": step, "loss": loss, "accuracy": value}
            for step, loss, value in zip(trajectory.steps, trajectory.losses, trajectory.accuracies, strict=True)
        ]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return CellResult(
        pl.DataFrame(rows, schema=SEED_SCHEMA),
        pl.DataFrame(curves, schema=CURVE_SCHEMA),
        weights,
        time.perf_counter() - start,
    )


def _training_sequences(task: Task, seed: int, steps: int, training: TrainingConfig) -> list[np.ndarray]:
    """What the seed has been trained on in its first `steps` steps, drawn again."""
    batches = _Batches(task, (seed,), training)
    draws = math.ceil(steps / _STEPS_DRAWN)
    sequences = np.concatenate([batches.draw(batches.streams[0]) for _ in range(draws)])
    return [sequences[: steps * training.batch_size]]


def trained_model(cell: Cell, weights: dict[str, Tensor], index: int) -> Transformer:
    """The trained model of the cell's seed number `index`, from the weights of its result."""
    model = build_model(cell.task, cell.model, cell.mechanism, cell.seeds[index])
    model.load_state_dict({name: x[index] for name, x in weights.items()})
    return model
