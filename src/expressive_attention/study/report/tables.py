"""The tables of the page, each described once: columns, rows, and the number by which a reader sorts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import polars as pl

from ..analysis.comparisons import BASELINE, Comparison, comparisons
from ..analysis.estimators import LEVEL, MINIMUM_FOR_INTERVAL, Interval
from ..analysis.findings import findings_by_condition
from ..analysis.summaries import Summary, TuningSummary, summaries, tuning_summaries
from ..analysis.wording import describe_p, mechanism_name
from ..config.condition import Setting
from ..runs.results import StudyResults
from .drawing.layout import MOST_PANELS, most_different

__all__ = ["Table", "duration", "findings_table", "numbered_tables", "opening_table"]


_NONE = "\N{EN DASH}"
_MINUS, _MINUS_UNBROKEN = "t \N{MINUS SIGN} ", "t\N{NO-BREAK SPACE}\N{MINUS SIGN}\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a smaller line below it, the number that sorts it (None: the text), and whether it is bold."""

    text: str
    small: str = ""
    value: float | None = None
    is_strong: bool = False


@dataclass(frozen=True)
class Column:
    """A column: lines of its heading, and whether its cells are numbers."""

    heading: str
    is_number: bool = True

    @property
    def label(self) -> str:
        """The heading in one line."""
        return self.heading.replace("\n", " ")


@dataclass(frozen=True)
class Table:
    """A table of the page; the first cell of each row names it.

    Attributes:
        caption: Its subject.
        note: The meaning of its numbers.
        columns: Its columns.
        rows: Its rows, of a cell for each column.
        is_sortable: Whether a reader may sort it.
    """

    caption: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    is_sortable: bool = True


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
            *([Cell(formulas[condition.label] or _NONE)] if any(formulas.values()) else []),
            *(_percent(reached.get((condition.label, name)), against.get(name, "")) for name in shown),
            *([] if are_several else [Cell(verdict, is_strong=verdict.endswith("ahead"))]),
        ])  # fmt: skip
    finished = len({label for label, _ in reached})
    return Table(
        "Right answers on sequences that training never saw",
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
            Cell(f"{found.difference:+.3f}", _ends(found.interval, "+.3f"), found.difference),
            Cell(tested or _NONE, value=found.p),
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


def numbered_tables(results: StudyResults) -> dict[str, Table | None]:
    """The tables with a number, by their place on the page; None where there is nothing for one."""
    summarized, tried = summaries(results), tuning_summaries(results)
    return {
        "numbers": _numbers(summarized, has_gains=_has_gains(tried)) if summarized else None,
        "worth": _worth(results),
        "tuning": _tuning(tried, results.protocol) if tried else None,
        "machine": Table(
            "Versions and machine",
            "Training time is summed over cells; those that ran side by side count each.",
            [],
            [
                *([Cell(name), Cell(value)] for name, value in results.environment.items()),
                *([[Cell("training time"), Cell(duration(results.seconds))]] if results.seconds else []),
            ],
            is_sortable=False,
        ),
    }


def _has_gains(tried: Sequence[TuningSummary]) -> bool:
    return len({trial.setting.initial_gain for trial in tried}) > 1


def _numbers(summarized: Sequence[Summary], *, has_gains: bool) -> Table:
    headings = (
        f"Learning\nrate{', gain' if has_gains else ''}",
        "n",
        "Solved",
        "Mean\naccuracy",
        "Rollout\ndigits",
        "Rollout\nexact",
        "Steps\nto solve",
    )
    return Table(
        "Every condition and mechanism",
        f"Final seeds; n counts them. Brackets: {LEVEL:.0%} interval, Wilson for the share solved, bootstrap for the "
        f"mean accuracy (none: fewer than {MINIMUM_FOR_INTERVAL} seeds, or all equal). Rollouts: means over seeds. "
        "Steps to solve: by when half of the seeds had solved; > x: fewer than half within x steps.",
        [
            *(Column(each, is_number=False) for each in ("Condition", "Mechanism")),
            *(Column(each) for each in (*headings, "Diverged")),
        ],
        [
            [
                Cell(found.condition),
                Cell(mechanism_name(found.mechanism)),
                Cell(
                    f"{found.setting.learning_rate:g}",
                    f"gain {found.setting.initial_gain:g}" if has_gains else "",
                    found.setting.learning_rate,
                ),
                Cell(str(found.seeds), value=found.seeds),
                Cell(f"{found.solved}/{found.seeds}", _ends(found.solved_interval, ".3f"), found.solved / found.seeds),
                Cell(f"{found.accuracy:.3f}", _ends(found.accuracy_interval, ".3f"), found.accuracy),
                *(
                    Cell(_NONE) if share is None else Cell(f"{share:.3f}", value=share)
                    for share in (found.rollout_digits, found.rollout_exact)
                ),
                Cell(
                    f"> {found.steps:,}" if found.median_steps is None else f"{found.median_steps:,.0f}",
                    value=found.steps + 1 if found.median_steps is None else found.median_steps,
                ),
                Cell(str(found.diverged), value=found.diverged),
            ]
            for found in summarized
        ],
    )


def _worth(results: StudyResults) -> Table:
    """The worth of an accuracy. Facts that no task of the study has are left out."""
    final = results.seeds.filter(pl.col("role") == "final", pl.col("contexts_seen").is_not_null())
    seen = dict(final.group_by("condition").agg(pl.col("contexts_seen").mean()).iter_rows())

    def share(value: float) -> str:
        return f"{value:.3f}"

    def percent(value: float) -> str:
        return f"{100 * value:.1f}%"

    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("State\nspace", "state_space", lambda number: f"{number:,}" if number < 10**12 else f"{number:.2e}"),
        ("Bits", "complexity", lambda bits: f"{bits:.1f}"),
        ("Cycles", "cycles", str),
        ("Chance", "chance", share),
        ("Majority\ndigit", "majority", share),
        ("Copy\nlast\ndigit", "copy_last", share),
        ("Best\npossible", "ceiling", share),
        ("Starts\nheld\nout", "held_out", percent),
        ("Test\nsequences", "test_sequences", lambda count: f"{count:,}"),
        ("Contexts\nseen", "contexts_seen", percent),
    ]
    facts = [
        {**condition.facts, **({"contexts_seen": seen[condition.label]} if condition.label in seen else {})}
        for condition in results.conditions
    ]
    kept = [column for column in shown if any(known.get(column[1]) not in (None, "") for known in facts)]

    def cell(known: dict[str, Any], fact: str, write: Callable[[Any], str]) -> Cell:
        value = known.get(fact)
        if value in (None, ""):
            return Cell(_NONE)
        return Cell(write(value), value=None if isinstance(value, str) else float(value))

    return Table(
        "The worth of a number",
        "Accuracies that need no training, and the share of the test that was new. Contexts seen: share of test "
        "contexts that also occurred in training, mean over final seeds (no interval).",
        [
            Column("Condition", is_number=False),
            *(Column(heading, is_number=fact != "cycles") for heading, fact, _ in kept),
        ],
        [
            [Cell(condition.label), *(cell(known, fact, write) for _, fact, write in kept)]
            for condition, known in zip(results.conditions, facts, strict=True)
        ],
    )


