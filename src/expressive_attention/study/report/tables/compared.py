"""The tables of comparisons: in short, with all numbers, and by cross-entropy."""

from __future__ import annotations

import math

from ...analysis.comparisons import BASELINE, Comparison, comparisons
from ...analysis.estimators import LEVEL, Interval
from ...analysis.findings import findings_by_condition
from ...analysis.summaries import summaries
from ...analysis.wording import describe_p, mechanism_name
from ...runs.results import StudyResults
from ..drawing.layout import MOST_PANELS, most_different
from .table import NONE, Cell, Column, Table, ends

__all__ = ["cross_entropy_table", "findings_table", "opening_table"]


_MINUS, _MINUS_UNBROKEN = "t \N{MINUS SIGN} ", "t\N{NO-BREAK SPACE}\N{MINUS SIGN}\N{NO-BREAK SPACE}"


def opening_table(results: StudyResults) -> Table:
    """Task, formula, accuracy of each mechanism and the verdict, for readers who want nothing else.

    Where several mechanisms are compared, each has its verdict below its accuracy.
    """
    reached = {(found.condition, found.mechanism): found.accuracy for found in summaries(results)}
    compared = {(found.condition, found.candidate.mechanism): found for found in comparisons(results)}
    are_several = len({mechanism for _, mechanism in compared}) > 1
    verdicts = {found.condition: found for found in findings_by_condition(results)}
    conditions = most_different(results, MOST_PANELS)
    formulas = {found.label: found.formula.replace(_MINUS, _MINUS_UNBROKEN) for found in conditions}
    shown = [name for name in results.mechanisms if any((found.label, name) in reached for found in conditions)]
    rows = []
    for condition in conditions:
        verdict = verdicts[condition.label].verdict
        against = {
            name: _against_baseline(compared.get((condition.label, name)))
            for name in shown
            if are_several and name != BASELINE
        }
        rows.append([
            Cell(condition.label),
            *([Cell(formulas[condition.label] or NONE)] if any(formulas.values()) else []),
            *(_percent(reached.get((condition.label, name)), against.get(name, "")) for name in shown),
            *([] if are_several else [Cell(verdict, is_strong=verdict.endswith("ahead"))]),
        ])  # fmt: skip
    finished = len({label for label, _ in reached})
    return Table(
        "Right answers on held-out sequences",
        "Means over seeds. A mechanism is called ahead only where a test says so."
        + (f" Ahead or behind: of {mechanism_name(BASELINE)}; elsewhere no difference is shown." if are_several else "")
        + (
            f" Shown: the {len(rows)} of {finished} tasks with the largest differences." if len(rows) < finished else ""
        ),
        [
            Column("Task", is_number=False),
            *([Column("Rule", is_number=False)] if any(formulas.values()) else []),
            *(Column(mechanism_name(name)) for name in shown),
            *([] if are_several else [Column("Who is ahead", is_number=False)]),
        ],
        rows,
    )


def findings_table(results: StudyResults) -> Table:
    """Each comparison with the baseline; a lead may be as small as .01, so with three decimals."""
    compared = comparisons(results)
    is_single = len({found.candidate.mechanism for found in compared}) == 1
    baseline = mechanism_name(BASELINE)
    name = mechanism_name(compared[0].candidate.mechanism) if is_single else "Accuracy"

    def row(found: Comparison) -> list[Cell]:
        pairs = len(found.differences)
        mechanism = [] if is_single else [Cell(mechanism_name(found.candidate.mechanism))]
        tested = "" if found.p is None else describe_p(found.p).removeprefix("p = ").removeprefix("p ")
        return [
            Cell(found.condition),
            *mechanism,
            Cell(found.verdict, is_strong=found.leader is not None),
            *(
                Cell(f"{each.accuracy:.3f}", f"{each.solved}/{each.seeds} solved", each.accuracy)
                for each in (found.candidate, found.baseline)
            ),
            Cell(f"{found.difference:+.3f}", ends(found.interval, "+.3f"), found.difference),
            Cell(tested or NONE, value=found.p),
            Cell(str(pairs), value=pairs),
        ]

    return Table(
        "Each comparison",
        f"Mean accuracy and paired difference to {baseline}, with its {LEVEL:.0%} bootstrap interval in brackets; p of "
        "the sign-flip test, adjusted.",
        [
            Column("Condition", is_number=False),
            *([] if is_single else [Column("Mechanism", is_number=False)]),
            Column("Verdict", is_number=False),
            *(Column(each) for each in (name, baseline, "Difference", "p", "Pairs")),
        ],
        [row(found) for found in compared],
    )


def cross_entropy_table(results: StudyResults) -> Table | None:
    """Each comparison by its cross-entropy where data are fixed, as of text; None: they are nowhere.

    Accuracy says little there: no model is always right.
    """
    fixed = {condition.label for condition in results.conditions if condition.facts.get("fixed_data")}
    compared = [found for found in comparisons(results) if found.condition in fixed]
    if not compared:
        return None
    is_single = len({found.candidate.mechanism for found in compared}) == 1
    name = mechanism_name(compared[0].candidate.mechanism) if is_single else "Bits"

    def bits(nats: float | None, spec: str = ".3f", small: str = "") -> Cell:
        if nats is None or not math.isfinite(nats):
            return Cell(NONE)
        return Cell(f"{nats / math.log(2):{spec}}", small, nats)

    def row(found: Comparison) -> list[Cell]:
        interval = found.cross_entropy_interval
        in_bits = interval and Interval(interval.low / math.log(2), interval.high / math.log(2))
        return [
            Cell(found.condition),
            *([] if is_single else [Cell(mechanism_name(found.candidate.mechanism))]),
            *(bits(each.cross_entropy) for each in (found.candidate, found.baseline)),
            bits(found.cross_entropy_difference, "+.3f", ends(in_bits, "+.3f")),
            Cell(str(len(found.seeds)), value=len(found.seeds)),
        ]

    return Table(
        "Cross-entropy",
        "Bits per prediction on the test examples, means over seeds; fewer are better. Brackets: "
        f"{LEVEL:.0%} bootstrap interval of the mean paired difference over seeds. No test compares bits.",
        [
            Column("Condition", is_number=False),
            *([] if is_single else [Column("Mechanism", is_number=False)]),
            *(Column(each) for each in (name, mechanism_name(BASELINE), "Difference", "Pairs")),
        ],
        [row(found) for found in compared],
    )


def _percent(share: float | None, verdict: str = "") -> Cell:
    if share is None:
        return Cell(NONE)
    return Cell(">99%" if 0.995 <= share < 1 else f"{100 * share:.0f}%", verdict, share, verdict == "ahead")


def _against_baseline(found: Comparison | None) -> str:
    """The verdict on one of several mechanisms, in the fewest words."""
    if found is None:
        return "not compared"
    if found.leader is not None:
        return "ahead" if found.leader == found.candidate.mechanism else "behind"
    return "" if found.verdict == "no difference shown" else found.verdict
