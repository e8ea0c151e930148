"""The tables of a trained cell: measures of each seed on validation and test sequences."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from ..config.cells import Cell
from ..config.schema import TrainingConfig
from ..tasks import IGNORED, Examples, Task
from ..tasks.contexts import Unseen, unseen
from .batches import Batches
from .evaluation import Prepared, Scores, rollouts, score
from .result import CURVE_SCHEMA, EXAMPLE_SCHEMA, SEED_SCHEMA, SPLIT_SCHEMA, CellResult
from .trajectory import Trajectory

__all__ = ["measured"]


def measured(
    cell: Cell, model: nn.Module, trajectories: list[Trajectory], start: float, device: torch.device
) -> CellResult:
    """Final measures, on validation sequences; for all but tuning seeds, also on test sequences."""
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
    batches = Batches(task, (seed,), training)
    left, parts = steps * training.batch_size, []
    while left > 0 and task.contexts(test[:1]) is not None:
        parts.append(batches.draw(batches.streams[0])[:left])
        left -= len(parts[-1])
    return unseen(task, parts, test)
