"""Mechanisms against the baseline, on each condition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import polars as pl

from ..config.condition import Condition
from ..runs.results import StudyResults
from .estimators import (
    MINIMUM_FOR_INTERVAL,
    SIGNIFICANCE,
    SMALLEST_EFFECT,
    Interval,
    example_error,
    mean_interval,
    wider,
)
from .significance import holm, sign_flip_p
from .summaries import Summary, evidence, summarize
from .survival import log_rank_p, restricted_steps
from .wording import mechanism_name

__all__ = ["BASELINE", "MINIMUM_CONTEXTS", "MINIMUM_PREDICTIONS", "Comparison", "comparisons"]


BASELINE = "dot_product"

# A condition counts with so many scored predictions, on so many different contexts, that training never saw.
MINIMUM_PREDICTIONS = 512
MINIMUM_CONTEXTS = 256


@dataclass(frozen=True)
class Comparison:
    """One mechanism against the baseline on one condition, over the seeds that both have finished.

    Attributes:
        candidate: Summary of the mechanism over the shared seeds.
        baseline: Summary of the baseline over the same seeds.
        seeds: The shared seeds, ascending.
        differences: Accuracy of the candidate minus that of the baseline, per shared seed.
        difference: Mean of the differences.
        interval: Bootstrap interval of that mean, None where `mean_interval` gives none.
        p: p of the sign-flip test of that mean, adjusted by Holm's method over the conditions on which this mechanism
            is compared, or over the family of the study; None, and not counted there, where `untested` says why.
        raw_p: The same, not adjusted.
        steps_p: p of the log-rank test of the steps to solve, adjusted likewise.
        steps_difference: Mean difference in the steps before the task was solved, over all pairs.
        steps_interval: Bootstrap interval of that mean.
        validation_difference: Mean difference in accuracy on the validation sequences; None: not kept.
        validation_interval: Its interval over seeds.
        cross_entropy_difference: Mean difference in cross-entropy on the test sequences, in nats; None where a seed of
            either diverged.
        cross_entropy_interval: Its interval over seeds.
        example_interval: As `interval`, for the drawing of the test examples as well; None where there are more
            examples than are tested, so that it does not matter.
        untested: Reason why there is no test; None: there is one.
        neither_learned: Neither mechanism is better, by `SMALLEST_EFFECT`, than a guess and than the most frequent
            target.
    """

    candidate: Summary
    baseline: Summary
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    difference: float
    interval: Interval | None
    p: float | None
    raw_p: float | None
    steps_p: float | None
    steps_difference: float
    steps_interval: Interval | None
    validation_difference: float | None
    validation_interval: Interval | None
    cross_entropy_difference: float | None
    cross_entropy_interval: Interval | None
    example_interval: Interval | None
    untested: str | None
    neither_learned: bool

    @property
    def condition(self) -> str:
        """Label of the condition."""
        return self.candidate.condition

    @property
    def leader(self) -> str | None:
        """The mechanism that is ahead, the one that the mean favours; None where none is.

        One is where some mechanism has learned, `p` is below 0.05, the mean at least `SMALLEST_EFFECT`, and 0 outside
        of `example_interval`, if there is one.
        """
        if self.neither_learned or self.p is None or self.p >= SIGNIFICANCE or abs(self.difference) < SMALLEST_EFFECT:
            return None
        if self.example_interval is not None and self.example_interval.low <= 0 <= self.example_interval.high:
            return None
        return self.candidate.mechanism if self.difference > 0 else self.baseline.mechanism

    @property
    def verdict(self) -> str:
        """``"EA ahead"``, ``"DPA ahead"``, ``"neither learned"``, ``"not counted"`` or ``"no difference shown"``."""
        if self.leader:
            return f"{mechanism_name(self.leader)} ahead"
        if self.neither_learned:
            return "neither learned"
        return "not counted" if self.untested else "no difference shown"


@lru_cache(maxsize=4)
def comparisons(results: StudyResults) -> list[Comparison]:
    """Every other mechanism against `BASELINE`, wherever both have final seeds in common.

    Raises:
        ValueError: As `summaries`.
    """
    order = [condition.label for condition in results.conditions]
    found = []
    for mechanism in results.mechanisms:
        if mechanism != BASELINE:
            compared = [_compare(results, condition, mechanism) for condition in results.conditions]
            # The family is of EA; another mechanism's tests are the study's own.
            family = results.family if mechanism == "expressive" else 0
            found += _adjusted([comparison for comparison in compared if comparison is not None], family)
    return sorted(found, key=lambda comparison: order.index(comparison.condition))


def _compare(results: StudyResults, condition: Condition, mechanism: str) -> Comparison | None:
    """The mechanism against `BASELINE` on the seeds that both have, None if there is none."""
    candidate, baseline = (evidence(results.seeds, condition.label, name) for name in (mechanism, BASELINE))
    candidate = candidate.join(baseline, on="seed", how="semi")
    baseline = baseline.join(candidate, on="seed", how="semi")
    if candidate.is_empty():
        return None
    candidate_summary, baseline_summary = summarize(candidate), summarize(baseline)
    paired = candidate.join(baseline, on="seed", suffix="_baseline", validate="1:1").sort("seed")
    differences = (paired["accuracy"] - paired["accuracy_baseline"]).to_list()
    difference, interval = float(np.mean(differences)), mean_interval(differences)
    steps = max(candidate_summary.steps, baseline_summary.steps)
    spent = [paired[f"steps_to_solve{side}"].to_list() for side in ("", "_baseline")]
    ours, theirs = (restricted_steps(taken, steps) for taken in spent)
    more = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    validation = (paired["validation"] - paired["validation_baseline"]).drop_nulls().to_list()
    losses = (paired["cross_entropy"] - paired["cross_entropy_baseline"]).to_list()
    are_finite = bool(np.isfinite(np.array(losses, dtype=float)).all())  # not where a seed diverged
    examples = _examples(results, condition, mechanism)
    error = None
    untested = _untested(condition, paired)
    if examples is not None and len(examples) < 2:
        untested = untested or "its test has one example, from which no error can be told"
    elif examples is not None:
        error = example_error(examples["share"].to_list(), examples["scored"].to_list())
    example_interval = None
    if error is not None and paired.height >= MINIMUM_FOR_INTERVAL:  # of as many seeds that do not differ: one point
        example_interval = wider(difference, interval or Interval(difference, difference), error)
    raw_p = None if untested else sign_flip_p(differences)
    return Comparison(
        candidate=candidate_summary,
        baseline=baseline_summary,
        seeds=tuple(paired["seed"].to_list()),
        differences=tuple(differences),
        difference=difference,
        interval=interval,
        p=raw_p,
        raw_p=raw_p,
        steps_p=None if untested else log_rank_p(spent[0], spent[1], steps),
        steps_difference=float(np.mean(more)),
        steps_interval=mean_interval(more),
        validation_difference=float(np.mean(validation)) if validation else None,
        validation_interval=mean_interval(validation) if validation else None,
        cross_entropy_difference=float(np.mean(losses)) if are_finite else None,
        cross_entropy_interval=mean_interval(losses) if are_finite else None,
        example_interval=example_interval,
        untested=untested,
        neither_learned=_neither_learned(condition, candidate_summary, baseline_summary),
    )


def _untested(condition: Condition, paired: pl.DataFrame) -> str | None:
    """The reason why a condition is not counted; None: it is."""
    if paired.height < MINIMUM_FOR_INTERVAL:
        return f"fewer than {MINIMUM_FOR_INTERVAL} pairs of seeds"
    predictions, contexts = (
        min([condition.facts[name], *paired[column].drop_nulls(), *paired[f"{column}_baseline"].drop_nulls()])
        if name in condition.facts
        else None
        for name, column in (("predictions", "unseen_predictions"), ("contexts", "unseen_contexts"))
    )
    if predictions is None or contexts is None:
        return None
    if predictions >= MINIMUM_PREDICTIONS and contexts >= MINIMUM_CONTEXTS:
        return None
    return (
        f"its test has {predictions} scored predictions on {contexts} contexts that training never saw, fewer than "
        f"{MINIMUM_PREDICTIONS} on {MINIMUM_CONTEXTS}"
    )


def _neither_learned(condition: Condition, *both: Summary) -> bool:
    guess = max(condition.facts.get(name) or 0.0 for name in ("chance", "majority"))
    return all(summary.accuracy < guess + SMALLEST_EFFECT for summary in both)


def _examples(results: StudyResults, condition: Condition, mechanism: str) -> pl.DataFrame | None:
    """The difference in right predictions and those that count, per test example; None where there are more of them."""
    if not condition.facts.get("fixed_data"):
        return None
    sides = []
    for name in (mechanism, BASELINE):
        rows = evidence(results.examples, condition.label, name, by="example")
        if rows.is_empty():
            return None
        sides.append(
            rows.group_by("example", maintain_order=True).agg(
                pl.col("scored").first(), share=pl.col("right").sum() / pl.col("seeds").sum()
            )
        )
    return pl.DataFrame([sides[0]["share"] - sides[1]["share"], sides[0]["scored"]])


def _adjusted(compared: list[Comparison], family: int) -> list[Comparison]:
    """The comparisons of one mechanism, with p adjusted over the conditions on which it is tested, or the family."""
    tested = [comparison for comparison in compared if comparison.p is not None]
    p = holm([comparison.p for comparison in tested if comparison.p is not None], family)
    steps_p = holm([comparison.steps_p for comparison in tested if comparison.steps_p is not None], family)
    adjusted = {
        comparison.condition: replace(comparison, p=p[index], steps_p=steps_p[index])
        for index, comparison in enumerate(tested)
    }
    return [adjusted.get(comparison.condition, comparison) for comparison in compared]
