"""The result of a trained cell: its tables, weights and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl
from torch import Tensor

__all__ = ["CURVE_SCHEMA", "EXAMPLE_SCHEMA", "ROW_KEYS", "SEED_SCHEMA", "SPLIT_SCHEMA", "TABLES", "CellResult"]


# One row per trained seed.
SEED_SCHEMA: dict[str, Any] = {
    "seed": pl.Int64,
    "steps": pl.Int64,  # optimizer steps taken
    "loss": pl.Float64,  # training loss, mean since the evaluation before the last
    # Accuracy on test sequences, on which no decision is taken. It is null for a tuning seed, which does not see them
    # (in protocol 2 all seeds did).
    "accuracy": pl.Float64,
    "cross_entropy": pl.Float64,  # on the same, at the same positions: mean of -ln p, in nats
    "validation": pl.Float64,  # accuracy on validation sequences at the end; by it the setting is chosen
    "validation_cross_entropy": pl.Float64,
    "solved": pl.Boolean,
    "steps_to_solve": pl.Int64,  # null: censored, not solved within `steps`
    "rollout_digits": pl.Float64,  # share of tokens right in autoregressive rollouts; null: the task has none
    "rollout_exact": pl.Float64,  # share of rollouts right from the first token to the last; null: as above
    "contexts_seen": pl.Float64,  # share of test contexts that also occurred in training; null: does not apply
    "unseen_predictions": pl.Int64,  # scored test predictions whose context did not occur in training
    "unseen_contexts": pl.Int64,  # different contexts among them
    "diverged_at": pl.Int64,  # first evaluation step with a loss that is not finite; null: never
}

# One row per seed and evaluation during training.
CURVE_SCHEMA: dict[str, Any] = {
    "seed": pl.Int64,
    "step": pl.Int64,
    "loss": pl.Float64,
    "accuracy": pl.Float64,  # on validation sequences
}

# One row per seed and group of test positions, e.g. of one position or one of several mixed rules.
SPLIT_SCHEMA: dict[str, Any] = {
    "seed": pl.Int64,
    "split": pl.String,  # by what: "position", "rule", ...
    "group": pl.Int64,
    "name": pl.String,  # of the group
    "count": pl.Int64,  # predictions in the group
    "accuracy": pl.Float64,
    "ceiling": pl.Float64,  # accuracy of the best predictor there; null: not known
}


# One row per test example of a cell of final seeds.
EXAMPLE_SCHEMA: dict[str, Any] = {
    "example": pl.Int64,
    "scored": pl.Int64,  # predictions that count
    "seeds": pl.Int64,  # in the cell
    "right": pl.Int64,  # right predictions among those that count, of all seeds together
}


@dataclass(frozen=True)
class CellResult:
    """The stored result of a cell.

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


TABLES = {"seeds": SEED_SCHEMA, "curves": CURVE_SCHEMA, "splits": SPLIT_SCHEMA, "examples": EXAMPLE_SCHEMA}

# The columns that tell the rows of each table of a cell apart.
ROW_KEYS = {
    "seeds": ["seed"],
    "curves": ["seed", "step"],
    "splits": ["seed", "split", "group"],
    "examples": ["example"],
}
