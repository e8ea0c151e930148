"""Notes below the figures: what their marks stand for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ...analysis.comparisons import comparisons
from ...analysis.estimators import LEVEL, MINIMUM_FOR_INTERVAL, SIGNIFICANCE, SMALLEST_EFFECT
from ...analysis.summaries import summaries
from ...analysis.wording import describe_p, mechanism_name
from ...config.condition import Condition
from ...runs.results import StudyResults

__all__ = ["candidate_names", "notes", "shown_note", "steps_tests"]


def candidate_names(results: StudyResults) -> str:
    """Names of the mechanisms that are compared with DPA."""
    names = dict.fromkeys(mechanism_name(found.candidate.mechanism) for found in comparisons(results))
    return " or ".join(names)


def shown_note(shown: int, finished: int, name: str) -> str:
    """Which of the finished conditions a figure shows, if not all."""
    if shown >= finished:
        return ""
    return f" Shown: the {shown} of {finished} conditions with the largest differences; all are in {name}.csv."


def steps_tests(results: StudyResults, condition: Condition) -> str:
    """Results of the log-rank tests of steps to solve on a condition, e.g. ``"p = 0.031"``; one line each."""
    found = [each for each in comparisons(results) if each.condition == condition.label and each.steps_p is not None]
    several = len(results.mechanisms) > 2
    return "\n".join(
        (f"{mechanism_name(each.candidate.mechanism)}: " if several else "") + describe_p(each.steps_p or 0.0)
        for each in found
        if each.candidate.solved + each.baseline.solved
    )


@lru_cache(maxsize=4)
def notes(results: StudyResults) -> dict[str, str]:
    """The meaning of each figure's marks, by the figure's name."""
    compared = comparisons(results)
    n = f"n\u00a0=\u00a0{_range([summary.seeds for summary in summaries(results)])} per condition and mechanism"
    bootstrap = f"{LEVEL:.0%} bootstrap interval (none below {MINIMUM_FOR_INTERVAL} seeds or where all are equal)"
    ordered = "Tasks are ordered by the size of their state space in bits, equally spaced."
    found = {
        "accuracy": f"Small marks: one seed each ({n}). Large marks: mean over seeds with {bootstrap}. {ordered}",
        "solved_map": (
            f"Seeds that solved the task, of all ({n}); dark: all. Intervals: {LEVEL:.0%} Wilson, in table 1. {ordered}"
        ),
        "solved": f"Share of seeds that solved the task, with {LEVEL:.0%} Wilson interval ({n}).",
        "learning_curves": (
            f"Thick: median over seeds; thin: one seed each ({n}); dotted grey: chance. "
            "Accuracy on validation sequences. A seed ends when it has solved the task."
        ),
        "steps_to_solve": (
            "Share of seeds that have solved the task by a step (Kaplan-Meier estimate, unsolved seeds censored "
            f"at the end of training; {n}; no interval). p: log-rank test against DPA, adjusted over the "
            "family of comparisons (Holm)."
        ),
        "splits": (
            f"Mean over seeds, bars from the lowest to the highest seed ({n}; no interval); grey: what the best "
            "possible predictor reaches. All positions with a target count, not only those whose answer is certain."
        ),
        "attention_maps": (
            "Attention weights of trained models: rows are queries, columns keys, each row sums to 1; mean over "
            "heads and test examples. Of each mechanism, the seed with the lowest and the one with the highest "
            "accuracy (n\u00a0=\u00a01 each; no interval)."
        ),
    }
    if compared:
        pairs = f"n\u00a0=\u00a0{_range([len(comparison.differences) for comparison in compared])} per condition"
        names = candidate_names(results)
        found["margin_map"] = (
            f"Mean accuracy of {names} minus that of DPA over pairs of seeds ({pairs}). Blue: {names} better; "
            f"orange: DPA better. Star: p < {SIGNIFICANCE:g} in the sign-flip test of the paired differences, adjusted "
            f"over the family of comparisons (Holm), and {SMALLEST_EFFECT:g} or more. {ordered}"
        )
        found["difference"] = (
            f"Small marks: accuracy of {names} minus that of DPA for one seed, from the same "
            f"initial parameters and batches ({pairs}). Large marks: mean over pairs with {bootstrap}."
        )
    return found


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"
