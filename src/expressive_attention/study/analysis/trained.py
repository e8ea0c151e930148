"""Which finished cells hold the trained models of a mechanism."""

from __future__ import annotations

from ..config.cells import Arm, Cell
from ..config.condition import Setting
from ..runs.results import StudyResults
from ..runs.store import Store
from .summaries import evidence

__all__ = ["cells_by_seed"]


def cells_by_seed(results: StudyResults, store: Store, arm: Arm) -> dict[int, Cell]:
    """The cell of each final seed of an arm, at the setting that was chosen; only of cells on disk."""
    rows = evidence(results.seeds, arm.condition, arm.mechanism)
    if rows.is_empty():
        return {}
    setting = Setting(*rows.select(Setting._fields).row(0))
    return {seed: cell for cell in arm.final_cells(setting, store.has) if store.has(cell) for seed in cell.seeds}
