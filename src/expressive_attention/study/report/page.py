"""The page of a report: one file, which needs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..analysis.claims import verdicts
from ..analysis.comparisons import MINIMUM_CONTEXTS, MINIMUM_PREDICTIONS
from ..analysis.estimators import LEVEL, MINIMUM_FOR_INTERVAL, SIGNIFICANCE, SMALLEST_EFFECT, Interval
from ..analysis.findings import findings_by_condition, overview
from ..analysis.summaries import Summary, TuningSummary, summaries, tuning_summaries
from ..analysis.wording import mechanism_name
from ..config.condition import Setting
from ..files import write_atomically
from ..runs.results import StudyResults
from ..runs.store import Store
from .attention import attention_maps
from .charts import charts_of
from .drawing.layout import MOST_CONDITIONS, MOST_PANELS, most_different
from .drawing.theme import MUTED, PREDICTORS
from .figure import Material
from .files import drawings_of, save_figures

__all__ = ["write_report"]


_MOST_MAPPED = 3  # conditions whose models' attention is shown


def write_report(results: StudyResults, directory: Path, *, trust: bool = False) -> Path:
    """Writes ``report.html``, ``figures/*.png`` and ``figures/*.csv``, each file at once or not at all.

    Where `directory` also holds the study's cells, the report shows attention maps of their models.

    Args:
        results: The study, finished or not.
        directory: Folder to write to; it is made if it does not exist.
        trust: Run the study's Python files, without which the models of its own tasks and mechanisms have no maps.

    Returns:
        The path of the page.

    Raises:
        ValueError: If a measure of a final or tuning seed is not a finite number.
        CorruptCellError: If stored parameters are not what was written.
    """
    maps = attention_maps(results, Store(directory), most_different(results, _MOST_MAPPED), trust=trust)
    material = Material(results, maps)
    drawings = drawings_of(material)
    charts = charts_of(drawings, save_figures(drawings, material, directory / "figures"))
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
    """The results of each setting, per condition and mechanism."""
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
