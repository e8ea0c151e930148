"""The numbers behind each figure, as tables; every condition is in them, also where a figure shows only some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import polars as pl

from ...analysis.comparisons import comparisons
from ...analysis.estimators import Interval
from ...analysis.summaries import evidence, median_curve, summaries
from ...analysis.survival import solve_curve
from ...config.condition import Condition
from ...runs.results import StudyResults
from ..attention import AttentionMap
from .layout import finished_conditions
from .theme import PREDICTORS, predictors_of

__all__ = ["FIGURE_DATA", "attention_table", "split_table"]

_SPLITS = {
    "condition": pl.String,
    "mechanism": pl.String,
    "split": pl.String,
    "group": pl.Int64,
    "name": pl.String,
    "count": pl.Int64,
    "seeds": pl.UInt32,
    "accuracy": pl.Float64,  # mean over seeds
    "lowest": pl.Float64,  # of a seed
    "highest": pl.Float64,
    "ceiling": pl.Float64,
}


def accuracy_table(results: StudyResults) -> pl.DataFrame:
    """Accuracy of each seed, of their mean with its interval, and of the predictors that need no training."""
    rows: list[dict[str, Any]] = []
    for condition in finished_conditions(results):
        about = {"condition": condition.label, "bits": condition.facts["complexity"]}
        rows += [
            {**about, "shown": PREDICTORS[fact][0], "accuracy": value}
            for fact, value in predictors_of(condition).items()
        ]
    bits = {condition.label: condition.facts["complexity"] for condition in results.conditions}
    for found in summaries(results):
        about = {"condition": found.condition, "bits": bits[found.condition], "mechanism": found.mechanism}
        seeds = evidence(results.seeds, found.condition, found.mechanism).select("seed", "accuracy")
        rows += [{**about, "shown": "seed", **row} for row in seeds.iter_rows(named=True)]
        rows.append({**about, "shown": "mean", "accuracy": found.accuracy, **_ends(found.accuracy_interval)})
    columns = {"condition": pl.String, "bits": pl.Float64, "mechanism": pl.String, "shown": pl.String}
    return _table(rows, columns | {"seed": pl.Int64, "accuracy": pl.Float64} | _ENDS)


def solved_table(results: StudyResults) -> pl.DataFrame:
    """Seeds solved, their share and its interval."""
    rows = [
        {
            "condition": found.condition,
            "mechanism": found.mechanism,
            "solved": found.solved,
            "seeds": found.seeds,
            "share": found.solved / found.seeds,
            **_ends(found.solved_interval),
        }
        for found in summaries(results)
    ]
    columns = {"condition": pl.String, "mechanism": pl.String, "solved": pl.Int64, "seeds": pl.Int64}
    return _table(rows, columns | {"share": pl.Float64} | _ENDS)


def difference_table(results: StudyResults) -> pl.DataFrame:
    """Difference of each pair of seeds, and of their mean with its interval."""
    rows: list[dict[str, Any]] = []
    for found in comparisons(results):
        about = {
            "condition": found.condition,
            "mechanism": found.candidate.mechanism,
            "minus": found.baseline.mechanism,
        }
        rows += [
            {**about, "shown": "pair", "seed": seed, "difference": difference}
            for seed, difference in zip(found.seeds, found.differences, strict=True)
        ]
        rows.append({**about, "shown": "mean", "difference": found.difference, **_ends(found.interval)})
    columns = {"condition": pl.String, "mechanism": pl.String, "minus": pl.String, "shown": pl.String}
    return _table(rows, columns | {"seed": pl.Int64, "difference": pl.Float64} | _ENDS)


def margin_map_table(results: StudyResults) -> pl.DataFrame:
    """Mean difference by model and task, and who is ahead."""
    rows = [
        {
            **_place(found.condition, results.conditions),
            "mechanism": found.candidate.mechanism,
            "minus": found.baseline.mechanism,
            "difference": found.difference,
            **_ends(found.interval),
            "pairs": len(found.differences),
            "ahead": found.leader,
        }
        for found in comparisons(results)
    ]
    columns = {"mechanism": pl.String, "minus": pl.String, "difference": pl.Float64} | _ENDS
    return _table(rows, _PLACE | columns | {"pairs": pl.Int64, "ahead": pl.String})


def solved_map_table(results: StudyResults) -> pl.DataFrame:
    """Share of seeds solved by model and task."""
    rows = [
        {
            **_place(found.condition, results.conditions),
            "mechanism": found.mechanism,
            "solved": found.solved,
            "seeds": found.seeds,
            "share": found.solved / found.seeds,
        }
        for found in summaries(results)
    ]
    columns = {"mechanism": pl.String, "solved": pl.Int64, "seeds": pl.Int64, "share": pl.Float64}
    return _table(rows, _PLACE | columns)


def learning_table(results: StudyResults) -> pl.DataFrame:
    """Validation accuracy of each seed and of their median, at each evaluation."""
    keys = ["condition", "mechanism", "shown", "seed", "step", "accuracy"]
    final = results.curves.filter(pl.col("role") == "final")
    parts = [final.with_columns(shown=pl.lit("seed")).select(keys)]
    parts += [
        median_curve(rows)
        .with_columns(
            condition=pl.lit(rows["condition"][0]),
            mechanism=pl.lit(rows["mechanism"][0]),
            shown=pl.lit("median"),
            seed=pl.lit(None, dtype=pl.Int64),
        )
        .select(keys)
        for rows in final.partition_by("condition", "mechanism", maintain_order=True)
    ]
    return pl.concat(parts)


def steps_table(results: StudyResults) -> pl.DataFrame:
    """Share of seeds solved, from each step on."""
    rows: list[dict[str, Any]] = []
    for found in summaries(results):
        seeds = evidence(results.seeds, found.condition, found.mechanism)
        for step, share in zip(*solve_curve(seeds["steps_to_solve"].to_list(), found.steps), strict=True):
            rows.append({"condition": found.condition, "mechanism": found.mechanism, "step": step, "share": share})
    return _table(rows, {"condition": pl.String, "mechanism": pl.String, "step": pl.Float64, "share": pl.Float64})


def split_table(results: StudyResults) -> pl.DataFrame:
    """Mean accuracy over final seeds by group of test positions, lowest and highest seed, and best predictor."""
    keys = ["condition", "mechanism", "split", "group", "name"]
    return (
        results.splits.filter(pl.col("role") == "final")
        .group_by(keys, maintain_order=True)
        .agg(
            pl.col("count").first(),
            seeds=pl.len(),
            accuracy=pl.col("accuracy").mean(),
            lowest=pl.col("accuracy").min(),
            highest=pl.col("accuracy").max(),
            ceiling=pl.col("ceiling").first(),
        )
        .cast(_SPLITS)  # pyright: ignore[reportArgumentType]
    )


def attention_table(maps: Sequence[AttentionMap]) -> pl.DataFrame:
    """One row per weight."""
    rows = [
        {
            "condition": found.condition,
            "mechanism": found.mechanism,
            "rank": found.rank,
            "seed": found.seed,
            "accuracy": found.accuracy,
            "layer": found.layer,
            "query": query,
            "key": key,
            "weight": weight,
        }
        for found in maps
        for query, weights in enumerate(found.weights.tolist())
        for key, weight in enumerate(weights)
    ]
    return pl.DataFrame(rows)


FIGURE_DATA: dict[str, Callable[[StudyResults], pl.DataFrame]] = {
    "accuracy": accuracy_table,
    "solved": solved_table,
    "difference": difference_table,
    "margin_map": margin_map_table,
    "solved_map": solved_map_table,
    "learning_curves": learning_table,
    "steps_to_solve": steps_table,
    "splits": split_table,
}

_ENDS = {"low": pl.Float64, "high": pl.Float64}
_PLACE = {"condition": pl.String, "model": pl.String, "task": pl.String, "bits": pl.Float64}


def _ends(interval: Interval | None) -> dict[str, float | None]:
    return {"low": interval.low if interval else None, "high": interval.high if interval else None}


def _place(label: str, conditions: Iterable[Condition]) -> dict[str, Any]:
    """Where in a map a condition is."""
    condition = next(found for found in conditions if found.label == label)
    named = (" ".join(f"{key}={value}" for key, value in part.items()) for part in (condition.model, condition.task))
    return dict(zip(_PLACE, (label, *named, condition.facts["complexity"]), strict=True))


def _table(rows: list[dict[str, Any]], columns: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=columns)
