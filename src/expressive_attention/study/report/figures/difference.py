"""The paired difference in accuracy on each condition."""

from __future__ import annotations

from typing import Any

import polars as pl

from ...analysis.comparisons import Comparison, comparisons
from ...analysis.wording import describe_interval, mechanism_name
from ..drawing.description import Axis, Drawing, Group, Note, Part, Points, Rule
from ..drawing.layout import finished_conditions
from ..drawing.theme import INK, MEAN, SEED, Style, crowding, difference_reach, dodge, spread
from ..figure import Material, ReportFigure
from ..parts import BOOTSTRAP, ENDS, condition_rows, ends

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing | None:
    compared = comparisons(material.shown)
    if not compared:
        return None
    labels = list(dict.fromkeys(found.condition for found in compared))
    candidates = list(dict.fromkeys(found.candidate.mechanism for found in compared))
    names, reach = material.candidates, difference_reach(material.shown)
    parts: list[Part] = [
        Rule(0, "x", INK, width=0.8),
        Note("DPA better", "above left"),
        Note(f"{names} better", "above right"),
    ]
    closer = crowding(candidates, 0.24 + 0.14 / 2)  # seeds reach as far, in _points
    for candidate, shift in dodge(candidates).items():
        found = [
            (labels.index(each.condition) + shift, each) for each in compared if each.candidate.mechanism == candidate
        ]
        parts += _points(found, mechanism_name(candidate), material.styles[candidate], closer)
    along = Axis(f"{names} minus DPA", (-reach, reach))
    return Drawing(
        alternative=f"Accuracy of {names} minus that of DPA on each condition. Numbers: findings.",
        note=(
            f"Small marks: accuracy of {names} minus that of DPA for one seed, from the same initial parameters and "
            f"batches ({material.pairs}). Large marks: mean over pairs with {BOOTSTRAP}."
        ),
        groups=[Group("", [condition_rows(labels, along, parts, candidates)])],
        selected=material.shown_note(len(finished_conditions(material.shown)), "difference"),
        stacked=True,
        key=[(material.styles[candidate], f"{mechanism_name(candidate)} - DPA") for candidate in candidates],
    )


def _points(found: list[tuple[float, Comparison]], name: str, style: Style, closer: float) -> list[Points]:
    """Pairs of seeds and their means with intervals; the pairs stand below the mean."""
    x, y, texts = [], [], []
    for at, each in found:
        x += each.differences
        y += [at + 0.24 * closer + offset for offset in spread(len(each.differences), 0.14 * closer)]
        texts += [f"seed {seed}" for seed in each.seeds]
    means = Points(
        [each.difference for _, each in found],
        [at for at, _ in found],
        style,
        [
            f"{name} - DPA: {each.difference:+.4f}<br>"
            + describe_interval(each.interval, len(each.differences), "+.4f")
            for _, each in found
        ],
        MEAN,
        along="x",
        low=[each.interval and each.interval.low for _, each in found],
        high=[each.interval and each.interval.high for _, each in found],
    )
    return [Points(x, y, style, texts, SEED, value="+.3f", along="x"), means]


def _table(material: Material) -> pl.DataFrame:
    """The difference of each pair of seeds, and of their mean with its interval."""
    rows: list[dict[str, Any]] = []
    for found in material.compared:
        about = {
            "condition": found.condition,
            "mechanism": found.candidate.mechanism,
            "minus": found.baseline.mechanism,
        }
        rows += [
            {**about, "shown": "pair", "seed": seed, "difference": difference}
            for seed, difference in zip(found.seeds, found.differences, strict=True)
        ]
        rows.append({**about, "shown": "mean", "difference": found.difference, **ends(found.interval)})
    columns = {"condition": pl.String, "mechanism": pl.String, "minus": pl.String, "shown": pl.String}
    return pl.DataFrame(rows, schema=columns | {"seed": pl.Int64, "difference": pl.Float64} | ENDS)


FIGURE = ReportFigure(40, "Paired difference in accuracy", _draw, _table)
