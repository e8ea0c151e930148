"""Verdicts on the paper's claims, each by a test that is declared here, before a study runs.

docs/statistics.md has the reasons. Two rules hold throughout:

- A mechanism is *ahead* on a condition where `Comparison.leader` says so: by the sign-flip test, with Holm's
  adjustment over the conditions.
- A difference *over* conditions is the mean of their means. With at least `MINIMUM_FOR_INTERVAL` conditions its
  interval is that of `clustered_interval` and speaks of conditions like these; with fewer, it is that of the seeds'
  means over these conditions and speaks of these alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from .inference import (
    EXCLUSIVE_RANGE,
    LEVEL,
    MINIMUM_FOR_INTERVAL,
    SIGNIFICANCE,
    Interval,
    clustered_interval,
    holm,
    mean_interval,
    range_probability,
    sign_flip_p,
    trend,
)
from .results import Condition, StudyResults
from .statistics import (
    BASELINE,
    Comparison,
    comparisons,
    describe_interval,
    describe_p,
    mechanism_name,
    summaries,
)

__all__ = [
    "NON_INFERIORITY_MARGIN",
    "ONE_SIDED",
    "TWO_SIDED",
    "ExclusiveRange",
    "Verdict",
    "exclusive_ranges",
    "verdicts",
]

NON_INFERIORITY_MARGIN = 0.01  # of accuracy, by which EA may fall short and still count as at least as good
TWO_SIDED = ("expressive", "squared", "softmax_abs")  # weigh antiparallel keys as parallel ones
ONE_SIDED = ("dot_product", "one_sided", "sigmoid", "relu_squared")

_CANDIDATE = "expressive"
_CERTAIN = 0.95
_SHOWN = 3  # conditions named in a sentence
_FEW = f"fewer than {MINIMUM_FOR_INTERVAL} pairs of seeds"


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
    inferior = [label for label, low in lows.items() if low <= -NON_INFERIORITY_MARGIN]
    untested = len(results.conditions) - len(compared)
    answer = "contradicted" if behind else "undecided" if inferior or untested else "supported"
    where = _counts(compared)
    leads = [(labels, name) for labels, name in ((behind, "DPA"), (ahead, "EA")) if labels]
    if leads:
        minority, name = min(leads, key=lambda lead: len(lead[0]))
        where += f" {name} is ahead on: {_named(minority)}."
    open_ones = [label for label in inferior if label not in behind]
    if open_ones:
        where += f" A loss of more than {NON_INFERIORITY_MARGIN} is not excluded on: {_named(open_ones)}."
    if untested:
        where += f" {_plural(untested, 'condition')} not tested ({_FEW})."
    effect = (
        f"EA - DPA {np.mean([found.difference for found in compared]):+.3f} on average; least certain on "
        f"{worst.condition}: {worst.difference:+.3f} "
        f"({describe_interval(worst.interval, len(worst.differences), '+.3f')})"
    )
    return _Answer(answer, where, effect, _size(compared))


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
        owner: ``"expressive"`` or ``"dot_product"``, by the shares of seeds solved; None if neither.
        ea: Probability that it is EA's, see `inference.range_probability`.
        dpa: Probability that it is DPA's.
    """

    condition: str
    complexity: float
    owner: str | None
    ea: float
    dpa: float


def exclusive_ranges(results: StudyResults) -> list[ExclusiveRange]:
    """The classification of each condition on which both have at least `MINIMUM_FOR_INTERVAL` final seeds."""
    solved = {(found.condition, found.mechanism): (found.solved, found.seeds) for found in summaries(results)}
    found = []
    for condition in results.conditions:
        ea, dpa = solved.get((condition.label, _CANDIDATE)), solved.get((condition.label, BASELINE))
        if ea is None or dpa is None or min(ea[1], dpa[1]) < MINIMUM_FOR_INTERVAL:
            continue
        owner = _CANDIDATE if _alone(ea, dpa) else BASELINE if _alone(dpa, ea) else None
        complexity = float(condition.facts["complexity"])
        found.append(
            ExclusiveRange(condition.label, complexity, owner, range_probability(ea, dpa), range_probability(dpa, ea))
        )
    return found


def _alone(ours: tuple[int, int], theirs: tuple[int, int]) -> bool:
    reached, missed = EXCLUSIVE_RANGE
    return ours[0] / ours[1] >= reached and theirs[0] / theirs[1] < missed


def _exclusive_range(results: StudyResults) -> _Answer:
    ranges = exclusive_ranges(results)
    if not ranges:
        raise _UntestableError(f"on no condition EA and DPA have {MINIMUM_FOR_INTERVAL} seeds each", _size([]))
    own = [found for found in ranges if found.owner == _CANDIDATE]
    other = [found for found in ranges if found.owner == BASELINE]
    # Among many conditions near the limits one is probably beyond them, and yet none is seen to be. For the claim,
    # therefore, count those that are seen to be; against it, all.
    seen, any_of_all = _any(found.ea for found in own), _any(found.ea for found in ranges)
    answer = "supported" if seen > _CERTAIN else "contradicted" if any_of_all < 1 - _CERTAIN else "undecided"
    where = f"{_range('EA', own)} {_range('DPA', other)}"
    untested = len(results.conditions) - len(ranges)
    if untested:
        where += f" {_plural(untested, 'condition')} not tested (fewer than {MINIMUM_FOR_INTERVAL} seeds)."
    effect = f"Probability that EA has a condition to itself: {_probability(any_of_all)} (all conditions)"
    if own:
        best = max(own, key=lambda found: found.ea)
        effect += f", {_probability(seen)} (those seen to be), {_probability(best.ea)} (the surest: {best.condition})"
    if other:
        effect += f"; that DPA has one: {_probability(_any(found.dpa for found in other))} (those seen to be)"
    seeds = [found.seeds for found in summaries(results) if found.mechanism in (_CANDIDATE, BASELINE)]
    return _Answer(answer, where, effect, f"{_plural(len(ranges), 'condition')}, {_span(seeds)} seeds each")


