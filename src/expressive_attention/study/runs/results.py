"""What a study has found so far, in the form that statistics, figures, report and status read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl

__all__ = [
    "CURVE_SCHEMA",
    "EXAMPLE_SCHEMA",
    "SEED_SCHEMA",
    "SPLIT_SCHEMA",
    "Condition",
    "Setting",
    "StudyResults",
]

# One row per trained seed.
SEED_SCHEMA: dict[str, Any] = {
    "seed": pl.Int64,
    "steps": pl.Int64,  # optimizer steps taken
    "loss": pl.Float64,  # training loss, mean since the evaluation before the last
    # On test sequences, which no decision is taken on; null: a tuning seed, which does not see them (in protocol 2 all
    # seeds did).
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


class Setting(NamedTuple):
    """What is tuned for each mechanism on each condition."""

    learning_rate: float
    initial_gain: float


@dataclass(frozen=True)
class Condition:
    """One task and one model on which the mechanisms are compared.

    Attributes:
        label: Short name, unique within a study, e.g. ``"sum, basis 16, delay 5, rope"``.
        task: Fields of the task, e.g. ``{"kind": "nt", "operation": "sum", "basis": 16, "delay": 5}``.
        model: Fields of the model, e.g. ``{"layers": 1, "embed_dim": 16, "position": "rope", ...}``.
        facts: What a number is worth on this task: ``complexity`` (bits), ``chance`` and ``majority`` (accuracies of
            trivial predictors), ``test_sequences``, ``predictions`` (scored) and ``contexts`` (different ones among
            them; all int), ``fixed_data`` (bool: there are no more examples than these); and, where they apply,
            ``copy_last`` (accuracy), ``ceiling`` (accuracy of the best predictor), ``state_space`` (int), ``cycles``
            (str), ``held_out`` (share of starting states never trained on), and what else a task has to say.
    """

    label: str
    task: dict[str, Any]
    model: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that what follows from it can be kept
class StudyResults:
    """All finished cells of a study.

    Attributes:
        name: Name of the study.
        config: The configuration as TOML text.
        conditions: In the order of the configuration; also those without results yet.
        mechanisms: Mechanisms that are compared, e.g. ``["expressive", "dot_product"]``.
        seeds: `SEED_SCHEMA` plus ``condition`` (label), ``mechanism``, ``learning_rate``, ``initial_gain`` and
            ``role``: ``"tuning"`` (seeds on which rate and gain were chosen), ``"final"`` (fresh seeds with the
            chosen ones) or ``"confirmation"`` (fresh ones again, where the final ones show an exclusive range). All
            mechanisms' runs of one seed share initial parameters and batches.
        curves: `CURVE_SCHEMA` plus the same five columns.
        splits: `SPLIT_SCHEMA` plus the same five columns.
        examples: `EXAMPLE_SCHEMA` plus the same five columns; only of conditions with fixed data.
        unfinished: One line per cell that has no result yet.
        claims: What the study asks, as `StudyConfig.claims`.
        protocol: By which it was run.
        family: Number of comparisons over which p is adjusted where the study has fewer; 0: over its own.
        environment: Versions and machine, e.g. ``{"torch": "2.13.0", "processor": "..."}``.
        seconds: Sum of the cells' training times in seconds.
    """

    name: str
    config: str
    conditions: list[Condition]
    mechanisms: list[str]
    seeds: pl.DataFrame
    curves: pl.DataFrame
    splits: pl.DataFrame
    examples: pl.DataFrame
    unfinished: list[str]
    claims: list[str]
    environment: dict[str, str]
    seconds: float
    protocol: int = 3
    family: int = 0
