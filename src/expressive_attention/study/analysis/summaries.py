"""Summaries of each mechanism on each condition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl

from ..config.condition import Setting
from ..runs.results import StudyResults, setting_of
from .estimators import Interval, best_of, finite, mean_interval, wilson_interval
from .survival import median_steps, restricted_steps
from .wording import mechanism_name

__all__ = ["Summary", "TuningSummary", "evidence", "median_curve", "summaries", "summarize", "tuning_summaries"]


@dataclass(frozen=True)
class Summary:
    """The results of one mechanism's final seeds on one condition.

    Attributes:
        condition: Label of the condition.
        mechanism: The mechanism, as in the configuration.
        setting: The learning rate and gain chosen on the tuning seeds.
        seeds: Number of seeds, diverged ones included.
        solved: Number of seeds that solved the task.
        solved_interval: Wilson interval of the share solved.
        accuracy: Mean accuracy over the seeds.
        accuracy_interval: Bootstrap interval of that mean, None where `mean_interval` gives none.
        best_of_three: Mean accuracy of the best of three seeds, see `best_of`; None with fewer seeds, or without
            accuracies on validation sequences.
        cross_entropy: Mean over the seeds of their cross-entropy, in nats; infinite or NaN where a seed diverged.
        rollout_digits: Mean share of tokens right in rollouts, None where the task has none.
        rollout_exact: Mean share of rollouts right as a whole, likewise.
        median_steps: Steps by which at least half of the seeds had solved, None if fewer than half did.
        restricted_steps: Mean over all seeds of the steps before the task was solved, all steps where it was not.
        steps: Optimizer steps of a seed that does not end early.
        diverged: Number of seeds whose loss stopped being finite.
    """

    condition: str
    mechanism: str
    setting: Setting
    seeds: int
    solved: int
    solved_interval: Interval
    accuracy: float
    accuracy_interval: Interval | None
    best_of_three: float | None
    cross_entropy: float
    rollout_digits: float | None
    rollout_exact: float | None
    median_steps: float | None
    restricted_steps: float
    steps: int
    diverged: int


@dataclass(frozen=True)
class TuningSummary:
    """The results of one learning rate and gain on the tuning seeds.

    Attributes:
        condition: Label of the condition.
        mechanism: The mechanism, as in the configuration.
        setting: The learning rate and gain tried.
        seeds: Number of tuning seeds.
        solved: Number of them that solved the task.
        accuracy: Their mean accuracy on validation sequences; in protocol 2, on test sequences.
        chosen: Whether the final seeds ran with this setting.
    """

    condition: str
    mechanism: str
    setting: Setting
    seeds: int
    solved: int
    accuracy: float
    chosen: bool


def median_curve(curves: pl.DataFrame) -> pl.DataFrame:
    """Median accuracy over seeds at each evaluation.

    A seed that ended early, or whose accuracy is NaN, keeps its last accuracy: leaving it out would let
    the median rise when the worst seeds diverge.

    Args:
        curves: Rows of `StudyResults.curves` of one condition and mechanism.

    Returns:
        Columns ``step`` and ``accuracy``, by ascending step.

    Raises:
        ValueError: If `curves` has no row.
    """
    if curves.is_empty():
        raise ValueError("curves has no row")
    by_seed = (
        curves.with_columns(pl.col("accuracy").fill_nan(None))
        .pivot(on="seed", index="step", values="accuracy")
        .sort("step")
        .with_columns(pl.exclude("step").forward_fill())
    )
    return by_seed.select("step", accuracy=pl.concat_list(pl.exclude("step")).list.median())


def evidence(
    table: pl.DataFrame, condition: str, mechanism: str, *, role: str = "final", by: str = "seed"
) -> pl.DataFrame:
    """Rows of a table of `StudyResults` of one condition and mechanism, in the order of `by`: final seeds count."""
    rows = _partition(_Identical(table)).get((role, condition, mechanism))
    return table.clear() if rows is None else rows.sort(by)


class _Identical:
    """A table that is equal to itself alone: tables have no hash."""

    def __init__(self, table: pl.DataFrame) -> None:
        self.table = table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identical) and self.table is other.table

    def __hash__(self) -> int:
        return id(self.table)


@lru_cache(maxsize=8)  # a report asks for thousands of parts of a few tables
def _partition(identical: _Identical) -> dict[tuple[object, ...], pl.DataFrame]:
    return identical.table.partition_by("role", "condition", "mechanism", as_dict=True, maintain_order=True)


@lru_cache(maxsize=4)  # figures, tables and sentences all ask for them
def summaries(results: StudyResults) -> list[Summary]:
    """One summary for each condition and mechanism that has final seeds, in the study's order.

    Raises:
        ValueError: If an accuracy is not a finite number, or final seeds ran at several learning rates.
    """
    return [
        summarize(rows, results.steps)
        for condition in results.conditions
        for mechanism in results.mechanisms
        if not (rows := evidence(results.seeds, condition.label, mechanism)).is_empty()
    ]


@lru_cache(maxsize=4)
def tuning_summaries(results: StudyResults) -> list[TuningSummary]:
    """One summary for each setting tried on tuning seeds, by ascending rate and gain, in the study's order.

    Raises:
        ValueError: If an accuracy is not a finite number.
    """
    chosen = {(summary.condition, summary.mechanism): summary.setting for summary in summaries(results)}
    tuning = results.seeds.filter(pl.col("role") == "tuning").sort(Setting._fields)
    found = []
    for condition in results.conditions:
        for mechanism in results.mechanisms:
            cell = tuning.filter(pl.col("condition") == condition.label, pl.col("mechanism") == mechanism)
            for rows in cell.partition_by(Setting._fields, maintain_order=True):
                setting = setting_of(rows)
                found.append(
                    TuningSummary(
                        condition=condition.label,
                        mechanism=mechanism,
                        setting=setting,
                        seeds=rows.height,
                        solved=int(rows["solved"].sum()),
                        accuracy=_mean(rows, "accuracy" if results.protocol < 3 else "validation"),
                        chosen=chosen.get((condition.label, mechanism)) == setting,
                    )
                )
    return found


def summarize(rows: pl.DataFrame, all_steps: int = 0) -> Summary:
    """Summary of the final rows of one condition and mechanism.

    Args:
        rows: The rows.
        all_steps: Steps of a seed that does not end early; fewer than some seed took: that many.
    """
    rates = rows["learning_rate"].unique().sort().to_list()
    if len(rates) > 1:
        raise ValueError(f"{_where(rows)}: final seeds ran at several learning rates: {rates}")
    accuracy = finite(rows["accuracy"].to_list(), f"{_where(rows)}: accuracy")
    steps = max(all_steps, int(rows["steps"].to_numpy().max()))
    few, unknown = rows.height < 3, rows["validation"].null_count() > 0
    solved = int(rows["solved"].sum())
    return Summary(
        condition=rows["condition"][0],
        mechanism=rows["mechanism"][0],
        setting=setting_of(rows),
        seeds=rows.height,
        solved=solved,
        solved_interval=wilson_interval(solved, rows.height),
        accuracy=float(accuracy.mean()),
        accuracy_interval=mean_interval(accuracy.tolist()),
        best_of_three=None if few or unknown else best_of(rows["validation"].to_numpy(), accuracy),
        cross_entropy=float(rows["cross_entropy"].to_numpy().mean()),
        rollout_digits=_mean_if_any(rows, "rollout_digits"),
        rollout_exact=_mean_if_any(rows, "rollout_exact"),
        median_steps=median_steps(rows["steps_to_solve"].to_list(), steps),
        restricted_steps=float(np.mean(restricted_steps(rows["steps_to_solve"].to_list(), steps))),
        steps=steps,
        diverged=rows.height - rows["diverged_at"].null_count(),
    )


def _where(rows: pl.DataFrame) -> str:
    return f"{rows['condition'][0]}, {mechanism_name(rows['mechanism'][0])}"


def _mean(rows: pl.DataFrame, column: str) -> float:
    return float(finite(rows[column].to_list(), f"{_where(rows)}: {column}").mean())


def _mean_if_any(rows: pl.DataFrame, column: str) -> float | None:
    return None if rows[column].null_count() == rows.height else _mean(rows, column)
