"""The share of seeds solved against training steps, one panel per condition."""

from __future__ import annotations

from typing import Any

import polars as pl

from ...analysis.summaries import evidence, summaries
from ...analysis.survival import solve_curve
from ...analysis.wording import describe_p, mechanism_name
from ...config.condition import Condition
from ..drawing.description import Curves, Drawing, Note, Part
from ..figure import Material, ReportFigure
from ..parts import drawing_against_steps

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing:
    results = material.results

    def parts(condition: Condition) -> list[Part]:
        found: list[Part] = []
        for mechanism, style in material.styles.items():
            rows = evidence(results.seeds, condition.label, mechanism)
            if rows.height:
                steps = max(results.steps, int(rows["steps"].to_numpy().max()))
                curve = solve_curve(rows["steps_to_solve"].to_list(), steps)
                found.append(Curves([curve], style, width=2, name=mechanism_name(mechanism), stepped=True))
        return [*found, Note(_tests(material, condition), "inside")]

    return drawing_against_steps(
        material,
        "steps_to_solve",
        "share of seeds solved",
        parts,
        alternative=f"Share of seeds solved by {material.names} against training steps on each condition.",
        note=(
            "Share of seeds that have solved the task by a step (Kaplan-Meier estimate, unsolved seeds censored "
            f"at the end of training; {material.seeds}; no interval). p: log-rank test against DPA, "
            "adjusted over the family of comparisons (Holm)."
        ),
    )


def _tests(material: Material, condition: Condition) -> str:
    """Results of the log-rank tests on a condition, e.g. ``"p = 0.031"``; one line each."""
    found = [each for each in material.compared if each.condition == condition.label and each.steps_p is not None]
    several = len(material.results.mechanisms) > 2
    return "\n".join(
        (f"{mechanism_name(each.candidate.mechanism)}: " if several else "") + describe_p(each.steps_p or 0.0)
        for each in found
        if each.candidate.solved + each.baseline.solved
    )


def _table(material: Material) -> pl.DataFrame:
    """Share of seeds solved, from each step on."""
    rows: list[dict[str, Any]] = []
    for found in summaries(material.results):
        seeds = evidence(material.results.seeds, found.condition, found.mechanism)
        for step, share in zip(*solve_curve(seeds["steps_to_solve"].to_list(), found.steps), strict=True):
            rows.append({"condition": found.condition, "mechanism": found.mechanism, "step": step, "share": share})
    columns = {"condition": pl.String, "mechanism": pl.String, "step": pl.Float64, "share": pl.Float64}
    return pl.DataFrame(rows, schema=columns)


FIGURE = ReportFigure(70, "Steps to solve", _draw, _table)