def _tuning(tried: Sequence[TuningSummary], protocol: int) -> Table:
    """The results of each setting, per condition and mechanism."""
    settings, has_gains = sorted({trial.setting for trial in tried}), _has_gains(tried)

    def heading(setting: Setting) -> str:
        gain = f",\ngain\n{setting.initial_gain:g}" if has_gains else ""
        return f"Rate\n{setting.learning_rate:g}{gain}"

    def cell(trial: TuningSummary | None) -> Cell:
        if trial is None:
            return Cell(_NONE)
        chosen = ", chosen" if trial.chosen else ""
        return Cell(f"{trial.accuracy:.3f}", f"{trial.solved}/{trial.seeds}{chosen}", trial.accuracy, trial.chosen)

    rows = []
    for (label, mechanism), trials in groupby(tried, key=lambda trial: (trial.condition, trial.mechanism)):
        found = {trial.setting: trial for trial in trials}
        rows.append([Cell(label), Cell(mechanism_name(mechanism)), *(cell(found.get(each)) for each in settings)])
    return Table(
        "Settings tried",
        f"Mean accuracy{' on validation sequences' if protocol > 2 else ''} and solved/n on the n tuning seeds, which "
        "count nowhere else. Bold and marked: the setting chosen for the final seeds. No intervals: these seeds decide "
        "a setting and are no evidence.",
        [
            *(Column(each, is_number=False) for each in ("Condition", "Mechanism")),
            *(Column(heading(s)) for s in settings),
        ],
        rows,
    )


def _percent(share: float | None, verdict: str = "") -> Cell:
    if share is None:
        return Cell(_NONE)
    return Cell(">99%" if 0.995 <= share < 1 else f"{100 * share:.0f}%", verdict, share, verdict == "ahead")


def _against_baseline(found: Comparison | None) -> str:
    """The verdict on one of several mechanisms, in the fewest words."""
    if found is None:
        return "not compared"
    if found.leader is not None:
        return "ahead" if found.leader == found.candidate.mechanism else "behind"
    return "" if found.verdict == "no difference shown" else found.verdict


def _ends(interval: Interval | None, spec: str) -> str:
    return f"[{interval:{spec}}]" if interval else "no interval"


def duration(seconds: float) -> str:
    """``"2 h 05 min"``, ``"3 min 12 s"`` or ``"42 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
