"""Verdicts on the paper's claims, each by a test that is declared here, before a study runs.

docs/statistics.md has the reasons. Two rules hold throughout:

- A mechanism is *ahead* on a condition where `Comparison.leader` says so: by the sign-flip test, with Holm's
  adjustment over the declared family, and by at least the smallest effect.
- A condition whose test is too small (`Comparison.untested`) is not counted.
- A difference *over* conditions is the mean of their means. With at least `MINIMUM_FOR_INTERVAL` conditions its
  interval is that of `clustered_interval` and speaks of conditions like these; with fewer, it is that of the seeds'
  means over these conditions and speaks of these alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..config.exclusive import EXCLUSIVE_RANGE, alone
from ..runs.results import Condition, StudyResults
from .estimators import (
    LEVEL,
    MINIMUM_FOR_INTERVAL,
    SIGNIFICANCE,
    SMALLEST_EFFECT,
    Interval,
    clustered_interval,
    exact_interval,
    false_range_probability,
    holm,
    lower_bound,
    mean_interval,
    sign_flip_p,
    trend,
    upper_bound,
)
from .summaries import (
    BASELINE,
    MINIMUM_CONTEXTS,
    MINIMUM_PREDICTIONS,
    Comparison,
    comparisons,
    describe_interval,
    describe_p,
    evidence,
    mechanism_name,
)

__all__ = [
    "NON_INFERIORITY_MARGIN",
    "NON_INFERIORITY_PAIRS",
    "SHAPES",
    "ExclusiveRange",
    "Verdict",
    "exclusive_ranges",
    "verdicts",
]

NON_INFERIORITY_MARGIN = SMALLEST_EFFECT  # by which EA may fall short and still count as at least as good
NON_INFERIORITY_PAIRS = 16
# Mechanisms of one shape: the first weighs antiparallel keys as parallel ones, the second does not.
SHAPES = (
    ("expressive", "one_sided"),
    ("softmax_abs", "dot_product"),
    ("squared", "relu_squared"),
    ("sigmoid_abs", "sigmoid"),
    ("absolute", "relu"),
    ("quartic", "one_sided_quartic"),
)

_CANDIDATE = "expressive"
_SHOWN = 3  # conditions named in a sentence
_FEW = f"fewer than {MINIMUM_FOR_INTERVAL} pairs of seeds"
_UNTESTED = f"{_FEW}, or too small a test"


@dataclass(frozen=True)
class Verdict:
    """What a study says about one claim.

    Attributes:
        claim: Its name in the configuration, `study.config.Claim`, e.g. ``"lead_grows"``.
        question: What is asked, e.g. ``"Does EA's lead grow with complexity?"``.
        answer: ``"supported"``, ``"contradicted"`` or ``"undecided"``.
        where: Under which conditions what is ahead, in words; where the results do not allow the test, why.
        effect: The effect with its interval; empty where the results do not allow the test.
        n: What it rests on, e.g. ``"27 conditions, 16 pairs of seeds each"``.
        test: The declared test with its threshold and how multiplicity is handled, in a few sentences.
        evidence: Anchor of the report's figure: ``"difference"``, ``"accuracy"``, ``"solved"``, ``"margin_map"``
            or ``"splits"``.
    """

    claim: str
    question: str
    answer: str
    where: str
    effect: str
    n: str
    test: str
    evidence: str


def verdicts(results: StudyResults, claims: Sequence[str]) -> list[Verdict]:
    """One verdict for each claim, in the order asked.

    Only final seeds count, and EA is compared with DPA whatever other mechanisms the study has. A claim that the
    results do not allow to test (too few seeds, no mixed task, a mechanism missing) is undecided.

    Args:
        results: The study, finished or not.
        claims: Names of claims, as in `study.config.Claim`.

    Raises:
        ValueError: A name is no claim, or a measure is not a finite number.
    """
    unknown = [claim for claim in claims if claim not in _CLAIMS]
    if unknown:
        raise ValueError(f"claims must be of {list(_CLAIMS)}, got {unknown[0]!r}")
    found = []
    for claim in claims:
        declared = _CLAIMS[claim]
        try:
            answer = declared.judge(results)
        except _UntestableError as reason:
            answer = _Answer("undecided", where=f"Not tested: {reason}.", effect="", n=str(reason.n))
        found.append(
            Verdict(
                claim=claim, question=declared.question, answer=answer.answer, where=answer.where,
                effect=answer.effect, n=answer.n, test=declared.test, evidence=declared.evidence,
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class _Answer:
    """What depends on the results, as in `Verdict`."""

    answer: str
    where: str
    effect: str
    n: str


@dataclass(frozen=True)
class _Declared:
    """What is settled before a study runs, as in `Verdict`."""

    question: str
    test: str
    evidence: str
    judge: Callable[[StudyResults], _Answer]


class _UntestableError(Exception):
    """The results do not allow the test; the message says why, `n` what there is."""

    def __init__(self, reason: str, n: str) -> None:
        super().__init__(reason)
        self.n = n


# ---- at least as good ----


def _at_least_as_good(results: StudyResults) -> _Answer:
    compared = _tested(results)
    ahead, behind = _leading(compared, _CANDIDATE), _leading(compared, BASELINE)
    lows = {found.condition: _interval(found).low for found in compared}
    worst = min(compared, key=lambda found: lows[found.condition])
    few = [found.condition for found in compared if len(found.differences) < NON_INFERIORITY_PAIRS]
    neither = [found.condition for found in compared if found.neither_learned]
    inferior = [label for label, low in lows.items() if low <= -NON_INFERIORITY_MARGIN]
    untested = len(results.conditions) - len(compared)
    open_anywhere = inferior or few or neither or untested
    answer = "contradicted" if behind else "undecided" if open_anywhere else "supported"
    where = _counts(compared)
    leads = [(labels, name) for labels, name in ((behind, "DPA"), (ahead, "EA")) if labels]
    if leads:
        minority, name = min(leads, key=lambda lead: len(lead[0]))
        where += f" {name} is ahead on: {_named(minority)}."
    open_ones = [label for label in inferior if label not in behind]
    if open_ones:
        where += f" A loss of more than {NON_INFERIORITY_MARGIN} is not excluded on: {_named(open_ones)}."
    if few:
        where += f" On {_plural(len(few), 'condition')} there are fewer than {NON_INFERIORITY_PAIRS} pairs of seeds."
    if untested:
        where += f" {_plural(untested, 'condition')} not tested ({_UNTESTED})."
    where += f" {_not_excluded(compared)}"
    effect = (
        f"EA - DPA {np.mean([found.difference for found in compared]):+.3f} on average; least certain on "
        f"{worst.condition}: {worst.difference:+.3f} "
        f"({describe_interval(worst.interval, len(worst.differences), '+.3f')})"
    )
    return _Answer(answer, where, effect, _size(compared))


def _not_excluded(compared: Sequence[Comparison]) -> str:
    """A note on what so few seeds cannot exclude: an interval knows the seeds it saw, and no rare collapse is there."""
    bounds = {
        found.condition: upper_bound(
            sum(d < -NON_INFERIORITY_MARGIN for d in found.differences), len(found.differences)
        )
        for found in compared
    }
    worst = max(bounds, key=lambda label: bounds[label])
    smallest = min(bounds.values())
    return (
        f"Not excluded, by exact 95% bounds: that EA falls short by more than {NON_INFERIORITY_MARGIN} on "
        f"{smallest:.0%} of seeds on any condition, and on {bounds[worst]:.0%} on {worst}."
    )


# ---- growing lead ----


def _lead_grows(results: StudyResults) -> _Answer:
    compared = _tested(results)
    margins = _margins(compared)
    facts = {condition.label: condition for condition in results.conditions}
    bits = [float(facts[found.condition].facts["complexity"]) for found in compared]
    models = [json.dumps(facts[found.condition].model, sort_keys=True) for found in compared]
    found = trend(bits, margins, [models.index(model) for model in models])
    if found is None:
        raise _UntestableError("no model meets several complexities", _size(compared))
    if found.interval is None:
        raise _UntestableError(
            f"{_plural(found.conditions, 'condition')} of {_plural(found.groups, 'model')} with several complexities "
            f"are too few for an interval of a slope; {MINIMUM_FOR_INTERVAL} more than models are needed",
            _size(compared),
        )
    effect = (
        f"EA - DPA per bit of complexity {found.slope:+.4f} "
        f"({describe_interval(found.interval, margins.shape[1], '+.4f')}); Kendall's tau-b {found.tau:+.2f} "
        f"({describe_p(found.tau_p)})"
    )
    where = f"EA - DPA averages {_by_complexity(np.array(bits), margins.mean(1))}. {_counts(compared)}"
    answer = _side(found.interval)
    if answer == "supported" and not _leading(compared, _CANDIDATE):
        answer = "undecided"  # what grows is no lead
    return _Answer(answer, where, effect, f"{_size(compared)}, {_plural(found.groups, 'model')}")


def _by_complexity(bits: NDArray[np.float64], margins: NDArray[np.float64]) -> str:
    """The mean margin in the lower, middle and upper third of the complexities: a lead may rise and fall again."""
    thirds = [third for third in np.array_split(np.unique(bits), 3) if third.size]
    return ", ".join(f"{margins[np.isin(bits, third)].mean():+.3f} at {_bits(third)}" for third in thirds)


# ---- exclusive range ----


@dataclass(frozen=True)
class ExclusiveRange:
    """Whether one of EA and DPA has a condition to itself: solves at least 90% of seeds, the other less than 50%.

    Attributes:
        condition: Its label.
        complexity: In bits.
        owner: ``"expressive"`` or ``"dot_product"``, by the shares of final seeds solved: a candidate; None if neither.
        confirmed: Whether the fresh seeds say the same; None: there are none yet, or none were asked for.
        ea: Final seeds that EA solved, and their number.
        dpa: The same for DPA.
        ea_fresh: The same for EA's confirming seeds.
        dpa_fresh: The same for DPA's confirming seeds.
        excluded: By exact bounds, the final seeds exclude that it is EA's.
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
    counted = {found.condition for found in comparisons(results) if _is_tested(found)}
    found = []
    for condition in results.conditions:
        if condition.label not in counted:
            continue
        ea, dpa, ea_fresh, dpa_fresh = (
            _solved(results, condition.label, mechanism, role)
            for role in ("final", "confirmation")
            for mechanism in (_CANDIDATE, BASELINE)
        )
        owner = _CANDIDATE if alone(ea, dpa) else BASELINE if alone(dpa, ea) else None
        confirmed = None
        if owner is not None and min(ea_fresh[1], dpa_fresh[1]) > 0:
            confirmed = alone(ea_fresh, dpa_fresh) if owner == _CANDIDATE else alone(dpa_fresh, ea_fresh)
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


