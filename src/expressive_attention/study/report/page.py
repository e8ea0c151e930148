"""A study's report: one HTML page that needs no network, and its figures as image files."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..analysis.claims import verdicts
from ..analysis.summaries import (
    LEVEL,
    MINIMUM_CONTEXTS,
    MINIMUM_FOR_INTERVAL,
    MINIMUM_PREDICTIONS,
    SIGNIFICANCE,
    SMALLEST_EFFECT,
    Interval,
    Summary,
    TuningSummary,
    comparisons,
    findings_by_condition,
    mechanism_name,
    overview,
    summaries,
    tuning_summaries,
)
from ..files import write_atomically
from ..runs.results import Condition, Setting, StudyResults
from ..runs.store import Store
from . import with_plotly as plots
from .attention import AttentionMap, attention_maps
from .tables import split_table
from .theme import (
    AHEAD,
    BEHIND,
    MOST_CONDITIONS,
    MOST_PANELS,
    MUTED,
    PREDICTORS,
    SHARE,
    Style,
    candidate_names,
    finished_conditions,
    ladder,
    most_different,
    narrowed,
    notes,
    predictors_of,
    shown_note,
    split_conditions,
    splits_of,
    styles,
)
from .with_matplotlib import save_figures

__all__ = ["write_report"]

_MOST_MAPPED = 3  # conditions whose models' attention is shown
# Interactive plots in groups: heading of the group, headings of its plots and plots; empty where there is none.
_Groups = Sequence[tuple[str, Sequence[tuple[str, Markup]]]]


@dataclass(frozen=True)
class _Chart:
    """One figure of the page.

    Attributes:
        name: Of its anchor and its files.
        title: Its heading.
        alternative: What it shows, for those who cannot see it.
        note: What its marks stand for.
        groups: Interactive plots.
        still: Data URI of an image, for paper and for browsers without scripts; None: there is none.
        more: What further plots, to be unfolded, are, and these.
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


