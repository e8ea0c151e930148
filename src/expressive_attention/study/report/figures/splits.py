"""Accuracy by group of test positions: one panel per condition and split."""

from __future__ import annotations

import textwrap

import polars as pl

from ...analysis.wording import mechanism_name
from ..drawing.description import Axis, Drawing, Group, Panel, Part, Points, Reference
from ..drawing.layout import MOST_PANELS, most_different, split_conditions, splits_of
from ..drawing.theme import GROUP, dodge
from ..figure import Material, ReportFigure
from ..parts import SHARE_RANGE

__all__ = ["FIGURE"]

_SCHEMA = {
    "condition": pl.String,
    "mechanism": pl.String,
    "split": pl.String,
    "group": pl.Int64,
    "name": pl.String,
    "count": pl.Int64,
    "seeds": pl.UInt32,
    "accuracy": pl.Float64,  # mean over seeds
    "lowest": pl.Float64,  # of a seed
    "highest": pl.Float64,
    "ceiling": pl.Float64,
}


def _draw(material: Material) -> Drawing | None:
    """Conditions that are split by more than position are in sight; some of the others can be unfolded."""
    results, splits, table = material.results, splits_of(material.results), _table(material)
    if not splits:
        return None

    def panels(label: str) -> list[Panel]:
        found = ((split, table.filter(condition=label, split=split)) for split in splits[label])
        return [_panel(material, f"By {split}", rows) for split, rows in found if rows.height]

    ranked = most_different(results, len(results.conditions))
    by_position = [found.label for found in ranked if splits.get(found.label) == ["position"]][:MOST_PANELS]
    unfold = [_panel(material, label, table.filter(condition=label, split="position")) for label in by_position]
    return Drawing(
        alternative=f"Accuracy of {material.names} by position and by rule.",
        note=(
            f"Mean over seeds, bars from the lowest to the highest seed ({material.seeds}; no interval); "
            "grey: what the best possible predictor reaches. All positions with a target count, not only those whose "
            "answer is certain."
        ),
        groups=[Group(found.label, panels(found.label)) for found in split_conditions(results)],
        columns=3,
        folded=("By position, where nothing else splits the test", [Group("", unfold)] if unfold else []),
        key=material.key,
    )


def _panel(material: Material, title: str, rows: pl.DataFrame) -> Panel:
    """Means of each mechanism by group, with bars from the lowest to the highest seed, and the best predictor."""
    groups = rows.unique("group").sort("group")
    split = groups["split"][0]
    place = {group: index for index, group in enumerate(groups["group"])}
    names = [str(group) for group in place] if split == "position" else groups["name"].to_list()
    known = groups.drop_nulls("ceiling")
    parts: list[Part] = [
        Reference(
            "best possible",
            [place[group] for group in known["group"]],
            known["ceiling"].to_list(),
            "_",
            "line-ew-open",
            size=14 if len(names) < 8 else 7,
        )
    ]
    for mechanism, shift in dodge(material.results.mechanisms).items():
        found = rows.filter(mechanism=mechanism).sort("group")
        parts.append(
            Points(
                [place[group] + 0.6 * shift for group in found["group"]],
                found["accuracy"].to_list(),
                material.styles[mechanism],
                [f"{mechanism_name(mechanism)}, {name}" for name in found["name"]],
                GROUP,
                value=".3f",
                low=found["lowest"].to_list(),
                high=found["highest"].to_list(),
                joined=split == "position",
            )
        )
    lines = [textwrap.wrap(name, max(7, 28 // len(names))) for name in names]
    along = Axis("position" if split == "position" else "", (-0.6, len(names) - 0.4), lines)
    return Panel(title, along, Axis("accuracy", SHARE_RANGE, step=0.25), parts, height=1.75)


def _table(material: Material) -> pl.DataFrame:
    """Mean accuracy over final seeds by group of test positions, lowest and highest seed, and best predictor."""
    keys = ["condition", "mechanism", "split", "group", "name"]
    return (
        material.results.splits.filter(pl.col("role") == "final")
        .group_by(keys, maintain_order=True)
        .agg(
            pl.col("count").first(),
            seeds=pl.len(),
            accuracy=pl.col("accuracy").mean(),
            lowest=pl.col("accuracy").min(),
            highest=pl.col("accuracy").max(),
            ceiling=pl.col("ceiling").first(),
        )
        .cast(_SCHEMA)  # pyright: ignore[reportArgumentType]
    )


FIGURE = ReportFigure(80, "Accuracy within a sequence", _draw, _table)
