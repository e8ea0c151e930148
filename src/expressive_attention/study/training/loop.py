"""Train the seeds of a cell together, and measure each of them alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..config.cells import Cell
from ..config.mechanism_files import ensure
from .batches import Batches
from .checkpoints import Checkpoint, CheckpointFile
from .devices import CPU
from .ensemble import stack
from .evaluation import Prepared, score
from .model import build_model
from .optimization import learning_rate_factor, make_optimizer, train_step
from .result import CellResult
from .tables import measured
from .trajectory import Trajectory

__all__ = ["train_cell", "train_further"]


def train_cell(
    cell: Cell,
    report: Callable[[int, float], None] | None = None,
    file: CheckpointFile | None = None,
    device: torch.device = CPU,
    watch: Callable[[int, list[int], nn.Module], None] | None = None,
) -> CellResult:
    """Train all seeds of a cell in one program.

    Seeds share no operation, so a seed's result does not depend on those beside it, except through the order in
    which the processor adds.

    Args:
        cell: The cell to train.
        report: Called after each evaluation with the step and the mean accuracy.
        file: File of checkpoints, written from time to time; if it has one, the training resumes from it, to the same
            bits as without interruption.
        device: Device to train on. Random numbers do not depend on it; the last bits of the results do.
        watch: Called at the start and after each evaluation with the step, the places of the seeds that are still
            trained, and their model, ``(R, ...)`` each parameter; `member` takes one of them out.
    """
    start = time.perf_counter()
    ensure(cell.mechanism_file)
    training = cell.training
    state = _State.at_the_start_of(cell, device)
    if file is not None and (checkpoint := file.read()) is not None:
        start -= state.restore(checkpoint)
    model, optimizer, trajectories = state.model, state.optimizer, state.trajectories
    held_out = cell.task.held_out_examples(training.validation_sequences, "validation")
    validation = Prepared.of(cell.task, held_out, device)

    if watch is not None:
        watch(state.steps, state.active, model)
    losses, since = torch.zeros(len(state.active), device=device), 0
    for step in range(state.steps, training.steps):
        active = state.active
        optimizer.param_groups[0]["lr"] = cell.setting.learning_rate * learning_rate_factor(step, training)
        losses += train_step(model, optimizer, *state.batches.next(active), training.gradient_clip)
        since += 1
        if (step + 1) % training.evaluate_every and step + 1 < training.steps:
            continue
        scores = score(model, validation, len(active))
        # The last step can ruin parameters that no loss has seen yet.
        finite = torch.stack([p.detach().flatten(1).isfinite().all(1) for p in model.parameters()]).all(0)
        means = torch.where(finite, losses.double() / since, torch.nan).tolist()
        values = (means, scores.accuracy.tolist(), scores.cross_entropy.tolist())
        for index, loss, value, cross_entropy in zip(active, *values, strict=True):
            trajectories[index].add(step + 1, loss, value, cross_entropy)
        if watch is not None:
            watch(step + 1, active, model)
        if report is not None:
            report(step + 1, float(np.mean([t.accuracies[-1] for t in trajectories])))
        going = [place for place, index in enumerate(active) if not trajectories[index].ended]
        if len(going) < len(active) or step + 1 == training.steps:
            _keep(state.kept, model, active)
            _drop(model, optimizer, going)
            state.active = [active[place] for place in going]
        if not state.active:
            break
        losses, since = torch.zeros(len(state.active), device=device), 0
        state.steps = step + 1
        if file is not None and file.is_due and state.steps < training.steps:
            file.write(state.checkpoint(time.perf_counter() - start))
    return measured(cell, state.kept, trajectories, start, device)


@dataclass
class _State:
    """A cell between two evaluations: all that the rest of its training depends on.

    Attributes:
        model: Model of the seeds that are still trained; each parameter is ``(len(active), ...)``.
        kept: Parameters of each seed at its end, ``(R, ...)``.
        optimizer: Optimizer of `model`.
        batches: The next batches.
        trajectories: Trajectories of all seeds.
        active: Indices of the seeds that are still trained.
        steps: Number of steps taken.
    """

    model: nn.Module
    kept: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    trajectories: list[Trajectory]
    active: list[int]
    steps: int = 0

    @classmethod
    def at_the_start_of(cls, cell: Cell, device: torch.device) -> _State:
        task, training = cell.task, cell.training
        model = stack(
            [build_model(task, cell.model, cell.function, seed, cell.setting.initial_gain) for seed in cell.streams]
        )
        model.to(device)
        return cls(
            model,
            copy.deepcopy(model),
            make_optimizer(model, cell.setting.learning_rate, training),
            Batches(task, cell.streams, training, device),
            [Trajectory(training, [], [], []) for _ in cell.seeds],
            list(range(len(cell.seeds))),
        )

    def checkpoint(self, seconds: float) -> Checkpoint:
        """The state that `restore` needs, and the time that the training has taken."""
        tensors = {f"kept/{name}": x.detach() for name, x in self.kept.named_parameters()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model/{name}"] = parameter.detach()
            moments = self.optimizer.state[parameter].items()
            tensors |= {f"{moment}/{name}": x for moment, x in moments if isinstance(x, Tensor)}
        seeds = [{name: x for name, x in vars(t).items() if name != "training"} for t in self.trajectories]
        content = {
            "steps": self.steps,
            "seconds": seconds,
            "active": self.active,
            "batches": self.batches.state(),
            "trajectories": seeds,
        }
        return Checkpoint(tensors, content)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> float:
        """Resume from a checkpoint; returns the training time up to it."""
        content = checkpoint.state
        self.steps, self.active = content["steps"], content["active"]
        _drop(self.model, self.optimizer, self.active)
        kept, parameters = dict(self.kept.named_parameters()), dict(self.model.named_parameters())
        for label, x in checkpoint.tensors.items():
            part, name = label.split("/")
            if part == "kept":
                kept[name].copy_(x)
            elif part == "model":
                parameters[name].copy_(x)
            else:
                self.optimizer.state[parameters[name]][part] = x.to(parameters[name].device)
        self.batches.restore(content["batches"], self.active)
        training = self.trajectories[0].training
        self.trajectories = [Trajectory(training, **values) for values in content["trajectories"]]
        return content["seconds"]


@torch.no_grad()
def _keep(kept: nn.Module, model: nn.Module, active: list[int]) -> None:
    """Copy the parameters of the model, whose members are the seeds `active`."""
    for mine, theirs in zip(kept.parameters(), model.parameters(), strict=True):
        mine[active] = theirs


def _drop(model: nn.Module, optimizer: torch.optim.Optimizer, going: list[int]) -> None:
    """Continue with the members `going` alone: the others would only cost time."""
    for parameter in model.parameters():
        parameter.data, parameter.grad = parameter.data[going], None
        state = optimizer.state[parameter]
        state.update({name: x[going] for name, x in state.items() if isinstance(x, Tensor) and x.ndim})


def train_further(cell: Cell, model: nn.Module, steps: int, learning_rate: float) -> None:
    """Train the seeds of a cell further, with batches that its training has not drawn.

    The rate rises over a third of the steps, for the optimizer starts without its averages, and falls to 0 by a cosine.
    All else is as in the training of the cell.

    Args:
        cell: The cell of the seeds.
        model: Their models, which are changed, ``(R, ...)`` each parameter.
        steps: Number of steps.
        learning_rate: The largest learning rate of the schedule.
    """
    training = cell.training.model_copy(update={"steps": steps, "warmup": steps // 3, "schedule": "cosine"})
    optimizer = make_optimizer(model, learning_rate, training)
    batches = Batches(cell.task, cell.streams, training, purpose="further training")
    everyone = list(range(len(cell.seeds)))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * learning_rate_factor(step, training)
        train_step(model, optimizer, *batches.next(everyone), training.gradient_clip)
