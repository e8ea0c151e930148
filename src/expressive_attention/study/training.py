"""Train the seeds of a cell together, and measure each of them alone."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Transformer
from .checkpoints import Checkpoint, CheckpointFile
from .config import Cell, ModelConfig, TrainingConfig
from .devices import CPU
from .ensemble import stack
from .measures import Prepared, Scores, rollouts, score
from .results import CURVE_SCHEMA, EXAMPLE_SCHEMA, SEED_SCHEMA, SPLIT_SCHEMA
from .streams import stream
from .tasks import IGNORED, Examples, Task
from .tasks.contexts import Unseen, unseen
from .user_mechanisms import ensure

__all__ = [
    "CellResult",
    "Trajectory",
    "build_model",
    "learning_rate_factor",
    "make_optimizer",
    "model_arguments",
    "train_cell",
    "train_further",
    "train_step",
    "trained_ensemble",
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
        splits: One row per seed and group of test positions, `SPLIT_SCHEMA`.
        examples: One row per test example, `EXAMPLE_SCHEMA`; none of tuning seeds.
        weights: Trained parameters, ``(R, ...)`` each.
        seconds: Time of the training.
    """

    seeds: pl.DataFrame
    curves: pl.DataFrame
    splits: pl.DataFrame
    examples: pl.DataFrame
    weights: dict[str, Tensor]
    seconds: float


def model_arguments(task: Task, model: ModelConfig, mechanism: str) -> dict[str, Any]:
    """The arguments with which `nn.Transformer` makes a model for a task, but for the gain at the start."""
    base = max(10.0, 2.0 * task.length) if model.rope_base is None else model.rope_base
    return {
        "vocab_size": task.vocab_size,
        "max_length": task.length,
        "embed_dim": model.embed_dim,
        "num_layers": model.layers,
        "num_heads": model.heads,
        "mechanism": mechanism,
        "position": model.position,
        "rope_base": base,
        "norm": model.norm,
        "norm_affine": model.norm_affine,
        "mlp_ratio": model.mlp_ratio,
        "activation": model.activation,
        "gain": model.gain,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "bias": model.bias,
        "embedding_std": model.embedding_std,
        "embedding_shift": model.embedding_shift,
        "input_dim": task.input_dim,
        "is_causal": task.is_causal,
    }


def build_model(task: Task, model: ModelConfig, mechanism: str, seed: int, initial_gain: float = 1.0) -> Transformer:
    """The untrained model of one seed: what is drawn depends on task, model and seed, not on the mechanism."""
    built = Transformer(**model_arguments(task, model, mechanism), initial_gain=initial_gain)
    bits = stream(seed, "parameters")
    built.initialize(torch.Generator().manual_seed(int(bits.random_raw()) >> 1))
    return built


