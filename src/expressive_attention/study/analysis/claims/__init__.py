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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

from ...config.declared import claim_names
from ...runs.results import StudyResults
from ._base import Answer, UntestableError

__all__ = ["Verdict", "verdicts"]


@dataclass(frozen=True)
class Verdict:
    """The answer of a study to one claim.

    Attributes:
        claim: Its name in the configuration and of its file, e.g. ``"lead_grows"``.
        question: The question in words, e.g. ``"Does EA's lead grow with complexity?"``.
        answer: ``"supported"``, ``"contradicted"`` or ``"undecided"``.
        where: Conditions on which a mechanism is ahead, in words; or the reason why the results do not allow the test.
        effect: The effect with its interval; empty where the results do not allow the test.
        n: The evidence in numbers, e.g. ``"27 conditions, 16 pairs of seeds each"``.
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


_CLAIMS = {name: import_module(f"{__name__}.{name}").CLAIM for name in claim_names()}


def verdicts(results: StudyResults, claims: Sequence[str]) -> list[Verdict]:
    """One verdict for each claim, in the order asked.

    Only final seeds count, and EA is compared with DPA whatever other mechanisms the study has. A claim that the
    results do not allow to test (too few seeds, no mixed task, a mechanism missing) is undecided.

    Args:
        results: The study, finished or not.
        claims: Names of claims, as `study.config.declared.claim_names` gives them.

    Raises:
        ValueError: A name is no claim, or a measure is not a finite number.
    """
    unknown = [claim for claim in claims if claim not in _CLAIMS]
    if unknown:
        raise ValueError(f"claims must be of {list(_CLAIMS)}, got {unknown[0]!r}")
    return [_verdict(results, claim) for claim in claims]


@lru_cache(maxsize=16)  # the page and its archive of tables ask for the same
def _verdict(results: StudyResults, claim: str) -> Verdict:
    declared = _CLAIMS[claim]
    try:
        answer = declared.judge(results)
    except UntestableError as reason:
        answer = Answer("undecided", where=f"Not tested: {reason}.", effect="", n=str(reason.n))
    return Verdict(
        claim=claim, question=declared.question, answer=answer.answer, where=answer.where,
        effect=answer.effect, n=answer.n, test=declared.test, evidence=declared.evidence,
    )  # fmt: skip