def _any(probabilities: Iterable[float]) -> float:
    """Probability that at least one holds, if they are independent."""
    return float(1 - np.prod([1 - p for p in probabilities]))


def _range(name: str, owned: Sequence[ExclusiveRange]) -> str:
    if not owned:
        return f"{name} has no condition to itself."
    at = _bits(np.array([found.complexity for found in owned]))
    named = _named([found.condition for found in owned])
    return f"{name} has {_plural(len(owned), 'condition')} to itself, at {at}: {named}."


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
        where += f" {_plural(len(mixed) - len(compared), 'mixed condition')} not tested ({_FEW})."
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
        where += f" {_plural(len(results.conditions) - len(compared), 'condition')} not tested ({_FEW})."
    effect = "EA - DPA " + "; ".join(
        f"{position} {means[position]:+.3f} "
        f"({describe_interval(mean_interval(values.tolist()), len(values), '+.3f')}; {describe_p(p[position])})"
        for position, values in margins.items()
    )
    return _Answer(answer, where, effect, f"{_size(compared)}, {len(margins)} codes of position")


# ---- two-sidedness ----


def _two_sidedness(results: StudyResults) -> _Answer:
    two = [mechanism for mechanism in TWO_SIDED if mechanism in results.mechanisms]
    one = [mechanism for mechanism in ONE_SIDED if mechanism in results.mechanisms]
    if min(len(two), len(one)) < 2:
        raise _UntestableError(
            f"it needs at least two mechanisms of each side, the study has {_listed(map(mechanism_name, two))} and "
            f"{_listed(map(mechanism_name, one))}",
            _size([]),
        )
    shifted = [condition for condition in results.conditions if condition.model.get("embedding_shift", 0.0)]
    plain = [condition for condition in results.conditions if condition not in shifted]
    accuracies = _accuracies(results, plain, [*two, *one])
    if accuracies is None:
        raise _UntestableError(
            f"on no condition without a shift of the embeddings all mechanisms share {MINIMUM_FOR_INTERVAL} seeds",
            _size([]),
        )
    over = _over_conditions(_contrast(accuracies, len(two)))
    means = ", ".join(
        f"{mechanism_name(mechanism)} {values.mean():.3f}"
        for mechanism, values in zip([*two, *one], accuracies, strict=True)
    )
    where = f"Mean accuracies: {means} (the first {len(two)} are two-sided). {over.scope}"
    if (others := _accuracies(results, shifted, [*two, *one])) is not None:
        where += f" With a direction that all embeddings share: {_over_conditions(_contrast(others, len(two)))}."
    conditions, seeds = accuracies.shape[1:]
    n = f"{_plural(conditions, 'condition')}, {seeds} seeds of {len(two) + len(one)} mechanisms each"
    return _Answer(_side(over.interval), where, f"Two-sided - one-sided {over}", n)


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
    tested = [each for each in found if each.p is not None]
    if not tested:
        raise _UntestableError(f"{_FEW} on every condition", _size(found))
    return tested


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
    return (
        f"EA is ahead on {ahead} of {_plural(len(compared), 'condition')}, DPA on {behind}; no difference is shown "
        f"on {len(compared) - ahead - behind}."
    )


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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_AHEAD = (
    "A mechanism is ahead on a condition if the sign-flip test of the mean paired difference in accuracy gives p < "
    f"{SIGNIFICANCE}, adjusted by Holm's method over the conditions"
)
_OVER = (
    f"The {LEVEL:.0%} bootstrap interval of the mean paired difference over conditions (drawn again with their seeds; "
    f"with fewer than {MINIMUM_FOR_INTERVAL}, seeds alone) lies above 0: supported; below 0: contradicted."
)

_CLAIMS = {
    "at_least_as_good": _Declared(
        "Is EA at least as good as DPA?",
        f"{_AHEAD}. Contradicted if DPA is ahead on any. Supported if on every condition the {LEVEL:.0%} interval of "
        f"EA - DPA lies above -{NON_INFERIORITY_MARGIN}; since all have to pass, the level needs no correction.",
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
        f"EA has a condition to itself if it solves at least {EXCLUSIVE_RANGE[0]:.0%} of seeds and DPA less than "
        f"{EXCLUSIVE_RANGE[1]:.0%}. Supported if of the conditions seen to be so at least one is, with a posterior "
        f"probability above {_CERTAIN} (Jeffreys' priors); contradicted if that probability over all conditions is "
        f"below {1 - _CERTAIN:.2f}.",
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
        "Per condition and seed, mean accuracy of the two-sided mechanisms minus that of the one-sided ones, on "
        f"conditions without a shift of the embeddings. {_OVER}",
        "accuracy",
        _two_sidedness,
    ),
}
