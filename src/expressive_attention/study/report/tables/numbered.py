"""The tables with a number: of all results, of the worth of an accuracy, of the settings tried, and of the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import polars as pl

from ...analysis.estimators import LEVEL, MINIMUM_FOR_INTERVAL
from ...analysis.summaries import Summary, TuningSummary, summaries, tuning_summaries
from ...analysis.wording import mechanism_name
from ...config.condition import Setting
from ...runs.results import StudyResults
from .table import NONE, Cell, Column, Table, ends

__all__ = ["duration", "numbered_tables"]


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
        "Best\nof 3",
        "Rollout\ndigits",
        "Rollout\nexact",
        "Steps\nto solve",
    )
    return Table(
        "Every condition and mechanism",
        f"Final seeds; n counts them. Brackets: {LEVEL:.0%} interval, Wilson for the share solved, bootstrap for the "
        f"mean accuracy (none: fewer than {MINIMUM_FOR_INTERVAL} seeds, or all equal). Best of 3: mean accuracy of the "
        "best of three seeds by validation, over all choices of three. Rollouts: means over seeds. "
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
                Cell(f"{found.solved}/{found.seeds}", ends(found.solved_interval, ".3f"), found.solved / found.seeds),
                Cell(f"{found.accuracy:.3f}", ends(found.accuracy_interval, ".3f"), found.accuracy),
                *(
                    Cell(NONE) if share is None else Cell(f"{share:.3f}", value=share)
                    for share in (found.best_of_three, found.rollout_digits, found.rollout_exact)
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
            return Cell(NONE)
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
            return Cell(NONE)
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


def duration(seconds: float) -> str:
    """``"2 h 05 min"``, ``"3 min 12 s"`` or ``"42 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
