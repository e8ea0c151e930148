"""Two runs beside each other: what each mechanism reached in both, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.comparisons import comparisons
from ..analysis.estimators import MINIMUM_FOR_INTERVAL, Interval
from ..analysis.summaries import Summary, evidence, summaries
from ..runs.results import StudyResults

__all__ = ["Line", "compared_runs", "differing"]


@dataclass(frozen=True)
class Line:
    """One mechanism on one condition in two runs.

    Attributes:
        condition: Label of the condition.
        mechanism: The mechanism.
        first: Its summary in the first run; None: it has no final seed there.
        second: Its summary in the second run; likewise.
        differences: The parts that differ, in words; empty: nothing that the seeds can show.
        is_identical: Whether both have the same seeds with the same accuracies, to the bit.
    """

    condition: str
    mechanism: str
    first: Summary | None
    second: Summary | None
    differences: tuple[str, ...]
    is_identical: bool = False


def compared_runs(first: StudyResults, second: StudyResults) -> list[Line]:
    """Every mechanism on every condition of either run, in the order of the first.

    Two accuracies or shares solved differ where their intervals do not overlap.
    """
    found = [{(each.condition, each.mechanism): each for each in summaries(run)} for run in (first, second)]
    verdicts = [
        {(each.condition, each.candidate.mechanism): each.verdict for each in comparisons(run)}
        for run in (first, second)
    ]
    changed = _changed_conditions(first, second)
    lines = []
    for key in dict.fromkeys([*found[0], *found[1]]):
        ours, theirs = (summarized.get(key) for summarized in found)
        if ours is None or theirs is None:
            lines.append(Line(*key, ours, theirs, (f"only in the {'second' if ours is None else 'first'} run",)))
            continue
        differences = [f"another {part}" for part in changed.get(key[0], ())]
        if ours.setting != theirs.setting:
            differences.append(f"{ours.setting} against {theirs.setting}")
        differences += [
            name
            for name, one, other in (
                ("accuracy", _accuracy(ours), _accuracy(theirs)),
                ("share solved", ours.solved_interval, theirs.solved_interval),
            )
            if _apart(one, other)
        ]
        said = [known.get(key) for known in verdicts]
        if said[0] != said[1]:
            differences.append(f"{said[0] or 'no comparison'} against {said[1] or 'no comparison'}")
        seeds = [evidence(run.seeds, *key).select("seed", "accuracy").sort("seed") for run in (first, second)]
        lines.append(Line(*key, ours, theirs, tuple(differences), seeds[0].equals(seeds[1])))
    return lines


def differing(lines: Sequence[Line]) -> list[str]:
    """Labels of the conditions on which something differs."""
    return list(dict.fromkeys(line.condition for line in lines if line.differences))


def _changed_conditions(first: StudyResults, second: StudyResults) -> dict[str, list[str]]:
    """Parts that differ in conditions of the same label."""
    others = {condition.label: condition for condition in second.conditions}
    found = {}
    for condition in first.conditions:
        other = others.get(condition.label)
        if other is not None:
            found[condition.label] = [
                part for part in ("task", "model") if getattr(condition, part) != getattr(other, part)
            ]
    return found


def _accuracy(summary: Summary) -> Interval | None:
    """The interval of the mean accuracy; of seeds that are all equal, that one accuracy."""
    if summary.accuracy_interval is None and summary.seeds >= MINIMUM_FOR_INTERVAL:
        return Interval(summary.accuracy, summary.accuracy)
    return summary.accuracy_interval


def _apart(one: Interval | None, other: Interval | None) -> bool:
    return one is not None and other is not None and (one.high < other.low or other.high < one.low)