def _exclusive_range(results: StudyResults) -> _Answer:
    _tested(results)
    ranges = exclusive_ranges(results)
    own = [found for found in ranges if found.owner == _CANDIDATE]
    other = [found for found in ranges if found.owner == BASELINE]
    confirmed = [found for found in own if found.confirmed]
    untested = len(results.conditions) - len(ranges)
    none_left = not untested and all(found.excluded for found in ranges)
    answer = "supported" if confirmed else "contradicted" if none_left else "undecided"
    where = f"{_range('EA', own)} {_range('DPA', other)}"
    if untested:
        where += f" {_plural(untested, 'condition')} not tested ({_UNTESTED})."
    waiting = [found for found in (*own, *other) if found.confirmed is None]
    if waiting:
        where += f" No fresh seeds yet on: {_named([found.condition for found in waiting])}."
    effect = (
        f"EA: {_plural(len(own), 'candidate')}, {len(confirmed)} confirmed; DPA: {_plural(len(other), 'candidate')}, "
        f"{sum(bool(found.confirmed) for found in other)} confirmed. {_fresh_counts(own, other)}"
        f"That EA has a condition to itself is excluded on {sum(found.excluded for found in ranges)} of {len(ranges)}"
    )
    fresh = max((found.ea_fresh[1] for found in ranges), default=0)
    if fresh and own:
        by_chance = min(1.0, len(own) * false_range_probability(fresh))
        effect += (
            f"; equal mechanisms would confirm one of {len(own)} with probability {_probability(by_chance)} at most"
        )
    seeds = [n for found in ranges for _, n in (found.ea, found.dpa)]
    return _Answer(answer, where, effect, f"{_plural(len(ranges), 'condition')}, {_span(seeds)} seeds each")


