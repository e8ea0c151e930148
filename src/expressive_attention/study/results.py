"""What a study has found so far, in the form that statistics, figures, report and status read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

__all__ = ["CURVE_SCHEMA", "SEED_SCHEMA", "Condition", "StudyResults"]

# One row per trained seed.
SEED_SCHEMA: dict[str, Any] = {
    "seed": pl.Int64,
    "steps": pl.Int64,  # optimizer steps taken
    "loss": pl.Float64,  # training loss, mean since the evaluation before the last
    "accuracy": pl.Float64,  # on test sequences that no decision was taken on
    "solved": pl.Boolean,
    "steps_to_solve": pl.Int64,  # null: censored, not solved within `steps`
    "rollout_digits": pl.Float64,  # share of digits right in autoregressive rollouts
    "rollout_exact": pl.Float64,  # share of rollouts right from the first digit to the last
    "windows_seen": pl.Float64,  # share of test windows that also occurred in training
    "diverged_at": pl.Int64,  # first evaluation step with a loss that is not finite; null: never
}

# One row per seed and evaluation during training.
CURVE_SCHEMA: dict[str, Any] = {
    "seed": pl.Int64,
    "step": pl.Int64,
    "loss": pl.Float64,
    "accuracy": pl.Float64,  # on validation sequences
}


@dataclass(frozen=True)
class Condition:
    """One task and one model on which the mechanisms are compared.

    Attributes:
        label: Short name, unique within a study, e.g. ``"sum, basis 16, delay 5, rope"``.
        task: Fields of the task, e.g. ``{"kind": "nt", "operation": "sum", "basis": 16, "delay": 5}``.
        model: Fields of the model, e.g. ``{"layers": 1, "embed_dim": 16, "position": "rope", ...}``.
        facts: What a number is worth on this task: ``state_space`` (int), ``complexity`` (float, bits of
            the state space), ``cycles`` (str), ``chance``, ``majority``, ``copy_last`` (accuracies of
            trivial predictors), ``held_out`` (share of starting states never trained on),
            ``test_sequences`` (int).
    """

    label: str
    task: dict[str, Any]
    model: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class StudyResults:
    """All finished cells of a study.

    Attributes:
        name: Name of the study.
        config: The configuration as TOML text.
        conditions: In the order of the configuration; also those without results yet.
        mechanisms: Mechanisms that are compared, e.g. ``["expressive", "dot_product"]``.
        seeds: `SEED_SCHEMA` plus ``condition`` (label), ``mechanism``, ``learning_rate`` and ``role``:
            ``"tuning"`` (seeds on which the learning rate was chosen) or ``"final"`` (fresh seeds at the
            chosen rate). Both mechanisms' runs of one seed share initial parameters and batches.
        curves: `CURVE_SCHEMA` plus the same four columns.
        unfinished: One line per cell that has no result yet.
        environment: Versions and machine, e.g. ``{"torch": "2.13.0", "processor": "..."}``.
        seconds: Sum of the cells' training times in seconds.
    """

    name: str
    config: str
    conditions: list[Condition]
    mechanisms: list[str]
    seeds: pl.DataFrame
    curves: pl.DataFrame
    unfinished: list[str]
    environment: dict[str, str]
    seconds: float
