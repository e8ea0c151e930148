"""The charts of the page, those that answer most first."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import polars as pl
from markupsafe import Markup

from ..analysis.comparisons import comparisons
from ..analysis.wording import mechanism_name
from ..config.condition import Condition
from ..runs.results import StudyResults
from .attention import AttentionMap
from .figures.layout import (
    MOST_CONDITIONS,
    MOST_PANELS,
    finished_conditions,
    ladder,
    most_different,
    narrowed,
    split_conditions,
    splits_of,
)
from .figures.notes import candidate_names, notes, shown_note
from .figures.plotly_maps import attention_plot, margin_map_plot, solved_map_plot, split_plot
from .figures.plotly_parts import markup
from .figures.tables import split_table
from .figures.theme import AHEAD, BEHIND, PREDICTORS, SHARE, Style, predictors_of, styles
from .figures.with_plotly import Plot, accuracy_plot, difference_plot, learning_plot, solved_plot, steps_plot

__all__ = ["charts_of"]


# Interactive plots in groups: heading of the group, headings of its plots and plots; empty where there is none.
_Groups = Sequence[tuple[str, Sequence[tuple[str, Markup]]]]


@dataclass(frozen=True)
class Chart:
    """One figure of the page.

    Attributes:
        name: Of its anchor and its files.
        title: Its heading.
        alternative: Its content in words, for readers who cannot see it.
        note: The meaning of its marks.
        groups: Interactive plots.
        still: Data URI of an image, for paper and for browsers without scripts; None: there is none.
        more: Heading of further plots, which a reader can unfold, and the plots.
        key: Entries of the key: mechanism's style and label.
        swatches: Entries of the key: color and label.
        marks: Whether the key shows markers beside lines.
        predictors: Predictors that the key names, as in `PREDICTORS`.
        columns: Tasks beside each other, each of which needs some width.
        small: Whether plots are small enough for four beside each other.
    """

    name: str
    title: str
    alternative: str
    note: str
    groups: _Groups
    still: str | None
    more: tuple[str, _Groups] = ("", ())
    key: Sequence[tuple[Style, str]] = ()
    swatches: Sequence[tuple[str, str]] = ()
    marks: bool = True
    predictors: Sequence[str] = ()
    columns: int = 1
    small: bool = False


def charts_of(results: StudyResults, images: dict[str, Path], maps: Sequence[AttentionMap]) -> list[Chart]:
    """The figures that the results allow, those that answer most first."""
    if not images:
        return []
    rows, finished = narrowed(results), finished_conditions(results)
    stills = {
        name: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for name, path in images.items()
    }
    drawn = styles(results.mechanisms)
    key = [(style, mechanism_name(mechanism)) for mechanism, style in drawn.items()]
    names = " and ".join(name for _, name in key)
    told = notes(results)
    columns = len(ladder(rows).tasks)
    shown = {name: shown_note(len(finished_conditions(rows)), len(finished), name) for name in images}
    predictors = {fact for condition in rows.conditions for fact in predictors_of(condition)}
    against = f"{candidate_names(results)} minus that of DPA"
    charts = []
    if compared := comparisons(rows):
        charts.append(
            Chart(
                name="margin_map",
                title="Margin by complexity and model",
                alternative=f"Accuracy of {against} for each model and task. Numbers: findings.",
                note=told["margin_map"] + shown["margin_map"],
                groups=[("", [("", markup(margin_map_plot(results)))])],
                still=stills["margin_map"],
                swatches=[(AHEAD, f"{candidate_names(results)} better"), (BEHIND, "DPA better")],
                columns=columns,
            )
        )
    charts += [
        Chart(
            name="solved_map",
            title="Seeds solved by complexity and model",
            alternative=f"Share of seeds solved by {names} for each model and task. Numbers: table 1.",
            note=told["solved_map"] + shown["solved_map"],
            groups=[("", [("", markup(solved_map_plot(results)))])],
            still=stills["solved_map"],
            swatches=[(SHARE, "all seeds solved the task"), ("#ffffff", "none did")],
            columns=columns,
        ),
        Chart(
            name="accuracy",
            title="Accuracy against complexity",
            alternative=f"Held-out accuracy of {names} on each task, by state space. Numbers: table 1.",
            note=told["accuracy"] + shown["accuracy"],
            groups=[("", [("", markup(accuracy_plot(rows)))])],
            still=stills["accuracy"],
            key=key,
            predictors=[fact for fact in PREDICTORS if fact in predictors],
            columns=columns,
        ),
    ]
    if compared:
        candidates = list(dict.fromkeys(comparison.candidate.mechanism for comparison in compared))
        charts.append(
            Chart(
                name="difference",
                title="Paired difference in accuracy",
                alternative=f"Accuracy of {against} on each condition. Numbers: findings.",
                note=told["difference"] + shown["difference"],
                groups=[("", [("", markup(difference_plot(rows)))])],
                still=stills["difference"],
                key=[(drawn[mechanism], f"{mechanism_name(mechanism)} - DPA") for mechanism in candidates],
            )
        )
    charts += [
        Chart(
            name="solved",
            title="Seeds that solved the task",
            alternative=f"Share of seeds solved by {names} on each condition. Numbers: table 1.",
            note=told["solved"] + shown["solved"],
            groups=[("", [("", markup(solved_plot(rows)))])],
            still=stills["solved"],
            key=key,
        ),
        _panels(
            results,
            name="learning_curves",
            title="Learning curves",
            alternative=f"Validation accuracy of {names} against training steps on each condition.",
            draw=learning_plot,
            still=stills["learning_curves"],
            key=key,
        ),
        _panels(
            results,
            name="steps_to_solve",
            title="Steps to solve",
            alternative=f"Share of seeds solved by {names} against training steps on each condition.",
            draw=steps_plot,
            still=stills["steps_to_solve"],
            key=key,
        ),
    ]
    if not results.splits.is_empty() and splits_of(results):
        charts.append(_splits(results, names, stills.get("splits"), key))
    if maps:
        charts.append(
            Chart(
                name="attention_maps",
                title="Where the worst and the best seeds look",
                alternative=f"Mean attention weights of trained models of {names}.",
                note=told["attention_maps"] + " Shown: the conditions with the largest differences.",
                groups=[
                    (label, [(", ".join(found.title), markup(attention_plot(found))) for found in group])
                    for label, group in groupby(maps, key=lambda found: found.condition)
                ],
                small=True,
                still=stills["attention_maps"],
                swatches=[(SHARE, "all the weight of the query"), ("#ffffff", "none")],
            )
        )
    return charts


def _panels(
    results: StudyResults,
    name: str,
    title: str,
    alternative: str,
    draw: Callable[[StudyResults, Condition], Plot],
    still: str,
    key: Sequence[tuple[Style, str]],
) -> Chart:
    """A figure against training steps with one panel per condition: some in sight, some to unfold."""
    first = most_different(results, MOST_PANELS)
    labels = {condition.label for condition in first}
    others = [found for found in most_different(results, MOST_CONDITIONS) if found.label not in labels]
    note = notes(results)[name] + shown_note(len(first) + len(others), len(finished_conditions(results)), name)
    return Chart(
        name=name,
        title=title,
        alternative=alternative,
        note=note,
        groups=[("", [(found.label, markup(draw(results, found))) for found in first])],
        still=still,
        more=(
            f"{len(others)} conditions with smaller differences",
            [("", [(found.label, markup(draw(results, found))) for found in others])] if others else [],
        ),
        key=key,
        marks=False,
    )


def _splits(results: StudyResults, names: str, still: str | None, key: Sequence[tuple[Style, str]]) -> Chart:
    """Accuracy by group of test positions: in sight where there is more than position to tell."""
    table, splits = split_table(results), splits_of(results)

    def groups(conditions: Sequence[Condition]) -> _Groups:
        return [
            (
                found.label,
                [
                    (f"By {split}", markup(split_plot(results, rows)))
                    for split in splits[found.label]
                    if (rows := table.filter(pl.col("condition") == found.label, pl.col("split") == split)).height
                ],
            )
            for found in conditions
        ]

    by_position = [
        found for found in most_different(results, len(results.conditions)) if splits.get(found.label) == ["position"]
    ]
    return Chart(
        name="splits",
        title="Accuracy within a sequence",
        alternative=f"Accuracy of {names} by position and by rule.",
        note=notes(results)["splits"],
        groups=groups(split_conditions(results)),
        still=still,
        more=(
            "By position, where nothing else splits the test",
            [("", [(label, plot) for label, [(_, plot)] in groups(by_position[:MOST_PANELS])])] if by_position else [],
        ),
        key=key,
    )
