"""Which finished cells hold the trained models of a mechanism."""

from __future__ import annotations

from ..config.study import Cell, Comparison
from ..runs.results import Setting, StudyResults
from ..runs.store import Store
from .summaries import evidence

__all__ = ["cells_by_seed"]


def cells_by_seed(results: StudyResults, store: Store, comparison: Comparison) -> dict[int, Cell]:
    """The cell of each final seed of a comparison, at the setting that was chosen; only of cells on disk."""
    rows = evidence(results.seeds, comparison.condition, comparison.mechanism)
    if rows.is_empty():
        return {}
    setting = Setting(*rows.select(Setting._fields).row(0))
    return {seed: cell for cell in comparison.final_cells(setting, store.has) if store.has(cell) for seed in cell.seeds}
