"""Which finished cells hold the trained models of a mechanism."""

from __future__ import annotations

from .config import Cell, Comparison
from .results import Setting, StudyResults
from .statistics import evidence
from .store import Store

__all__ = ["cells_by_seed"]


def cells_by_seed(results: StudyResults, store: Store, comparison: Comparison) -> dict[int, Cell]:
    """The cell of each final seed of a comparison, at the setting that was chosen; only of cells on disk."""
    rows = evidence(results.seeds, comparison.condition, comparison.mechanism)
    if rows.is_empty():
        return {}
    setting = Setting(*rows.select(Setting._fields).row(0))
    return {seed: cell for cell in comparison.final_cells(setting, store.has) if store.has(cell) for seed in cell.seeds}