def learning_rate_factor(step: int, training: TrainingConfig) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, then constant or a cosine to 0."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    if training.schedule == "constant":
        return 1.0
    progress = (step - training.warmup) / max(1, training.steps - training.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, learning_rate: float, training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration asks for."""
    parameters = list(model.parameters())
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, learning_rate, momentum=training.momentum, weight_decay=training.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        parameters, learning_rate, betas=training.betas, weight_decay=training.weight_decay, fused=True
    )


@dataclass
class Trajectory:
    """The evaluations of one seed, and what follows from them."""

    training: TrainingConfig
    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    cross_entropy: float = math.nan  # of the last evaluation
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
        return self.diverged_at is not None

    def add(self, step: int, loss: float, value: float, cross_entropy: float = math.nan) -> None:
        """Record an evaluation, unless the seed has ended."""
        if self.ended:
            return
        self.steps.append(step)
        self.losses.append(loss)
        self.accuracies.append(value)
        self.cross_entropy = cross_entropy
        if not math.isfinite(loss):
            self.diverged_at = step


def train_cell(
    cell: Cell,
    report: Callable[[int, float], None] | None = None,
    file: CheckpointFile | None = None,
    device: torch.device = CPU,
    watch: Callable[[int, list[int], nn.Module], None] | None = None,
) -> CellResult:
    """Train all seeds of a cell in one program.

    Seeds share no operation, so a seed's result does not depend on those beside it, but for the order in which
    the processor adds.

    Args:
        cell: What to train.
        report: Called after each evaluation with the step and the mean accuracy.
        file: Where the training is kept from time to time; what it holds is gone on from, to the same bits as
            without interruption.
        device: Where it is trained. What is drawn does not depend on it, the last bits of the results do.
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
        optimizer.param_groups[0]["lr"] = cell.learning_rate * learning_rate_factor(step, training)
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
    return _measured(cell, state.kept, trajectories, start, device)


@dataclass
class _State:
    """A cell between two evaluations: all that the rest of its training depends on.

    Attributes:
        model: Of the seeds that are still trained, ``(len(active), ...)`` each parameter.
        kept: Each seed's parameters as of its end, ``(R, ...)``.
        optimizer: Of `model`.
        batches: What is drawn next.
        trajectories: Of all seeds.
        active: Indices of the seeds that are still trained.
        steps: Number of steps taken.
    """

    model: nn.Module
    kept: nn.Module
    optimizer: torch.optim.Optimizer
    batches: _Batches
    trajectories: list[Trajectory]
    active: list[int]
    steps: int = 0

    @classmethod
    def at_the_start_of(cls, cell: Cell, device: torch.device) -> _State:
        task, training = cell.task, cell.training
        model = stack([build_model(task, cell.model, cell.function, seed, cell.initial_gain) for seed in cell.streams])
        model.to(device)
        return cls(
            model,
            copy.deepcopy(model),
            make_optimizer(model, cell.learning_rate, training),
            _Batches(task, cell.streams, training, device),
            [Trajectory(training, [], [], []) for _ in cell.seeds],
            list(range(len(cell.seeds))),
        )

    def checkpoint(self, seconds: float) -> Checkpoint:
        """What `restore` needs, and the time that the training has taken."""
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
        """Go from the start to where a checkpoint was made; returns the time that it took to get there."""
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


class _Batches:
    """Training batches: each seed's own stream, whichever seeds are beside it."""

    def __init__(
        self,
        task: Task,
        seeds: tuple[int, ...],
        training: TrainingConfig,
        device: torch.device = CPU,
        purpose: str = "training",
    ) -> None:
        self.task, self.size, self.device = task, training.batch_size, device
        self.streams = [stream(seed, purpose) for seed in seeds]
        self.before: list[Any] = []  # states of the streams before what is in `drawn` was drawn
        self.drawn: list[tuple[Tensor, Tensor]] = []  # inputs (seeds, batch, L[, C]) and targets, the next one last

    def next(self, active: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs ``(len(active), batch, L)`` or ``(..., C)`` and targets of the next batch of these seeds."""
        if not self.drawn:
            self._fill(active)
        inputs, targets = self.drawn.pop()
        return inputs[active], targets[active]

    def state(self) -> dict[str, Any]:
        """Where the streams are, as JSON can hold it."""
        streams = [
            {**x, "state": {name: part.tolist() for name, part in x["state"].items()}, "buffer": x["buffer"].tolist()}
            for x in self.before
        ]
        return {"streams": streams, "used": _STEPS_DRAWN - len(self.drawn)}

    def restore(self, state: dict[str, Any], active: list[int]) -> None:
        """Go to where `state` was taken, for these seeds."""
        for bits, x in zip(self.streams, state["streams"], strict=True):
            parts = {name: np.array(part, dtype=np.uint64) for name, part in x["state"].items()}
            whole: Any = {**x, "state": parts, "buffer": np.array(x["buffer"], dtype=np.uint64)}
            bits.state = whole
        self._fill(active)
        del self.drawn[_STEPS_DRAWN - state["used"] :]

    def _fill(self, active: list[int]) -> None:
        self.before = [bits.state for bits in self.streams]
        parts = {i: self.draw(self.streams[i]) for i in active}
        inputs, targets = (
            self._by_step([getattr(parts[i if i in parts else active[0]], name) for i in range(len(self.streams))])
            for name in ("inputs", "targets")
        )
        self.drawn = list(zip(inputs, targets, strict=True))[::-1]

    def _by_step(self, parts: list[np.ndarray]) -> tuple[Tensor, ...]:
        return torch.from_numpy(np.stack(parts)).to(self.device).unflatten(1, (_STEPS_DRAWN, -1)).unbind(1)

    def draw(self, bits: np.random.Philox) -> Examples:
        drawn = self.task.training_examples(bits, _STEPS_DRAWN * self.size)
        without = (drawn.targets == IGNORED).reshape(_STEPS_DRAWN, -1).all(1)
        if without.any():
            raise ValueError(
                f"{self.task.label}: a training batch of {self.size} examples has no target at all, and nothing to "
                "learn; raise training.batch_size, or have the task give more targets"
            )
        return drawn


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, gradient_clip: float | None
) -> Tensor:
    """One step of every member; their losses ``(R,)``, the mean cross-entropy of the targets that there are."""
    optimizer.zero_grad()
    logits = model(inputs)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
    counts = (targets != IGNORED).flatten(1).sum(1).clamp(min=1)
    losses = losses.view(len(targets), -1).sum(1) / counts
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
        state.update({name: x[going] for name, x in state.items() if isinstance(x, Tensor) and x.ndim})


def _measured(
    cell: Cell, model: nn.Module, trajectories: list[Trajectory], start: float, device: torch.device
) -> CellResult:
    """Final measures: of tuning seeds those on validation sequences alone, of all others those on the test as well."""
    training = cell.training
    tested = None if cell.role == "tuning" else _tested(cell, model, trajectories, device)
    rows, curves = [], []
    for index, (seed, trajectory) in enumerate(zip(cell.seeds, trajectories, strict=True)):
        found: dict[str, Any] = dict.fromkeys(_TEST_COLUMNS) if tested is None else tested.rows[index]
        solved = trajectory.solved and (tested is None or found["accuracy"] >= training.solved_accuracy)
        rows.append({
            "seed": seed,
            "steps": trajectory.steps[-1],
            "loss": trajectory.losses[-1],
            "validation": trajectory.accuracies[-1],
            "validation_cross_entropy": trajectory.cross_entropy,
            "solved": solved,
            "steps_to_solve": trajectory.steps[-trajectory.streak] if solved else None,
            "diverged_at": trajectory.diverged_at,
            **found,
        })  # fmt: skip
        curves += [
            {"seed": seed, "step": step, "loss": loss, "accuracy": value}
            for step, loss, value in zip(trajectory.steps, trajectory.losses, trajectory.accuracies, strict=True)
        ]
    weights = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    return CellResult(
        pl.DataFrame(rows, schema=SEED_SCHEMA),
        pl.DataFrame(curves, schema=CURVE_SCHEMA),
        pl.DataFrame(schema=SPLIT_SCHEMA) if tested is None else tested.splits,
        pl.DataFrame(schema=EXAMPLE_SCHEMA) if tested is None else tested.examples,
        weights,
        time.perf_counter() - start,
    )


_TEST_COLUMNS = (
    *("accuracy", "cross_entropy", "rollout_digits", "rollout_exact"),
    *("contexts_seen", "unseen_predictions", "unseen_contexts"),
)


@dataclass(frozen=True)
class _Tested:
    """The results that the test sequences give: `_TEST_COLUMNS` of each seed, and tables as in `CellResult`."""

    rows: list[dict[str, Any]]
    splits: pl.DataFrame
    examples: pl.DataFrame


def _tested(cell: Cell, model: nn.Module, trajectories: list[Trajectory], device: torch.device) -> _Tested:
    """Measures on test sequences, which are touched here alone, once, after the last decision."""
    task, training, members = cell.task, cell.training, len(cell.seeds)
    test = task.held_out_examples(training.test_sequences, "test")
    prepared = Prepared.of(task, test, device)
    scores = score(model, prepared, members)
    rolled = rollouts(model, task, test[: training.rollouts], training.rollout_digits, members, device)
    rows = []
    for index, (stream_seed, trajectory) in enumerate(zip(cell.streams, trajectories, strict=True)):
        new = _unseen(task, stream_seed, trajectory.steps[-1], training, test)
        rows.append({
            "accuracy": float(scores.accuracy[index]),
            "cross_entropy": float(scores.cross_entropy[index]),
            "rollout_digits": None if rolled is None else float(rolled[0][index]),
            "rollout_exact": None if rolled is None else float(rolled[1][index]),
            "contexts_seen": new.seen,
            "unseen_predictions": new.predictions,
            "unseen_contexts": new.contexts,
        })  # fmt: skip
    return _Tested(rows, _splits(cell, test, scores.right.cpu()), _examples(prepared, scores, members))


def _examples(test: Prepared, scores: Scores, members: int) -> pl.DataFrame:
    """How many seeds are right on each test example."""
    counts, right = test.scored.sum(1).cpu(), (scores.right & test.scored).sum((0, 2)).cpu()
    return pl.DataFrame(
        {"example": range(len(counts)), "scored": counts.tolist(), "seeds": members, "right": right.tolist()},
        schema=EXAMPLE_SCHEMA,
    )


def _splits(cell: Cell, test: Examples, right: Tensor) -> pl.DataFrame:
    """Accuracy per group of positions; `right` is ``(R, n, L)``."""
    task = cell.task
    is_known = task.solve(test.inputs[:1]) is not None
    targets, ceiling, found = test.targets != IGNORED, task.ceiling(test), right.numpy()
    rows = []
    for split, groups in task.splits(test).items():
        for group in np.unique(groups[targets & (groups >= 0)]).tolist():
            members = targets & (groups == group)
            rows += [
                {
                    "seed": seed,
                    "split": split,
                    "group": group,
                    "name": task.group_name(split, group),
                    "count": int(members.sum()),
                    "accuracy": float(found[index][members].mean()),
                    "ceiling": float(ceiling[members].mean()) if is_known else None,
                }
                for index, seed in enumerate(cell.seeds)
            ]
    return pl.DataFrame(rows, schema=SPLIT_SCHEMA)


def _unseen(task: Task, seed: int, steps: int, training: TrainingConfig, test: Examples) -> Unseen:
    """The part of the test that is new to a seed after its first `steps` steps, whose examples are drawn again."""
    batches = _Batches(task, (seed,), training)
    left, parts = steps * training.batch_size, []
    while left > 0 and task.contexts(test[:1]) is not None:
        parts.append(batches.draw(batches.streams[0])[:left])
        left -= len(parts[-1])
    return unseen(task, parts, test)


def trained_model(cell: Cell, weights: dict[str, Tensor], index: int) -> Transformer:
    """The trained model of the cell's seed number `index`, from the weights of its result."""
    ensure(cell.mechanism_file)
    model = build_model(cell.task, cell.model, cell.function, cell.streams[index])
    model.load_state_dict({name: x[index] for name, x in weights.items()})
    return model


def trained_ensemble(cell: Cell, weights: dict[str, Tensor]) -> nn.Module:
    """The trained models of all seeds of a cell as one module, ``(R, ...)`` each parameter."""
    ensure(cell.mechanism_file)
    whole = stack([build_model(cell.task, cell.model, cell.function, seed) for seed in cell.streams])
    whole.load_state_dict(weights)
    return whole


def train_further(cell: Cell, model: nn.Module, steps: int, learning_rate: float) -> None:
    """Train the seeds of a cell on, with batches that its training has not drawn.

    The rate rises over a third of the steps, for the optimizer starts without its averages, and falls to 0 by a cosine.
    All else is as in the training of the cell.

    Args:
        cell: Which seeds.
        model: Their models, which are changed, ``(R, ...)`` each parameter.
        steps: Number of steps.
        learning_rate: The largest one.
    """
    training = cell.training.model_copy(update={"steps": steps, "warmup": steps // 3, "schedule": "cosine"})
    optimizer = make_optimizer(model, learning_rate, training)
    batches = _Batches(cell.task, cell.streams, training, purpose="further training")
    everyone = list(range(len(cell.seeds)))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * learning_rate_factor(step, training)
        train_step(model, optimizer, *batches.next(everyone), training.gradient_clip)
