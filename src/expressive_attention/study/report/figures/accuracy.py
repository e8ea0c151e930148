"""Accuracy: one panel per model, one column per task."""

from __future__ import annotations

from typing import Any

import polars as pl

from ...analysis.summaries import Summary, evidence, summaries
from ...analysis.wording import describe_interval, mechanism_name
from ...config.condition import Condition
from ..drawing.description import Axis, Drawing, Group, Panel, Part, Points, Reference, Rule
from ..drawing.layout import finished_conditions, ladder
from ..drawing.theme import GRID, MEAN, PREDICTORS, SEED, crowding, dodge, predictors_of, spread
from ..figure import Material, ReportFigure
from ..parts import BOOTSTRAP, ENDS, SHARE_RANGE, ends, tasks_axis

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing:
    results = material.shown
    layout = ladder(results)
    boundaries = [Rule(boundary - 0.5, "x", GRID) for boundary in range(1, len(layout.tasks))]
    panels = [
        Panel(
            panel.title,
            tasks_axis(layout.tasks),
            Axis("held-out accuracy", SHARE_RANGE),
            [*boundaries, *_predictors(panel.conditions), *_mechanisms(material, panel.conditions)],
            height=1.95,
        )
        for panel in layout.panels
    ]
    known = {fact for condition in results.conditions for fact in predictors_of(condition)}
    return Drawing(
        alternative=f"Held-out accuracy of {material.names} on each task, by state space. Numbers: table 1.",
        note=(
            f"Small marks: one seed each ({material.seeds}). Large marks: mean over seeds with {BOOTSTRAP}."
            f"{material.ordered}"
        ),
        groups=[Group("", panels)],
        selected=material.shown_note(len(finished_conditions(results)), "accuracy"),
        stacked=True,
        slots=len(layout.tasks),
        key=material.key,
        references=[fact for fact in PREDICTORS if fact in known],
    )


def _predictors(conditions: tuple[tuple[int, Condition], ...]) -> list[Part]:
    known = [(column, predictors_of(condition)) for column, condition in conditions]
    return [
        Reference(
            name,
            [column + shift for column, values in known if fact in values],
            [values[fact] for _, values in known if fact in values],
            marker,
            symbol,
            size=24 if fact == "chance" else 6,
        )
        for fact, (name, marker, symbol, shift) in PREDICTORS.items()
    ]


def _mechanisms(material: Material, conditions: tuple[tuple[int, Condition], ...]) -> list[Part]:
    """Seeds of each mechanism, and its means with intervals; the seeds stand left of the mean."""
    mechanisms = material.results.mechanisms
    found = {(summary.condition, summary.mechanism): summary for summary in summaries(material.shown)}
    closer, parts = crowding(mechanisms, 0.06 + 0.1 / 2), []  # seeds reach as far, below
    for mechanism, shift in dodge(mechanisms).items():
        present: list[tuple[float, Summary]] = [
            (column + shift, found[condition.label, mechanism])
            for column, condition in conditions
            if (condition.label, mechanism) in found
        ]
        style, name = material.styles[mechanism], mechanism_name(mechanism)
        x, y, texts = [], [], []
        for at, summary in present:
            rows = evidence(material.shown.seeds, summary.condition, mechanism)
            x += [at - 0.06 * closer + offset for offset in spread(rows.height, 0.1 * closer)]
            y += rows["accuracy"].to_list()
            texts += [f"{name}, seed {seed}" for seed in rows["seed"]]
        intervals = [summary.accuracy_interval for _, summary in present]
        means = Points(
            [at + 0.06 * closer for at, _ in present],
            [summary.accuracy for _, summary in present],
            style,
            [
                f"{name}: {summary.accuracy:.3f}<br>"
                + describe_interval(summary.accuracy_interval, summary.seeds, ".3f")
                for _, summary in present
            ],
            MEAN,
            low=[interval and interval.low for interval in intervals],
            high=[interval and interval.high for interval in intervals],
            joined=True,
        )
        parts += [Points(x, y, style, texts, SEED, value=".3f"), means]
    return parts


def _table(material: Material) -> pl.DataFrame:
    """Accuracy of each seed, of their mean with its interval, and of the predictors that need no training."""
    results, rows = material.results, list[dict[str, Any]]()
    for condition in finished_conditions(results):
        about = {"condition": condition.label, "bits": condition.facts["complexity"]}
        rows += [
            {**about, "shown": PREDICTORS[fact][0], "accuracy": value}
            for fact, value in predictors_of(condition).items()
        ]
    bits = {condition.label: condition.facts["complexity"] for condition in results.conditions}
    for found in summaries(results):
        about = {"condition": found.condition, "bits": bits[found.condition], "mechanism": found.mechanism}
        seeds = evidence(results.seeds, found.condition, found.mechanism).select("seed", "accuracy")
        rows += [{**about, "shown": "seed", **row} for row in seeds.iter_rows(named=True)]
        rows.append({**about, "shown": "mean", "accuracy": found.accuracy, **ends(found.accuracy_interval)})
    columns = {"condition": pl.String, "bits": pl.Float64, "mechanism": pl.String, "shown": pl.String}
    return pl.DataFrame(rows, schema=columns | {"seed": pl.Int64, "accuracy": pl.Float64} | ENDS)


FIGURE = ReportFigure(30, "Accuracy by task", _draw, _table)
