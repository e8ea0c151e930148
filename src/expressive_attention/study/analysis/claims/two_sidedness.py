"""The claim that two-sidedness makes the difference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ...config.condition import Condition
from ...runs.results import StudyResults
from ...words import plural
from ..comparisons import comparisons
from ..estimators import MINIMUM_FOR_INTERVAL, SIGNIFICANCE, mean_interval
from ..significance import sign_flip_p
from ..wording import describe_interval, describe_p, mechanism_name
from ._base import Answer, Declared, UntestableError, over_conditions, sample_size

__all__ = ["SHAPES"]


# Mechanisms of one shape: the first weighs antiparallel keys as parallel ones, the second does not.
SHAPES = (
    ("expressive", "one_sided"),
    ("softmax_abs", "dot_product"),
    ("squared", "relu_squared"),
    ("sigmoid_abs", "sigmoid"),
    ("absolute", "relu"),
    ("quartic", "one_sided_quartic"),
)


def _two_sidedness(results: StudyResults) -> Answer:
    shapes = [shape for shape in SHAPES if set(shape) <= set(results.mechanisms)]
    if len(shapes) < MINIMUM_FOR_INTERVAL:
        raise UntestableError(
            f"the claim is about mechanisms, and needs {MINIMUM_FOR_INTERVAL} pairs of the same shape, two-sided and "
            f"one-sided; the study has {len(shapes)}",
            sample_size([]),
        )
    two, one = ([shape[side] for shape in shapes] for side in (0, 1))
    shifted = [condition for condition in results.conditions if condition.model.get("embedding_shift", 0.0)]
    counted = {found.condition for found in comparisons(results) if found.untested is None}
    plain = [each for each in results.conditions if each not in shifted and each.label in counted]
    accuracies = _accuracies(results, plain, [*two, *one])
    if accuracies is None:
        raise UntestableError(
            f"on no condition without a shift of the embeddings all mechanisms share {MINIMUM_FOR_INTERVAL} seeds",
            sample_size([]),
        )
    by_shape = _by_shape(accuracies)
    p, mean = sign_flip_p(by_shape.tolist()), float(by_shape.mean())
    answer = "undecided" if p >= SIGNIFICANCE else "supported" if mean > 0 else "contradicted"
    pairs = ", ".join(
        f"{mechanism_name(first)} {accuracies[index].mean():.3f} and {mechanism_name(second)} "
        f"{accuracies[index + len(shapes)].mean():.3f}"
        for index, (first, second) in enumerate(shapes)
    )
    over = over_conditions(_contrast(accuracies, len(two)))
    where = f"Mean accuracies, two-sided first: {pairs}. These mechanisms alone, over seeds: {over}."
    if (others := _accuracies(results, shifted, [*two, *one])) is not None:
        moved = _by_shape(others)
        where += (
            f" With a direction that all embeddings share: {moved.mean():+.3f} "
            f"({describe_interval(mean_interval(moved.tolist()), len(moved), '+.3f')} over pairs)."
        )
    conditions, seeds = accuracies.shape[1:]
    effect = (
        f"Two-sided - one-sided {mean:+.3f} "
        f"({describe_interval(mean_interval(by_shape.tolist()), len(by_shape), '+.3f')} over pairs; {describe_p(p)})"
    )
    n = f"{plural(len(shapes), 'pair')} of mechanisms, {plural(conditions, 'condition')}, {seeds} seeds each"
    return Answer(answer, where, effect, n)


def _by_shape(accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two-sided minus one-sided mechanism of each shape ``(shapes,)``, over conditions and seeds."""
    two, one = np.split(accuracies.mean((1, 2)), 2)
    return two - one


def _accuracies(
    results: StudyResults, conditions: Sequence[Condition], mechanisms: Sequence[str]
) -> NDArray[np.float64] | None:
    """Accuracies ``(mechanisms, conditions, seeds)`` of the seeds that all have, None if these are too few.

    Conditions on which they are too few are left out first.
    """
    final = results.seeds.filter(pl.col("role") == "final")
    found: list[dict[int, list[float]]] = []
    for condition in conditions:
        rows = final.filter(pl.col("condition") == condition.label)
        by_seed: dict[int, dict[str, float]] = {}
        for seed, mechanism, accuracy in rows.select("seed", "mechanism", "accuracy").iter_rows():
            by_seed.setdefault(seed, {})[mechanism] = accuracy
        complete = {
            seed: [reached[mechanism] for mechanism in mechanisms]
            for seed, reached in by_seed.items()
            if reached.keys() >= set(mechanisms)
        }
        if len(complete) >= MINIMUM_FOR_INTERVAL:
            found.append(complete)
    seeds = sorted(set.intersection(*(set(each) for each in found))) if found else []
    if len(seeds) < MINIMUM_FOR_INTERVAL:
        return None
    return np.array([[each[seed] for seed in seeds] for each in found]).transpose(2, 0, 1)


def _contrast(accuracies: NDArray[np.float64], two_sided: int) -> NDArray[np.float64]:
    """Mean over the first `two_sided` mechanisms minus that over the others, ``(conditions, seeds)``."""
    return accuracies[:two_sided].mean(0) - accuracies[two_sided:].mean(0)


CLAIM = Declared(
    "Is it two-sidedness that makes the difference?",
    f"The units are pairs of mechanisms of the same shape, at least {MINIMUM_FOR_INTERVAL}: mean accuracy of the "
    "two-sided minus that of the one-sided one, over conditions without a shift of the embeddings and the seeds "
    f"that all have. The sign-flip test over pairs gives p < {SIGNIFICANCE}, and the mean is above 0: supported; "
    "below 0: contradicted.",
    "accuracy",
    _two_sidedness,
)
