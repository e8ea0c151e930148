"""The claim that EA is at least as good as DPA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...runs.results import StudyResults
from ...words import plural
from ..comparisons import BASELINE, Comparison
from ..estimators import LEVEL, SMALLEST_EFFECT, upper_bound
from ..wording import describe_interval
from ._base import (
    AHEAD,
    CANDIDATE,
    UNTESTED,
    Answer,
    Declared,
    conditions_led,
    interval_of,
    lead_counts,
    listed,
    sample_size,
    tested_comparisons,
)

__all__ = ["NON_INFERIORITY_MARGIN", "NON_INFERIORITY_PAIRS"]


NON_INFERIORITY_MARGIN = SMALLEST_EFFECT  # by which EA may fall short and still count as at least as good
NON_INFERIORITY_PAIRS = 16


def _at_least_as_good(results: StudyResults) -> Answer:
    compared = tested_comparisons(results)
    ahead, behind = conditions_led(compared, CANDIDATE), conditions_led(compared, BASELINE)
    lows = {found.condition: interval_of(found).low for found in compared}
    if behind:
        deciding = min((found for found in compared if found.condition in behind), key=lambda found: found.difference)
    else:
        deciding = min(compared, key=lambda found: lows[found.condition])
    few = [found.condition for found in compared if len(found.differences) < NON_INFERIORITY_PAIRS]
    neither = [found.condition for found in compared if found.neither_learned]
    inferior = [label for label, low in lows.items() if low <= -NON_INFERIORITY_MARGIN]
    untested = len(results.conditions) - len(compared)
    open_anywhere = inferior or few or neither or untested
    answer = "contradicted" if behind else "undecided" if open_anywhere else "supported"
    where = lead_counts(compared)
    leads = [(labels, name) for labels, name in ((behind, "DPA"), (ahead, "EA")) if labels]
    if leads:
        minority, name = min(leads, key=lambda lead: len(lead[0]))
        where += f" {name} is ahead on: {listed(minority)}."
    open_ones = [label for label in inferior if label not in behind]
    if open_ones:
        where += f" A loss of more than {NON_INFERIORITY_MARGIN} is not excluded on: {listed(open_ones)}."
    if few:
        where += f" On {plural(len(few), 'condition')} there are fewer than {NON_INFERIORITY_PAIRS} pairs of seeds."
    if untested:
        where += f" {plural(untested, 'condition')} not tested ({UNTESTED})."
    told = "DPA is furthest ahead" if behind else "the lowest interval is"
    effect = (
        f"EA - DPA {np.mean([found.difference for found in compared]):+.3f} on average; {told} on "
        f"{deciding.condition}: {deciding.difference:+.3f} "
        f"({describe_interval(deciding.interval, len(deciding.differences), '+.3f')}). {_not_excluded(compared)}"
    )
    return Answer(answer, where, effect, sample_size(compared))


def _not_excluded(compared: Sequence[Comparison]) -> str:
    """A note on losses that so few seeds cannot exclude: an interval of a few seeds misses a rare collapse."""
    bounds = {
        found.condition: upper_bound(
            sum(d < -NON_INFERIORITY_MARGIN for d in found.differences), len(found.differences)
        )
        for found in compared
    }
    worst = max(bounds, key=lambda label: bounds[label])
    smallest = min(bounds.values())
    return (
        f"By exact 95% bounds, EA may fall short by more than {NON_INFERIORITY_MARGIN} on up to {smallest:.0%} of "
        f"seeds on its best condition, and on up to {bounds[worst]:.0%} on {worst}"
    )


CLAIM = Declared(
    "Is EA at least as good as DPA?",
    f"{AHEAD}. Contradicted if DPA is ahead on any. Supported if on every condition, with at least "
    f"{NON_INFERIORITY_PAIRS} pairs, the {LEVEL:.0%} interval of EA - DPA lies above -{NON_INFERIORITY_MARGIN}, "
    "and some mechanism has learned; since all have to pass, the level needs no correction. The interval is of the "
    "seeds seen: an exact bound says how often EA may fall short without having been seen to.",
    "difference",
    _at_least_as_good,
)