def write_report(results: StudyResults, directory: Path, *, trust: bool = False) -> Path:
    """Writes ``report.html``, ``figures/*.png`` and ``figures/*.csv``, each file at once or not at all.

    Where `directory` also holds the study's cells, the report shows attention maps of their models.

    Args:
        results: The study, finished or not.
        directory: Where to write; created if missing.
        trust: Run the study's Python files, without which the models of its own tasks and mechanisms have no maps.

    Returns:
        The path of the page.

    Raises:
        ValueError: If a measure of a final or tuning seed is not a finite number.
        CorruptCellError: If stored parameters are not what was written.
    """
    maps = attention_maps(results, Store(directory), most_different(results, _MOST_MAPPED), trust=trust)
    images = save_figures(results, directory / "figures", maps)
    charts = _charts(results, images, maps)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("expressive_attention.study.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["Markup"] = Markup
    environment.filters |= {
        "mechanism": mechanism_name,
        "duration": _duration,
        "interval": _interval,
        "steps": _steps,
    }
    settings = sorted({trial.setting for trial in tuning_summaries(results)})
    page = environment.get_template("report.html.j2").render(
        results=results,
        verdicts=verdicts(results, results.claims),
        overview=overview(results),
        findings=findings_by_condition(results),
        charts=charts,
        chart_numbers={chart.name: number for number, chart in enumerate(charts, 1)},
        predictor_names={fact: name for fact, (name, _, _, _) in PREDICTORS.items()},
        summaries=[(label, list(rows)) for label, rows in groupby(summaries(results), lambda row: row.condition)],
        worth=_worth(results),
        tuning=_tuning_rows(results),
        settings=settings,
        gains_by_rate=Counter(setting.learning_rate for setting in settings),
        several_gains=len({setting.initial_gain for setting in settings}) > 1,
        most_conditions=MOST_CONDITIONS,
        most_findings=MOST_PANELS,
        level=f"{LEVEL:.0%}",
        significance=f"{SIGNIFICANCE:g}",
        smallest=SMALLEST_EFFECT,
        predictions=MINIMUM_PREDICTIONS,
        contexts=MINIMUM_CONTEXTS,
        minimum=MINIMUM_FOR_INTERVAL,
        plotlyjs=Markup(get_plotlyjs()),
        muted=MUTED,
        geometry=(directory / "geometry" / "geometry.html").exists(),
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    write_atomically(path, page.encode())
    return path


def _charts(results: StudyResults, images: dict[str, Path], maps: Sequence[AttentionMap]) -> list[_Chart]:
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
            _Chart(
                name="margin_map",
                title="Margin by complexity and model",
                alternative=f"Accuracy of {against} for each model and task. Numbers: findings.",
                note=told["margin_map"] + shown["margin_map"],
                groups=[("", [("", plots.markup(plots.margin_map_plot(results)))])],
                still=stills["margin_map"],
                swatches=[(AHEAD, f"{candidate_names(results)} better"), (BEHIND, "DPA better")],
                columns=columns,
            )
        )
    charts += [
        _Chart(
            name="solved_map",
            title="Seeds solved by complexity and model",
            alternative=f"Share of seeds solved by {names} for each model and task. Numbers: table 1.",
            note=told["solved_map"] + shown["solved_map"],
            groups=[("", [("", plots.markup(plots.solved_map_plot(results)))])],
            still=stills["solved_map"],
            swatches=[(SHARE, "all seeds solved the task"), ("#ffffff", "none did")],
            columns=columns,
        ),
        _Chart(
            name="accuracy",
            title="Accuracy against complexity",
            alternative=f"Held-out accuracy of {names} on each task, by state space. Numbers: table 1.",
            note=told["accuracy"] + shown["accuracy"],
            groups=[("", [("", plots.markup(plots.accuracy_plot(rows)))])],
            still=stills["accuracy"],
            key=key,
            predictors=[fact for fact in PREDICTORS if fact in predictors],
            columns=columns,
        ),
    ]
    if compared:
        candidates = list(dict.fromkeys(comparison.candidate.mechanism for comparison in compared))
        charts.append(
            _Chart(
                name="difference",
                title="Paired difference in accuracy",
                alternative=f"Accuracy of {against} on each condition. Numbers: findings.",
                note=told["difference"] + shown["difference"],
                groups=[("", [("", plots.markup(plots.difference_plot(rows)))])],
                still=stills["difference"],
                key=[(drawn[mechanism], f"{mechanism_name(mechanism)} - DPA") for mechanism in candidates],
            )
        )
    charts += [
        _Chart(
            name="solved",
            title="Seeds that solved the task",
            alternative=f"Share of seeds solved by {names} on each condition. Numbers: table 1.",
            note=told["solved"] + shown["solved"],
            groups=[("", [("", plots.markup(plots.solved_plot(rows)))])],
            still=stills["solved"],
            key=key,
        ),
        _panels(
            results,
            name="learning_curves",
            title="Learning curves",
            alternative=f"Validation accuracy of {names} against training steps on each condition.",
            draw=plots.learning_plot,
            still=stills["learning_curves"],
            key=key,
        ),
        _panels(
            results,
            name="steps_to_solve",
            title="Steps to solve",
            alternative=f"Share of seeds solved by {names} against training steps on each condition.",
            draw=plots.steps_plot,
            still=stills["steps_to_solve"],
            key=key,
        ),
    ]
    if not results.splits.is_empty() and splits_of(results):
        charts.append(_splits(results, names, stills.get("splits"), key))
    if maps:
        charts.append(
            _Chart(
                name="attention_maps",
                title="Where the worst and the best seeds look",
                alternative=f"Mean attention weights of trained models of {names}.",
                note=told["attention_maps"] + " Shown: the conditions with the largest differences.",
                groups=[
                    (label, [(", ".join(found.title), plots.markup(plots.attention_plot(found))) for found in group])
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
    draw: Callable[[StudyResults, Condition], plots.Plot],
    still: str,
    key: Sequence[tuple[Style, str]],
) -> _Chart:
    """A figure against training steps with one panel per condition: some in sight, some to unfold."""
    first = most_different(results, MOST_PANELS)
    labels = {condition.label for condition in first}
    others = [found for found in most_different(results, MOST_CONDITIONS) if found.label not in labels]
    note = notes(results)[name] + shown_note(len(first) + len(others), len(finished_conditions(results)), name)
    return _Chart(
        name=name,
        title=title,
        alternative=alternative,
        note=note,
        groups=[("", [(found.label, plots.markup(draw(results, found))) for found in first])],
        still=still,
        more=(
            f"{len(others)} conditions with smaller differences",
            [("", [(found.label, plots.markup(draw(results, found))) for found in others])] if others else [],
        ),
        key=key,
        marks=False,
    )


def _splits(results: StudyResults, names: str, still: str | None, key: Sequence[tuple[Style, str]]) -> _Chart:
    """Accuracy by group of test positions: in sight where there is more than position to tell."""
    table, splits = split_table(results), splits_of(results)

    def groups(conditions: Sequence[Condition]) -> _Groups:
        return [
            (
                found.label,
                [
                    (f"By {split}", plots.markup(plots.split_plot(results, rows)))
                    for split in splits[found.label]
                    if (rows := table.filter(pl.col("condition") == found.label, pl.col("split") == split)).height
                ],
            )
            for found in conditions
        ]

    by_position = [
        found for found in most_different(results, len(results.conditions)) if splits.get(found.label) == ["position"]
    ]
    return _Chart(
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


def _worth(results: StudyResults) -> tuple[list[tuple[str, bool]], list[tuple[str, list[str]]]]:
    """Table of what an accuracy is worth: headings and whether they are of numbers; then rows of label and cells.

    Facts that no task of the study has are left out.
    """
    seen = _contexts_seen(results)

    def share(value: float) -> str:
        return f"{value:.3f}"

    def percent(value: float) -> str:
        return f"{100 * value:.1f}%"

    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("State space", "state_space", _count),
        ("Bits", "complexity", lambda bits: f"{bits:.1f}"),
        ("Cycles", "cycles", str),
        ("Chance", "chance", share),
        ("Majority digit", "majority", share),
        ("Copy last digit", "copy_last", share),
        ("Best possible", "ceiling", share),
        ("Starts held out", "held_out", percent),
        ("Test sequences", "test_sequences", lambda count: f"{count:,}"),
        ("Contexts seen", "contexts_seen", percent),
    ]
    facts = [
        {**condition.facts, **({"contexts_seen": seen[condition.label]} if condition.label in seen else {})}
        for condition in results.conditions
    ]
    kept = [column for column in shown if any(known.get(column[1]) not in (None, "") for known in facts)]
    return (
        [(heading, fact != "cycles") for heading, fact, _ in kept],
        [
            (
                condition.label,
                [write(known[fact]) if known.get(fact) not in (None, "") else "\N{EN DASH}" for _, fact, write in kept],
            )
            for condition, known in zip(results.conditions, facts, strict=True)
        ],
    )


def _tuning_rows(results: StudyResults) -> list[tuple[str, list[tuple[str, dict[Setting, TuningSummary]]]]]:
    """Per condition and mechanism, what each setting reached."""
    return [
        (
            label,
            [
                (mechanism, {trial.setting: trial for trial in trials})
                for mechanism, trials in groupby(tried, key=lambda trial: trial.mechanism)
            ],
        )
        for label, tried in groupby(tuning_summaries(results), key=lambda trial: trial.condition)
    ]


def _contexts_seen(results: StudyResults) -> dict[str, float]:
    """Mean over final seeds of the share of test contexts that also occurred in training."""
    final = results.seeds.filter(pl.col("role") == "final", pl.col("contexts_seen").is_not_null())
    return dict(final.group_by("condition").agg(pl.col("contexts_seen").mean()).iter_rows())


def _interval(interval: Interval | None) -> str:
    return f"[{interval:.3f}]" if interval else "no interval"


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**12 else f"{number:.2e}"


def _steps(summary: Summary) -> str:
    return f"> {summary.steps:,}" if summary.median_steps is None else f"{summary.median_steps:,.0f}"


def _duration(seconds: float) -> str:
    """``"2 h 05 min"``, ``"3 min 12 s"`` or ``"42 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