def _fresh_counts(own: Sequence[ExclusiveRange], other: Sequence[ExclusiveRange]) -> str:
    """The counts of the fresh seeds of the first few candidates, with exact intervals of the shares."""
    told = []
    for found in [found for found in (*own, *other) if found.confirmed is not None][:_SHOWN]:
        shares = [
            f"{name} {solved}/{n} ({exact_interval(solved, n):.2f})"
            for name, (solved, n) in (("EA", found.ea_fresh), ("DPA", found.dpa_fresh))
        ]
        told.append(f"Fresh seeds on {found.condition}: {', '.join(shares)}. ")
    return "".join(told)


def _range(name: str, owned: Sequence[ExclusiveRange]) -> str:
    if not owned:
        return f"{name} has no condition to itself."
    at = _bits(np.array([found.complexity for found in owned]))
    named = _named([found.condition for found in owned])
    return f"{name} has {_plural(len(owned), 'condition')} to itself by the final seeds, at {at}: {named}."


# ---- mixed tasks ----


def _ahead_on_mixed(results: StudyResults) -> _Answer:
    mixed = {condition.label for condition in results.conditions if condition.task.get("kind") == "multi"}
    if not mixed:
        raise _UntestableError("the study has no mixed task", _size([]))
    compared = [found for found in _tested(results) if found.condition in mixed]
    if not compared:
        raise _UntestableError(f"no mixed task has {MINIMUM_FOR_INTERVAL} pairs of seeds", _size([]))
    over = _over_conditions(_margins(compared))
    ahead, behind = _leading(compared, _CANDIDATE), _leading(compared, BASELINE)
    where = _counts(compared)
    where += f" EA is ahead on: {_named(ahead)}." if ahead else ""
    where += f" DPA is ahead on: {_named(behind)}." if behind else ""
    if len(mixed) > len(compared):
        where += f" {_plural(len(mixed) - len(compared), 'mixed condition')} not tested ({_UNTESTED})."
    return _Answer(_side(over.interval), f"{where} {over.scope}", f"EA - DPA {over}", _size(compared))


