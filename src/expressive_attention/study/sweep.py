"""Run all cells of a study, keeping each as soon as it is finished."""

from __future__ import annotations

from .config import Cell, Comparison, StudyConfig
from .engines import Engine
from .progress import Display
from .results import Setting
from .store import CorruptCellError, Store, choose_setting
from .training import CellResult

__all__ = ["SweepError", "run_study"]

_ANY = Setting(0.0, 0.0)  # where only the number of cells matters


class SweepError(RuntimeError):
    """Some cells could not be run; the message says which and why. Finished ones are kept."""


def run_study(config: StudyConfig, store: Store, engine: Engine, display: Display) -> None:
    """Run the cells of a study that are not finished yet.

    Settings are chosen per condition and mechanism as soon as their tuning cells are finished; the final
    cells follow. Killed at any moment, it goes on from the finished cells, and from the checkpoints of those that
    were at work, when called again.

    Args:
        config: The study.
        store: Where it is kept; its lock must be held.
        engine: What runs the cells; it is started here, and stopped.
        display: Told what happens.

    Raises:
        SweepError: A cell failed.
        EngineError: The engine cannot be started.
        KeyboardInterrupt: As it came, after the engine was stopped.
    """
    store.clean()
    plan = _Plan(config, store, display)
    total = plan.total_cells()
    display.begin(total, total - plan.missing_cells())
    failures: list[str] = []
    try:
        ready = plan.ready()
        if ready:
            engine.start(store, display)
        running = 0
        while ready or running:
            for cell in ready:
                engine.submit(cell)
            running += len(ready)
            cell, failure = engine.next()
            running -= 1
            ready = []
            if failure is not None:
                failures.append(f"{cell}: {failure}")
                display.note(f"failed: {failures[-1]}")
                continue
            display.finished(cell, _summary(store.load(cell)))
            ready = plan.after(cell)
    finally:
        engine.stop()
        store.clean()  # of what workers were writing when they were killed
        display.end()
    if failures:
        raise SweepError(f"{len(failures)} cells failed, the first: {failures[0]}")


class _Plan:
    """Which cells there are, and which can run now."""

    def __init__(self, config: StudyConfig, store: Store, display: Display) -> None:
        self.store, self.display = store, display
        self.comparisons = config.comparisons()
        self.of: dict[str, Comparison] = {}
        self.cells: dict[str, Cell] = {}

    def total_cells(self) -> int:
        return sum(len(c.tuning_cells()) + len(c.final_cells(_ANY)) for c in self.comparisons)

    def missing_cells(self) -> int:
        missing = 0
        for comparison in self.comparisons:
            tuning = [cell for cell in comparison.tuning_cells() if not self._finished(cell)]
            finals = comparison.final_cells(_ANY) if tuning else self._finals(comparison)
            missing += len(tuning) + sum(1 for cell in finals if tuning or not self._finished(cell))
        return missing

    def ready(self) -> list[Cell]:
        """The cells that can run at the start."""
        return [cell for comparison in self.comparisons for cell in self._next(comparison)]

    def after(self, cell: Cell) -> list[Cell]:
        """The cells that can run now that `cell` is finished."""
        if cell.role == "final":
            return []
        comparison = self.of[cell.identity]
        new = self._next(comparison)
        if new or all(self.store.has(tuning) for tuning in comparison.tuning_cells()):
            for final in self._finals(comparison):
                # Only now is it known to be one of this study's. A tuning cell may have ended since `_next` looked:
                # then the final ones have not run, and wait for `after` of that cell.
                if final.identity not in self.cells and self._finished(final):
                    self.cells[final.identity] = final
                    self.display.finished(final, "finished before")
        return new

    def _next(self, comparison: Comparison) -> list[Cell]:
        tuning = [cell for cell in comparison.tuning_cells() if not self._finished(cell)]
        cells = tuning or [cell for cell in self._finals(comparison) if not self._finished(cell)]
        new = [cell for cell in cells if cell.identity not in self.cells]
        self.cells.update({cell.identity: cell for cell in new})
        self.of.update({cell.identity: comparison for cell in new})
        return new

    def _finals(self, comparison: Comparison) -> list[Cell]:
        tuning = comparison.tuning_cells()
        if not tuning:
            return comparison.final_cells(comparison.training.settings[0])
        return comparison.final_cells(choose_setting((cell, self.store.load(cell)) for cell in tuning))

    def _finished(self, cell: Cell) -> bool:
        """Whether the cell is on disk and whole; a corrupt one is named and removed."""
        if not self.store.has(cell):
            return False
        try:
            self.store.load(cell, weights=True)
        except CorruptCellError as error:
            self.display.note(f"{error}; it is computed again")
            self.store.discard(cell)
            return False
        return True


def _summary(result: CellResult) -> str:
    seeds = result.seeds
    solved, count = int(seeds["solved"].sum()), len(seeds)
    return f"{solved} of {count} seeds solved, mean accuracy {seeds['accuracy'].mean():.3f}, {result.seconds:.0f} s"
