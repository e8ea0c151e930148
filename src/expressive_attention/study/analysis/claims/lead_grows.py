"""The claim that EA's lead grows with complexity."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from ...runs.results import StudyResults
from ...words import plural
from ..estimators import LEVEL, MINIMUM_FOR_INTERVAL
from ..trend import trend
from ..wording import describe_interval, describe_p
from ._base import (
    CANDIDATE,
    Answer,
    Declared,
    UntestableError,
    conditions_led,
    in_bits,
    lead_counts,
    margins_of,
    sample_size,
    side_of_zero,
    tested_comparisons,
)

__all__ = []


def _lead_grows(results: StudyResults) -> Answer:
    compared = tested_comparisons(results)
    margins = margins_of(compared)
    facts = {condition.label: condition for condition in results.conditions}
    bits = [float(facts[found.condition].facts["complexity"]) for found in compared]
    models = [json.dumps(facts[found.condition].model, sort_keys=True) for found in compared]
    found = trend(bits, margins, [models.index(model) for model in models])
    if found is None:
        raise UntestableError("no model meets several complexities", sample_size(compared))
    if found.interval is None:
        raise UntestableError(
            f"{plural(found.conditions, 'condition')} of {plural(found.groups, 'model')} with several complexities "
            f"are too few for an interval of a slope; {MINIMUM_FOR_INTERVAL} more than models are needed",
            sample_size(compared),
        )
    effect = (
        f"EA - DPA per bit of complexity {found.slope:+.4f} "
        f"({describe_interval(found.interval, margins.shape[1], '+.4f')}); Kendall's tau-b {found.tau:+.2f} "
        f"({describe_p(found.tau_p)})"
    )
    where = f"EA - DPA averages {_by_complexity(np.array(bits), margins.mean(1))}. {lead_counts(compared)}"
    answer = side_of_zero(found.interval)
    if answer == "supported" and not conditions_led(compared, CANDIDATE):
        answer = "undecided"  # the margin grows, but it is no lead
    return Answer(answer, where, effect, f"{sample_size(compared)}, {plural(found.groups, 'model')}")


def _by_complexity(bits: NDArray[np.float64], margins: NDArray[np.float64]) -> str:
    """The mean margin in the lower, middle and upper third of the complexities: a lead may rise and fall again."""
    thirds = [third for third in np.array_split(np.unique(bits), 3) if third.size]
    return ", ".join(f"{margins[np.isin(bits, third)].mean():+.3f} at {in_bits(third)}" for third in thirds)


CLAIM = Declared(
    "Does EA's lead grow with complexity?",
    "Slope of the mean paired difference in accuracy per bit of complexity, by least squares with an intercept for "
    f"each model. Its {LEVEL:.0%} bootstrap interval over conditions and seeds lies above 0, and EA is "
    "ahead on some condition: supported; below 0: contradicted. The slope is one test, whatever the number of "
    "conditions.",
    "margin_map",
    _lead_grows,
)