# ---- codes of position ----


def _ahead_at_every_position(results: StudyResults) -> _Answer:
    compared = _tested(results)
    code = {condition.label: str(condition.model.get("position")) for condition in results.conditions}
    positions = list(dict.fromkeys(code.values()))
    if len(positions) < 2:
        raise _UntestableError(f"the study has one code of position alone, {positions[0]}", _size(compared))
    # The mean over a code's conditions, per seed: (seeds,) each.
    margins = {
        position: _margins(chosen).mean(0)
        for position in positions
        if (chosen := [found for found in compared if code[found.condition] == position])
    }
    p = dict(zip(margins, holm([sign_flip_p(values.tolist()) for values in margins.values()]), strict=True))
    means = {position: float(values.mean()) for position, values in margins.items()}
    ahead = [position for position in margins if p[position] < SIGNIFICANCE and means[position] > 0]
    behind = [position for position in margins if p[position] < SIGNIFICANCE and means[position] < 0]
    complete = len(compared) == len(results.conditions)
    answer = "contradicted" if behind else "supported" if complete and ahead == positions else "undecided"
    # Not "none", which is a code's name.
    where = f"EA is ahead with {', '.join(ahead) or 'no code'}, DPA with {', '.join(behind) or 'no code'}."
    if not complete:
        where += f" {_plural(len(results.conditions) - len(compared), 'condition')} not tested ({_UNTESTED})."
    effect = "EA - DPA " + "; ".join(
        f"{position} {means[position]:+.3f} "
        f"({describe_interval(mean_interval(values.tolist()), len(values), '+.3f')}; {describe_p(p[position])})"
        for position, values in margins.items()
    )
    return _Answer(answer, where, effect, f"{_size(compared)}, {len(margins)} codes of position")


