"""The claim that EA alone solves a range of complexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...config.declared import EXCLUSIVE_RANGE, alone
from ...runs.results import StudyResults
from ...words import plural
from ..comparisons import BASELINE, comparisons
from ..estimators import exact_interval, false_range_probability
from ..summaries import evidence
from ._base import (
    CANDIDATE,
    SHOWN,
    UNTESTED,
    Answer,
    Declared,
    in_bits,
    is_tested,
    listed,
    probability,
    span_of,
    tested_comparisons,
)

__all__ = ["ExclusiveRange", "exclusive_ranges"]


@dataclass(frozen=True)
class ExclusiveRange:
    """Whether one of EA and DPA has a condition to itself: solves at least 90% of seeds, the other less than 50%.

    Attributes:
        condition: Its label.
        complexity: In bits.
        owner: ``"expressive"`` or ``"dot_product"``, by the shares of final seeds solved: a candidate; None if neither.
        confirmed: Whether the fresh seeds say the same; None: not all are there yet, or none were asked for.
        ea: Final seeds that EA solved, and their number.
        dpa: The same for DPA.
        ea_fresh: The same for EA's confirming seeds.
        dpa_fresh: The same for DPA's confirming seeds.
        excluded: Whether the final seeds exclude, by exact bounds, that it is EA's.
    """

    condition: str
    complexity: float
    owner: str | None
    confirmed: bool | None
    ea: tuple[int, int]
    dpa: tuple[int, int]
    ea_fresh: tuple[int, int]
    dpa_fresh: tuple[int, int]
    excluded: bool


def exclusive_ranges(results: StudyResults) -> list[ExclusiveRange]:
    """The classification of each condition that is counted."""
    counted = {found.condition for found in comparisons(results) if is_tested(found)}
    found = []
    for condition in results.conditions:
        if condition.label not in counted:
            continue
        ea, dpa, ea_fresh, dpa_fresh = (
            _solved(results, condition.label, mechanism, role)
            for role in ("final", "confirmation")
            for mechanism in (CANDIDATE, BASELINE)
        )
        owner = CANDIDATE if alone(ea, dpa) else BASELINE if alone(dpa, ea) else None
        confirmed = None
        if owner is not None and min(ea_fresh[1], dpa_fresh[1]) >= max(results.confirmation, 1):
            confirmed = alone(ea_fresh, dpa_fresh) if owner == CANDIDATE else alone(dpa_fresh, ea_fresh)
        complexity = float(condition.facts["complexity"])
        found.append(
            ExclusiveRange(
                condition.label, complexity, owner, confirmed, ea, dpa, ea_fresh, dpa_fresh, _excluded(ea, dpa)
            )
        )
    return found


def _solved(results: StudyResults, condition: str, mechanism: str, role: str) -> tuple[int, int]:
    rows = evidence(results.seeds, condition, mechanism, role=role)
    return int(rows["solved"].sum()), len(rows)


def _excluded(ea: tuple[int, int], dpa: tuple[int, int]) -> bool:
    """Whether the seeds exclude, with an error of 5%, that EA's share is 90% or more and DPA's below 50%.

    Either bound will do: each has half of the error.
    """
    reached, missed = EXCLUSIVE_RANGE
    return exact_interval(*ea).high < reached or exact_interval(*dpa).low >= missed


def _exclusive_range(results: StudyResults) -> Answer:
    tested_comparisons(results)
    ranges = exclusive_ranges(results)
    own = [found for found in ranges if found.owner == CANDIDATE]
    other = [found for found in ranges if found.owner == BASELINE]
    confirmed = [found for found in own if found.confirmed]
    untested = len(results.conditions) - len(ranges)
    none_left = not untested and all(found.excluded for found in ranges)
    answer = "supported" if confirmed else "contradicted" if none_left else "undecided"
    where = f"{_range('EA', own)} {_range('DPA', other)}"
    if untested:
        where += f" {plural(untested, 'condition')} not tested ({UNTESTED})."
    waiting = [found for found in (*own, *other) if found.confirmed is None]
    if waiting:
        where += f" Not all fresh seeds are there yet on: {listed([found.condition for found in waiting])}."
    effect = (
        f"EA: {plural(len(own), 'candidate')}, {len(confirmed)} confirmed; DPA: {plural(len(other), 'candidate')}, "
        f"{sum(bool(found.confirmed) for found in other)} confirmed. {_fresh_counts(own, other)}"
        f"An exclusive range of EA is excluded on {sum(found.excluded for found in ranges)} of {len(ranges)}"
    )
    fresh = max((found.ea_fresh[1] for found in ranges), default=0)
    if fresh and own:
        by_chance = min(1.0, len(own) * false_range_probability(fresh))
        effect += (
            f"; equal mechanisms would confirm one of {len(own)} with probability {probability(by_chance)} at most"
        )
    seeds = [n for found in ranges for _, n in (found.ea, found.dpa)]
    return Answer(answer, where, effect, f"{plural(len(ranges), 'condition')}, {span_of(seeds)} seeds each")


def _fresh_counts(own: Sequence[ExclusiveRange], other: Sequence[ExclusiveRange]) -> str:
    """The counts of the fresh seeds of the first few candidates, with exact intervals of the shares."""
    told = []
    for found in [found for found in (*own, *other) if found.confirmed is not None][:SHOWN]:
        shares = [
            f"{name} {solved}/{n} ({exact_interval(solved, n):.2f})"
            for name, (solved, n) in (("EA", found.ea_fresh), ("DPA", found.dpa_fresh))
        ]
        told.append(f"Fresh seeds on {found.condition}: {', '.join(shares)}. ")
    return "".join(told)


def _range(name: str, owned: Sequence[ExclusiveRange]) -> str:
    if not owned:
        return f"{name} has no candidate."
    at = in_bits(np.array([found.complexity for found in owned]))
    named = listed([found.condition for found in owned])
    return f"{name} has {plural(len(owned), 'candidate')} by the final seeds, at {at}: {named}."


CLAIM = Declared(
    "Is there a range of complexity that EA alone solves?",
    f"A condition is a candidate if EA solves at least {EXCLUSIVE_RANGE[0]:.0%} of the final seeds and DPA less "
    f"than {EXCLUSIVE_RANGE[1]:.0%}. Supported if the same counts hold for the fresh seeds of a candidate. "
    "Contradicted if on every condition exact bounds, at 5%, exclude such shares; since all have to be excluded, "
    "the level needs no correction.",
    "solved",
    _exclusive_range,
)
