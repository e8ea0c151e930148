"""The share of seeds solved by model and task, one map per mechanism."""

from __future__ import annotations

import polars as pl

from ...analysis.estimators import LEVEL
from ...analysis.summaries import summaries
from ...analysis.wording import mechanism_name
from ..drawing.description import Drawing, Group
from ..drawing.layout import finished_conditions, ladder
from ..drawing.theme import SHARE
from ..figure import Material, ReportFigure
from ..parts import PLACE, SOLVED, map_panel, place_in_map, solved_of

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing:
    results = material.results
    panels = [
        map_panel(
            results,
            mechanism_name(mechanism),
            {
                found.condition: (
                    found.solved / found.seeds,
                    f"{found.solved}/{found.seeds}",
                    f"{found.solved} of {found.seeds} seeds solved, {LEVEL:.0%} interval {found.solved_interval:.3f}",
                )
                for found in summaries(results)
                if found.mechanism == mechanism
            },
            ("#ffffff", SHARE),
            (0.0, 1.0),
        )
        for mechanism in dict.fromkeys(found.mechanism for found in summaries(results))
    ]
    return Drawing(
        alternative=f"Share of seeds solved by {material.names} for each model and task. Numbers: table 1.",
        note=(
            f"Seeds that solved the task, of all ({material.seeds}); full green: all. Intervals: {LEVEL:.0%} "
            f"Wilson, in table 1.{material.ordered}"
        ),
        groups=[Group("", panels)],
        selected=material.shown_note(len(finished_conditions(material.shown)), "solved_map"),
        stacked=True,
        slots=len(ladder(material.shown).tasks),
        swatches={"all seeds solved the task": SHARE, "none did": "#ffffff"},
    )


def _table(material: Material) -> pl.DataFrame:
    rows = [
        place_in_map(found.condition, material.results.conditions) | solved_of(found)
        for found in summaries(material.results)
    ]
    return pl.DataFrame(rows, schema=PLACE | SOLVED)


FIGURE = ReportFigure(20, "Seeds solved by task and model", _draw, _table)
