"""The picture that opens the page: how often each mechanism is right, one row per condition."""

from __future__ import annotations

import polars as pl

from ...analysis.summaries import summaries
from ...analysis.wording import describe_interval, mechanism_name
from ..drawing.description import Axis, Drawing, Group, Part, Points, Reference
from ..drawing.layout import MOST_PANELS, most_different
from ..drawing.theme import MEAN, dodge
from ..figure import Material, ReportFigure
from ..parts import BOOTSTRAP, ENDS, SHARE_RANGE, condition_rows, ends

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing:
    conditions = most_different(material.results, MOST_PANELS)
    rows = {condition.label: row for row, condition in enumerate(conditions)}
    parts: list[Part] = [
        Reference(
            "a guess:",
            [found.facts["chance"] for found in conditions],
            list(rows.values()),
            "|",
            "line-ns-open",
            20,
            "x",
        )
    ]
    for mechanism, shift in dodge(material.results.mechanisms).items():
        name = mechanism_name(mechanism)
        found = [each for each in summaries(material.results) if each.mechanism == mechanism and each.condition in rows]
        intervals = [each.accuracy_interval for each in found]
        parts.append(
            Points(
                [each.accuracy for each in found],
                [rows[each.condition] + shift for each in found],
                material.styles[mechanism],
                [
                    f"{name}: {each.accuracy:.2f}<br>" + describe_interval(each.accuracy_interval, each.seeds, ".2f")
                    for each in found
                ],
                MEAN,
                along="x",
                low=[interval and interval.low for interval in intervals],
                high=[interval and interval.high for interval in intervals],
            )
        )
    along = Axis("share of right answers", SHARE_RANGE)
    return Drawing(
        alternative=f"Share of right answers of {material.names} on each condition. Numbers: the table below it.",
        note=(
            f"Right end: always right; grey stroke: a guess. Mean over seeds ({material.seeds}) with {BOOTSTRAP}, on "
            "held-out sequences."
        ),
        groups=[Group("", [condition_rows(list(rows), along, parts, material.results.mechanisms)])],
        selected=material.shown_note(len(rows), "at_a_glance"),
        stacked=True,
        key=material.key,
    )


def _table(material: Material) -> pl.DataFrame:
    """Mean accuracy of each mechanism and its interval."""
    rows = [
        {
            "condition": found.condition,
            "mechanism": found.mechanism,
            "accuracy": found.accuracy,
            **ends(found.accuracy_interval),
        }
        for found in summaries(material.results)
    ]
    columns = {"condition": pl.String, "mechanism": pl.String, "accuracy": pl.Float64}
    return pl.DataFrame(rows, schema=columns | ENDS)


FIGURE = ReportFigure(0, "At a glance", _draw, _table)