# ---- two-sidedness ----


def _two_sidedness(results: StudyResults) -> _Answer:
    shapes = [shape for shape in SHAPES if set(shape) <= set(results.mechanisms)]
    if len(shapes) < MINIMUM_FOR_INTERVAL:
        raise _UntestableError(
            f"the claim is about mechanisms, and needs {MINIMUM_FOR_INTERVAL} pairs of the same shape, two-sided and "
            f"one-sided; the study has {len(shapes)}",
            _size([]),
        )
    two, one = ([shape[side] for shape in shapes] for side in (0, 1))
    shifted = [condition for condition in results.conditions if condition.model.get("embedding_shift", 0.0)]
    counted = {found.condition for found in comparisons(results) if found.untested is None}
    plain = [each for each in results.conditions if each not in shifted and each.label in counted]
    accuracies = _accuracies(results, plain, [*two, *one])
    if accuracies is None:
        raise _UntestableError(
            f"on no condition without a shift of the embeddings all mechanisms share {MINIMUM_FOR_INTERVAL} seeds",
            _size([]),
        )
    by_shape = _by_shape(accuracies)
    p, mean = sign_flip_p(by_shape.tolist()), float(by_shape.mean())
    answer = "undecided" if p >= SIGNIFICANCE else "supported" if mean > 0 else "contradicted"
    pairs = ", ".join(
        f"{mechanism_name(first)} {accuracies[index].mean():.3f} and {mechanism_name(second)} "
        f"{accuracies[index + len(shapes)].mean():.3f}"
        for index, (first, second) in enumerate(shapes)
    )
    over = _over_conditions(_contrast(accuracies, len(two)))
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
    n = f"{_plural(len(shapes), 'pair')} of mechanisms, {_plural(conditions, 'condition')}, {seeds} seeds each"
    return _Answer(answer, where, effect, n)


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


# ---- one mechanism under two names ----


def _no_difference(results: StudyResults) -> _Answer:
    """How often the whole procedure, tuning included, sees a difference where there is none."""
    same = f"{BASELINE}_again"
    found = [each for each in comparisons(results) if each.candidate.mechanism == same]
    tested = [each for each in found if each.raw_p is not None]
    if not tested:
        raise _UntestableError(
            f"the study needs {BASELINE} and {same}, and {_UNTESTED} is on every condition", _size(found)
        )
    differ = [each.condition for each in tested if each.raw_p is not None and each.raw_p < SIGNIFICANCE]
    ahead = [each.condition for each in tested if each.leader]
    low = lower_bound(len(differ), len(tested))
    rate = len(differ) / len(tested)
    answer = "contradicted" if low > SIGNIFICANCE else "supported" if rate <= SIGNIFICANCE else "undecided"
    where = (
        f"One mechanism under two names differs with p < {SIGNIFICANCE}, before any adjustment, on {len(differ)} of "
        f"{_plural(len(tested), 'condition')}{f': {_named(differ)}' if differ else ''}. After it, one is ahead of the "
        f"other on {len(ahead)}."
    )
    effect = (
        f"False-positive rate {rate:.3f} ({LEVEL:.0%} exact interval {exact_interval(len(differ), len(tested)):.3f}); "
        f"nominal {SIGNIFICANCE}"
    )
    return _Answer(answer, where, effect, _size(tested))


