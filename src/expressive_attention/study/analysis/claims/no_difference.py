"""One mechanism under two names, where no difference is to be found."""

from __future__ import annotations

from ...runs.results import StudyResults
from ...words import plural
from ..comparisons import BASELINE, comparisons
from ..estimators import LEVEL, SIGNIFICANCE, exact_interval, lower_bound
from ._base import UNTESTED, Answer, Declared, UntestableError, listed, sample_size

__all__ = []


def _no_difference(results: StudyResults) -> Answer:
    """The share of conditions on which the whole procedure, tuning included, sees a difference where there is none."""
    same = f"{BASELINE}_again"
    found = [each for each in comparisons(results) if each.candidate.mechanism == same]
    tested = [each for each in found if each.raw_p is not None]
    if not tested:
        raise UntestableError(
            f"the study needs {BASELINE} and {same}, and {UNTESTED} is on every condition", sample_size(found)
        )
    differ = [each.condition for each in tested if each.raw_p is not None and each.raw_p < SIGNIFICANCE]
    ahead = [each.condition for each in tested if each.leader]
    low = lower_bound(len(differ), len(tested))
    rate = len(differ) / len(tested)
    answer = "contradicted" if low > SIGNIFICANCE else "supported" if rate <= SIGNIFICANCE else "undecided"
    where = (
        f"One mechanism under two names differs with p < {SIGNIFICANCE}, before any adjustment, on {len(differ)} of "
        f"{plural(len(tested), 'condition')}{f': {listed(differ)}' if differ else ''}. After it, one is ahead of the "
        f"other on {len(ahead)}."
    )
    effect = (
        f"False-positive rate {rate:.3f} ({LEVEL:.0%} exact interval {exact_interval(len(differ), len(tested)):.3f}); "
        f"nominal {SIGNIFICANCE}"
    )
    return Answer(answer, where, effect, sample_size(tested))


CLAIM = Declared(
    "Is a difference seen where there is none?",
    "One mechanism under two names, each tuned on seeds of its own and compared by the test of all others. "
    f"Contradicted if the exact one-sided 95% bound of the share of conditions with p < {SIGNIFICANCE} lies above "
    f"{SIGNIFICANCE}; supported if that share does not.",
    "difference",
    _no_difference,
)
