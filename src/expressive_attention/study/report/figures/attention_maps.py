"""Mean attention weights: one panel per condition, mechanism, seed and layer."""

from __future__ import annotations

from itertools import groupby

import polars as pl

from ..attention import AttentionMap
from ..drawing.description import Axis, Cells, Drawing, Group, Panel
from ..drawing.theme import SHARE
from ..figure import Material, ReportFigure

__all__ = ["FIGURE"]


def _draw(material: Material) -> Drawing | None:
    if not material.maps:
        return None
    return Drawing(
        alternative=f"Mean attention weights of trained models of {material.names}.",
        note=(
            "Attention weights of trained models: rows are queries, columns keys, each row sums to 1; mean over "
            "heads and validation examples. Each mechanism has two: the seed with the lowest accuracy and the one with "
            "the highest (n\u00a0=\u00a01 each; no interval)."
        ),
        groups=[
            Group(label, [_panel(found) for found in maps])
            for label, maps in groupby(material.maps, key=lambda found: found.condition)
        ],
        selected=" Shown: the conditions with the largest differences.",
        columns=4,
        swatches={"all the weight of the query": SHARE, "none": "#ffffff"},
    )


def _panel(found: AttentionMap) -> Panel:
    weights = [[round(weight, 3) for weight in row] for row in found.weights.tolist()]
    first, last = -0.5, len(weights) - 0.5
    return Panel(
        "\n".join(found.title),
        Axis("key", (first, last)),
        Axis("query", (last, first)),
        [Cells(weights, ("#ffffff", SHARE), (0.0, 1.0))],
        height=1.8,
        square=True,
    )


def _table(material: Material) -> pl.DataFrame:
    """One row per weight."""
    rows = [
        {
            "condition": found.condition,
            "mechanism": found.mechanism,
            "rank": found.rank,
            "seed": found.seed,
            "accuracy": found.accuracy,
            "layer": found.layer,
            "query": query,
            "key": key,
            "weight": weight,
        }
        for found in material.maps
        for query, weights in enumerate(found.weights.tolist())
        for key, weight in enumerate(weights)
    ]
    return pl.DataFrame(rows)


FIGURE = ReportFigure(90, "Where the worst and the best seeds look", _draw, _table)
