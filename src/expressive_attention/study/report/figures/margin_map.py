"""The mean difference in accuracy by model and task: a star where a mechanism is ahead."""

from __future__ import annotations

import polars as pl

from ...analysis.estimators import LEVEL, SIGNIFICANCE, SMALLEST_EFFECT
from ...analysis.wording import describe_p, mechanism_name
from ..drawing.description import Drawing, Group
from ..drawing.layout import finished_conditions, ladder
from ..drawing.theme import AHEAD, BEHIND
from ..figure import Material, ReportFigure
from ..parts import ENDS, PLACE, ends, map_panel, place_in_map

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing | None:
    compared = material.compared  # of all conditions, also those not shown: p is adjusted for their number
    if not compared:
        return None
    columns = len(ladder(material.shown).tasks)
    shown = {condition.label for condition in material.shown.conditions}
    reach = max(0.05, *(abs(found.difference) for found in compared if found.condition in shown))
    panels = [
        map_panel(
            material.results,
            f"{mechanism_name(mechanism)} - DPA",
            {
                found.condition: (
                    found.difference,
                    f"{found.difference:+.2f}{'*' if found.leader else ''}",
                    f"{found.difference:+.4f}, "
                    + (f"{LEVEL:.0%} interval {found.interval:+.4f}" if found.interval else "no interval")
                    + f", {len(found.differences)} pairs"
                    + ("" if found.p is None else f", {describe_p(found.p)}")
                    + f": {found.verdict}",
                )
                for found in compared
                if found.candidate.mechanism == mechanism
            },
            (BEHIND, "#ffffff", AHEAD),
            (-reach, reach),
        )
        for mechanism in dict.fromkeys(found.candidate.mechanism for found in compared)
    ]
    names = material.candidates
    return Drawing(
        alternative=f"Accuracy of {names} minus that of DPA for each model and task. Numbers: findings.",
        note=(
            f"Mean accuracy of {names} minus that of DPA over pairs of seeds ({material.pairs}). "
            f"Blue: {names} better; orange: DPA better. Star: p < {SIGNIFICANCE:g} in the sign-flip test of the paired "
            "differences, adjusted over the family of comparisons (Holm), and "
            f"{SMALLEST_EFFECT:g} or more.{material.ordered}"
        ),
        groups=[Group("", panels)],
        selected=material.shown_note(len(finished_conditions(material.shown)), "margin_map"),
        stacked=True,
        slots=columns,
        swatches={f"{names} better": AHEAD, "DPA better": BEHIND},
    )


def _table(material: Material) -> pl.DataFrame:
    rows = [
        {
            **place_in_map(found.condition, material.results.conditions),
            "mechanism": found.candidate.mechanism,
            "minus": found.baseline.mechanism,
            "difference": found.difference,
            **ends(found.interval),
            "pairs": len(found.differences),
            "ahead": found.leader,
        }
        for found in material.compared
    ]
    columns = {"mechanism": pl.String, "minus": pl.String, "difference": pl.Float64} | ENDS
    return pl.DataFrame(rows, schema=PLACE | columns | {"pairs": pl.Int64, "ahead": pl.String})


FIGURE = ReportFigure(10, "Margin by task and model", _draw, _table)
