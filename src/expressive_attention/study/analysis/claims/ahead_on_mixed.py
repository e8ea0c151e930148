"""The claim that EA is ahead where one model learns several tasks."""

from __future__ import annotations

from ...runs.results import StudyResults
from ...words import plural
from ..comparisons import BASELINE
from ..estimators import MINIMUM_FOR_INTERVAL
from ._base import (
    AHEAD,
    CANDIDATE,
    OVER,
    UNTESTED,
    Answer,
    Declared,
    UntestableError,
    conditions_led,
    lead_counts,
    listed,
    margins_of,
    over_conditions,
    sample_size,
    side_of_zero,
    tested_comparisons,
)

__all__ = []


def _ahead_on_mixed(results: StudyResults) -> Answer:
    mixed = {condition.label for condition in results.conditions if condition.task.get("kind") == "multi"}
    if not mixed:
        raise UntestableError("the study has no mixed task", sample_size([]))
    compared = [found for found in tested_comparisons(results) if found.condition in mixed]
    if not compared:
        raise UntestableError(f"no mixed task has {MINIMUM_FOR_INTERVAL} pairs of seeds", sample_size([]))
    over = over_conditions(margins_of(compared))
    ahead, behind = conditions_led(compared, CANDIDATE), conditions_led(compared, BASELINE)
    where = lead_counts(compared)
    where += f" EA is ahead on: {listed(ahead)}." if ahead else ""
    where += f" DPA is ahead on: {listed(behind)}." if behind else ""
    if len(mixed) > len(compared):
        where += f" {plural(len(mixed) - len(compared), 'mixed condition')} not tested ({UNTESTED})."
    return Answer(side_of_zero(over.interval), f"{where} {over.scope}", f"EA - DPA {over}", sample_size(compared))


CLAIM = Declared(
    "Is EA ahead where one model learns several tasks at once?",
    f"{OVER} {AHEAD}.",
    "difference",
    _ahead_on_mixed,
)