# ---- what they share ----


@dataclass(frozen=True)
class _OverConditions:
    """A mean over conditions; ``f"{over}"`` gives it with its interval.

    Attributes:
        mean: Of the conditions' means.
        interval: Its interval; without spread, the mean itself.
        scope: What the interval speaks of, as a sentence.
    """

    mean: float
    interval: Interval
    scope: str

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({LEVEL:.0%} interval {self.interval:+.3f})"


def _over_conditions(margins: NDArray[np.float64]) -> _OverConditions:
    """The mean margin of a matrix ``(conditions, seeds)``."""
    mean = float(margins.mean())
    if len(margins) >= MINIMUM_FOR_INTERVAL:
        interval, scope = clustered_interval(margins), "The interval speaks of conditions like these."
    else:
        interval, scope = mean_interval(margins.mean(0).tolist()), "The interval speaks of these conditions alone."
    return _OverConditions(mean, interval or Interval(mean, mean), scope)


def _tested(results: StudyResults) -> list[Comparison]:
    """EA against DPA on the conditions with enough pairs of seeds, of which there is at least one."""
    for mechanism in (_CANDIDATE, BASELINE):
        if mechanism not in results.mechanisms:
            raise _UntestableError(f"{mechanism_name(mechanism)} is not in the study", _size([]))
    found = [found for found in comparisons(results) if found.candidate.mechanism == _CANDIDATE]
    tested = [each for each in found if _is_tested(each)]
    if not tested:
        raise _UntestableError(f"{_UNTESTED} on every condition", _size(found))
    return tested


def _is_tested(found: Comparison) -> bool:
    return found.candidate.mechanism == _CANDIDATE and found.p is not None


