"""Learning curves: validation accuracy against training steps, one panel per condition."""

from __future__ import annotations

import polars as pl

from ...analysis.summaries import evidence, median_curve
from ...analysis.wording import mechanism_name
from ...config.condition import Condition
from ..drawing.description import Curves, Drawing, Part, Rule
from ..drawing.theme import MUTED
from ..figure import Material, ReportFigure
from ..parts import drawing_against_steps

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing:
    results = material.results

    def parts(condition: Condition) -> list[Part]:
        found: list[Part] = [Rule(condition.facts["chance"], "y", MUTED, width=1, dotted=True)]
        for mechanism, style in material.styles.items():
            curves = evidence(results.curves, condition.label, mechanism)
            if curves.is_empty():
                continue
            seeds = [
                (rows["step"].to_list(), rows["accuracy"].to_list())
                for rows in (seed.sort("step") for seed in curves.partition_by("seed"))
            ]
            median = median_curve(curves)
            middle = (median["step"].to_list(), median["accuracy"].to_list())
            found.append(Curves(seeds, style, width=0.5, opacity=0.5))
            found.append(Curves([middle], style, width=2, name=mechanism_name(mechanism)))
        return found

    return drawing_against_steps(
        material,
        "learning_curves",
        "accuracy",
        parts,
        alternative=f"Validation accuracy of {material.names} against training steps on each condition.",
        note=(
            f"Thick: median over seeds; thin: one seed each ({material.seeds}); dotted grey: chance. "
            "Accuracy on validation sequences."
            f"{' A seed ends when it has solved the task.' if material.results.protocol < 3 else ''}"
        ),
    )


def _table(material: Material) -> pl.DataFrame:
    """Validation accuracy of each seed and of their median, at each evaluation."""
    keys = ["condition", "mechanism", "shown", "seed", "step", "accuracy"]
    final = material.results.curves.filter(pl.col("role") == "final")
    parts = [final.with_columns(shown=pl.lit("seed")).select(keys)]
    parts += [
        median_curve(rows)
        .with_columns(
            condition=pl.lit(rows["condition"][0]),
            mechanism=pl.lit(rows["mechanism"][0]),
            shown=pl.lit("median"),
            seed=pl.lit(None, dtype=pl.Int64),
        )
        .select(keys)
        for rows in final.partition_by("condition", "mechanism", maintain_order=True)
    ]
    return pl.concat(parts)


FIGURE = ReportFigure(60, "Learning curves", _draw, _table)
