"""Findings of a study in plain sentences."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs.results import StudyResults
from ..words import plural
from .comparisons import BASELINE, Comparison, comparisons
from .estimators import LEVEL
from .summaries import Summary, summaries
from .wording import describe_interval, describe_p, mechanism_name

__all__ = ["Finding", "findings", "findings_by_condition", "overview"]


@dataclass(frozen=True)
class Finding:
    """The result of one condition, in words.

    Attributes:
        condition: Label of the condition.
        verdict: As `Comparison.verdict`, or ``"no comparison"``.
        details: The numbers, as sentences.
    """

    condition: str
    verdict: str
    details: str

    @property
    def sentence(self) -> str:
        """The finding in one line."""
        return f"{self.condition}: {self.verdict}. {self.details}"


def findings(results: StudyResults) -> list[str]:
    """The results of the study in plain sentences: counts over the conditions first, then each condition.

    Raises:
        ValueError: As `summaries`.
    """
    return [*overview(results), *(finding.sentence for finding in findings_by_condition(results))]


def overview(results: StudyResults) -> list[str]:
    """Sentences that count over the conditions."""
    compared = comparisons(results)
    if not compared:
        return [_nothing_to_compare(results)]
    sentences = []
    for candidate in dict.fromkeys(comparison.candidate.mechanism for comparison in compared):
        chosen = [comparison for comparison in compared if comparison.candidate.mechanism == candidate]
        sentences += _counts(chosen)
        missing = len(results.conditions) - len(chosen)
        if missing:
            sentences.append(
                f"Not compared yet: {plural(missing, 'condition')} of {len(results.conditions)}, where "
                f"{mechanism_name(candidate)} and {mechanism_name(BASELINE)} have not both finished."
            )
    return sentences


def findings_by_condition(results: StudyResults) -> list[Finding]:
    """The result of each condition with final seeds, in the study's order."""
    found = [
        Finding(comparison.condition, comparison.verdict, _explain(comparison)) for comparison in comparisons(results)
    ]
    compared = {finding.condition for finding in found}
    found += [
        Finding(summary.condition, "no comparison", f"{_reached(summary)}.")
        for summary in summaries(results)
        if summary.condition not in compared
    ]
    order = [condition.label for condition in results.conditions]
    return sorted(found, key=lambda finding: order.index(finding.condition))


def _explain(comparison: Comparison) -> str:
    """The numbers that a verdict rests on."""
    pairs = len(comparison.differences)
    return (
        f"{_reached(comparison.candidate)}; {_reached(comparison.baseline)}. "
        f"Paired difference {comparison.difference:+.4f} "
        f"({describe_interval(comparison.interval, pairs, '+.4f')}; {plural(pairs, 'pair')}"
        f"{_tested(comparison.p)}).{_fixed_data(comparison)}{_steps(comparison)}"
        + (f" Not counted: {comparison.untested}." if comparison.untested else "")
    )


def _fixed_data(comparison: Comparison) -> str:
    """A note on cross-entropy and on what validation examples say, where there are no more examples; none elsewhere."""
    if comparison.example_interval is None:
        return ""
    drawn = f" With the drawing of test examples: {LEVEL:.0%} interval {comparison.example_interval:+.4f}."
    if comparison.cross_entropy_difference is not None:
        interval = describe_interval(comparison.cross_entropy_interval, len(comparison.differences), "+.4f")
        drawn += (
            f" Cross-entropy {comparison.candidate.cross_entropy:.4f} against {comparison.baseline.cross_entropy:.4f} "
            f"nats, difference {comparison.cross_entropy_difference:+.4f} ({interval})."
        )
    if comparison.validation_difference is None:
        return drawn
    interval = describe_interval(comparison.validation_interval, len(comparison.differences), "+.4f")
    return f"{drawn} On validation examples the difference is {comparison.validation_difference:+.4f} ({interval})."


def _steps(comparison: Comparison) -> str:
    """Whether the steps to solve differ, as a sentence; none where no seed solved the task or too few ran."""
    if comparison.steps_p is None or not comparison.candidate.solved + comparison.baseline.solved:
        return ""
    spent, interval = (
        comparison.steps_difference,
        describe_interval(comparison.steps_interval, len(comparison.differences), "+,.0f"),
    )
    return (
        f" Steps before it is solved, over all seeds: {comparison.candidate.restricted_steps:,.0f} against "
        f"{comparison.baseline.restricted_steps:,.0f}, {spent:+,.0f} ({interval}; log-rank "
        f"{describe_p(comparison.steps_p)})."
    )


def _tested(p: float | None) -> str:
    return "" if p is None else f"; {describe_p(p)}"


def _counts(compared: list[Comparison]) -> list[str]:
    """Counts over comparisons of one candidate with the baseline."""
    first, total = compared[0], plural(len(compared), "condition")
    candidate, baseline = mechanism_name(first.candidate.mechanism), mechanism_name(first.baseline.mechanism)
    margins = [comparison.candidate.solved - comparison.baseline.solved for comparison in compared]
    more, fewer = sum(margin > 0 for margin in margins), sum(margin < 0 for margin in margins)
    leaders = [comparison.leader for comparison in compared]
    ahead, behind = leaders.count(first.candidate.mechanism), leaders.count(first.baseline.mechanism)
    neither = sum(comparison.verdict == "neither learned" for comparison in compared)
    uncounted = [comparison.untested for comparison in compared if comparison.verdict == "not counted"]
    rest = leaders.count(None) - neither - len(uncounted)
    why = f": {uncounted[0]}" if len(set(uncounted)) == 1 else ""
    solved = (
        f"On {more} of {total} {candidate} solved more seeds than {baseline}, on {fewer} fewer, "
        f"on {margins.count(0)} equally many."
    )
    accuracy = (
        f"By the paired difference in accuracy {candidate} is ahead on {ahead} of {total}, "
        f"{baseline} on {behind}; on {rest} no difference is shown."
        + (f" On {neither} neither learned." if neither else "")
        + (f" {plural(len(uncounted), 'condition')} not counted{why}." if uncounted else "")
    )
    return [solved, accuracy]


def _nothing_to_compare(results: StudyResults) -> str:
    """The reason why there is no comparison."""
    names = {mechanism_name(summary.mechanism): None for summary in summaries(results)}
    if not names:
        return "No final seed has finished yet: there is nothing to report."
    if len(names) == 1:
        return f"Only {next(iter(names))} has finished seeds: there is nothing to compare it with yet."
    return f"{' and '.join(names)} have no seed in common on any condition: there is nothing to compare yet."


def _reached(summary: Summary) -> str:
    """The results of one mechanism, as part of a sentence."""
    interval = describe_interval(summary.accuracy_interval, summary.seeds, ".3f")
    diverged = f", {summary.diverged} diverged" if summary.diverged else ""
    return (
        f"{mechanism_name(summary.mechanism)} solved {summary.solved}/{summary.seeds} seeds, "
        f"mean accuracy {summary.accuracy:.3f} ({interval}){diverged}"
    )
