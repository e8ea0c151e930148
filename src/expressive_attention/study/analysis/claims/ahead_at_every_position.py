"""The claim that EA's lead holds with every code of position."""

from __future__ import annotations

from ...runs.results import StudyResults
from ...words import plural
from ..estimators import SIGNIFICANCE, SMALLEST_EFFECT, mean_interval
from ..significance import holm, sign_flip_p
from ..wording import describe_interval, describe_p
from ._base import UNTESTED, Answer, Declared, UntestableError, margins_of, sample_size, tested_comparisons

__all__ = []


def _ahead_at_every_position(results: StudyResults) -> Answer:
    compared = tested_comparisons(results)
    code = {condition.label: str(condition.model.get("position")) for condition in results.conditions}
    positions = list(dict.fromkeys(code.values()))
    if len(positions) < 2:
        raise UntestableError(f"the study has one code of position alone, {positions[0]}", sample_size(compared))
    # The mean over a code's conditions, per seed: (seeds,) each.
    margins = {
        position: margins_of(chosen).mean(0)
        for position in positions
        if (chosen := [found for found in compared if code[found.condition] == position])
    }
    p = dict(zip(margins, holm([sign_flip_p(values.tolist()) for values in margins.values()]), strict=True))
    means = {position: float(values.mean()) for position, values in margins.items()}
    shown = [position for position in margins if p[position] < SIGNIFICANCE]
    ahead = [position for position in shown if means[position] >= SMALLEST_EFFECT]
    behind = [position for position in shown if means[position] <= -SMALLEST_EFFECT]
    complete = len(compared) == len(results.conditions)
    answer = "contradicted" if behind else "supported" if complete and ahead == positions else "undecided"
    # Not "none", which is a code's name.
    where = f"EA is ahead with {', '.join(ahead) or 'no code'}, DPA with {', '.join(behind) or 'no code'}."
    if not complete:
        where += f" {plural(len(results.conditions) - len(compared), 'condition')} not tested ({UNTESTED})."
    effect = "EA - DPA " + "; ".join(
        f"{position} {means[position]:+.3f} "
        f"({describe_interval(mean_interval(values.tolist()), len(values), '+.3f')}; {describe_p(p[position])})"
        for position, values in margins.items()
    )
    return Answer(answer, where, effect, f"{sample_size(compared)}, {len(margins)} codes of position")


CLAIM = Declared(
    "Does EA's lead hold with every code of position?",
    "For each code, the sign-flip test of the seeds' mean paired differences over its conditions, adjusted by "
    f"Holm's method over the codes, at {SIGNIFICANCE}, and a mean of at least {SMALLEST_EFFECT}. Supported if EA is "
    "ahead with every code; contradicted if DPA is with any.",
    "difference",
    _ahead_at_every_position,
)
