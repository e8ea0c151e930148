"""The share of seeds solved on each condition."""

from __future__ import annotations

import polars as pl

from ...analysis.estimators import LEVEL
from ...analysis.summaries import summaries
from ...analysis.wording import describe_interval, mechanism_name
from ..drawing.description import Axis, Drawing, Group, Note, Part, Points
from ..drawing.layout import finished_conditions
from ..drawing.theme import MEAN, dodge
from ..figure import Material, ReportFigure
from ..parts import ENDS, SHARE_RANGE, SOLVED, condition_rows, ends, solved_of

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing:
    results, parts = material.shown, list[Part]()
    labels = [condition.label for condition in finished_conditions(results)]
    for mechanism, shift in dodge(results.mechanisms).items():
        found = [summary for summary in summaries(results) if summary.mechanism == mechanism]
        at = [labels.index(summary.condition) + shift for summary in found]
        counts = [f"{summary.solved}/{summary.seeds}" for summary in found]
        points = Points(
            [summary.solved / summary.seeds for summary in found],
            at,
            material.styles[mechanism],
            [
                f"{mechanism_name(mechanism)}: {count} solved<br>"
                + describe_interval(summary.solved_interval, summary.seeds, ".3f")
                for count, summary in zip(counts, found, strict=True)
            ],
            MEAN,
            along="x",
            low=[summary.solved_interval.low for summary in found],
            high=[summary.solved_interval.high for summary in found],
        )
        parts += [points, *(Note(count, "beside", y) for count, y in zip(counts, at, strict=True))]
    along = Axis("share of seeds solved", SHARE_RANGE)
    return Drawing(
        alternative=f"Share of seeds solved by {material.names} on each condition. Numbers: table 1.",
        note=(f"Share of seeds that solved the task, with {LEVEL:.0%} Wilson interval ({material.seeds})."),
        groups=[Group("", [condition_rows(labels, along, parts, results.mechanisms)])],
        selected=material.shown_note(len(labels), "solved"),
        stacked=True,
        key=material.key,
    )


def _table(material: Material) -> pl.DataFrame:
    """Seeds solved, their share and its interval."""
    rows = [
        {"condition": found.condition, **solved_of(found), **ends(found.solved_interval)}
        for found in summaries(material.results)
    ]
    return pl.DataFrame(rows, schema={"condition": pl.String} | SOLVED | ENDS)


FIGURE = ReportFigure(50, "Seeds that solved the task", _draw, _table)