def _margins(compared: Sequence[Comparison]) -> NDArray[np.float64]:
    """Differences ``(conditions, seeds)`` of the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(found.seeds) for found in compared)))
    if len(seeds) < MINIMUM_FOR_INTERVAL:
        raise _UntestableError(f"the conditions share {_FEW}", _size(compared))
    rows = [dict(zip(found.seeds, found.differences, strict=True)) for found in compared]
    return np.array([[row[seed] for seed in seeds] for row in rows])


def _interval(found: Comparison) -> Interval:
    """Of the difference; without spread, the common difference itself."""
    return found.interval or Interval(found.difference, found.difference)


def _leading(compared: Sequence[Comparison], mechanism: str) -> list[str]:
    return [found.condition for found in compared if found.leader == mechanism]


def _side(interval: Interval) -> str:
    return "supported" if interval.low > 0 else "contradicted" if interval.high < 0 else "undecided"


def _counts(compared: Sequence[Comparison]) -> str:
    ahead, behind = len(_leading(compared, _CANDIDATE)), len(_leading(compared, BASELINE))
    neither = sum(found.verdict == "neither learned" for found in compared)
    return (
        f"EA is ahead on {ahead} of {_plural(len(compared), 'condition')}, DPA on {behind}; no difference is shown "
        f"on {len(compared) - ahead - behind - neither}."
    ) + (f" On {neither} neither learned." if neither else "")


def _size(compared: Sequence[Comparison]) -> str:
    if not compared:
        return "0 conditions"
    pairs = _span([len(found.differences) for found in compared])
    return f"{_plural(len(compared), 'condition')}, {pairs} pairs of seeds each"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _bits(complexities: NDArray[np.float64]) -> str:
    low, high = complexities.min(), complexities.max()
    return f"{low:.3g} bits" if low == high else f"{low:.3g} to {high:.3g} bits"


def _probability(p: float) -> str:
    """Never 0 or 1, which no number of seeds gives."""
    return "> 0.999" if p > 0.999 else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _named(labels: Sequence[str]) -> str:
    """The first few labels, which hold commas."""
    shown = "; ".join(labels[:_SHOWN])
    more = len(labels) - _SHOWN
    return f"{shown}; and {more} more" if more > 0 else shown


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_AHEAD = (
    "A mechanism is ahead on a condition if the sign-flip test of the mean paired difference in accuracy gives p < "
    f"{SIGNIFICANCE}, adjusted by Holm's method over the declared family, and the mean is at least {SMALLEST_EFFECT}. "
    f"Counted are conditions with {MINIMUM_PREDICTIONS} scored predictions on {MINIMUM_CONTEXTS} contexts never seen "
    "in training"
)
_OVER = (
    f"The {LEVEL:.0%} bootstrap interval of the mean paired difference over conditions (drawn again with their seeds; "
    f"with fewer than {MINIMUM_FOR_INTERVAL}, seeds alone) lies above 0: supported; below 0: contradicted."
)

_CLAIMS = {
    "at_least_as_good": _Declared(
        "Is EA at least as good as DPA?",
        f"{_AHEAD}. Contradicted if DPA is ahead on any. Supported if on every condition, with at least "
        f"{NON_INFERIORITY_PAIRS} pairs, the {LEVEL:.0%} interval of EA - DPA lies above -{NON_INFERIORITY_MARGIN}, "
        "and some mechanism has learned; since all have to pass, the level needs no correction. The interval is of the "
        "seeds seen: how often EA may fall short without having been seen to is told by an exact bound.",
        "difference",
        _at_least_as_good,
    ),
    "lead_grows": _Declared(
        "Does EA's lead grow with complexity?",
        "Slope of the mean paired difference in accuracy per bit of complexity, by least squares with an intercept for "
        f"each model. Its {LEVEL:.0%} bootstrap interval over conditions and seeds lies above 0, and EA is "
        "ahead on some condition: supported; below 0: contradicted. The slope is one test, whatever the number of "
        "conditions.",
        "margin_map",
        _lead_grows,
    ),
    "exclusive_range": _Declared(
        "Is there a range of complexity that EA alone solves?",
        f"A condition is a candidate if EA solves at least {EXCLUSIVE_RANGE[0]:.0%} of the final seeds and DPA less "
        f"than {EXCLUSIVE_RANGE[1]:.0%}. Supported if the same counts hold for the fresh seeds of a candidate. "
        "Contradicted if on every condition exact bounds, at 5%, exclude such shares; since all have to be excluded, "
        "the level needs no correction.",
        "solved",
        _exclusive_range,
    ),
    "ahead_on_mixed": _Declared(
        "Is EA ahead where one model learns several tasks at once?",
        f"{_OVER} {_AHEAD}.",
        "difference",
        _ahead_on_mixed,
    ),
    "ahead_at_every_position": _Declared(
        "Does EA's lead hold with every code of position?",
        "For each code, the sign-flip test of the seeds' mean paired differences over its conditions, adjusted by "
        f"Holm's method over the codes, at {SIGNIFICANCE}. Supported if EA is ahead with every code; contradicted if "
        "DPA is with any.",
        "difference",
        _ahead_at_every_position,
    ),
    "two_sidedness": _Declared(
        "Is it two-sidedness that makes the difference?",
        f"The units are pairs of mechanisms of the same shape, at least {MINIMUM_FOR_INTERVAL}: mean accuracy of the "
        "two-sided minus that of the one-sided one, over conditions without a shift of the embeddings and the seeds "
        f"that all have. The sign-flip test over pairs gives p < {SIGNIFICANCE}, and the mean is above 0: supported; "
        "below 0: contradicted.",
        "accuracy",
        _two_sidedness,
    ),
    "no_difference": _Declared(
        "Is a difference seen where there is none?",
        "One mechanism under two names, each tuned on seeds of its own and compared by the test of all others. "
        f"Contradicted if the exact one-sided 95% bound of the share of conditions with p < {SIGNIFICANCE} lies above "
        f"{SIGNIFICANCE}; supported if that share does not.",
        "difference",
        _no_difference,
    ),
}
