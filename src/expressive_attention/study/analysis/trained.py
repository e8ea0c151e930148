"""The trained models of a study, from its finished cells."""

from __future__ import annotations

import polars as pl

from ...nn import Transformer
from ..config.cells import Arm, Cell
from ..runs.results import StudyResults, setting_of
from ..runs.store import Store
from ..training.model import trained_model
from .summaries import evidence

__all__ = ["cells_by_seed", "finite_seeds", "trained"]


def cells_by_seed(results: StudyResults, store: Store, arm: Arm) -> dict[int, Cell]:
    """The cell of each final seed of an arm, at the setting that was chosen; only of cells on disk."""
    rows = evidence(results.seeds, arm.condition, arm.mechanism)
    if rows.is_empty():
        return {}
    cells = arm.final_cells(setting_of(rows), store)
    return {seed: cell for cell in cells if store.has(cell) for seed in cell.counted}


def finite_seeds(rows: pl.DataFrame) -> list[int]:
    """The seeds, of rows of `StudyResults.seeds`, whose models can be used: their training did not diverge."""
    # The last step can ruin a model without a loss that shows it.
    return rows.filter(pl.col("diverged_at").is_null() & pl.col("cross_entropy").is_finite())["seed"].to_list()


def trained(store: Store, cell: Cell, seed: int) -> Transformer:
    """The trained model of one seed of a finished cell, in evaluation mode.

    Raises:
        CorruptCellError: The stored parameters are not what was written; the message names the file.
    """
    return trained_model(cell, store.load(cell, weights=True).weights, cell.seeds.index(seed)).eval()
