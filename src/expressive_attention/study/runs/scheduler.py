"""Run all cells of a study, keeping each as soon as it is finished."""

from __future__ import annotations

from contextlib import suppress

from ..config.cells import Arm, Cell
from ..config.condition import Setting
from ..config.study import StudyConfig
from ..training.result import CellResult
from ..words import plural
from .engines import Engine
from .progress import Display
from .selection import candidates, choose_setting, progress_of
from .store import CorruptCellError, Store

__all__ = ["SweepError", "run_study"]

_ANY = Setting(0.0, 0.0)  # where only the number of cells matters


class SweepError(RuntimeError):
    """Some cells could not be run or saved; the message says which and why. Finished ones are kept."""


def run_study(config: StudyConfig, store: Store, engine: Engine, display: Display) -> None:
    """Run the cells of a study that are not finished yet.

    Settings are chosen per condition and mechanism as soon as their tuning cells are finished; the final
    cells follow, and where they show an exclusive range, and the study asks for one, fresh seeds that confirm it.
    After it was killed at any moment, a second call resumes from the finished cells and from the checkpoints of those
    in progress.

    Args:
        config: The study.
        store: Store of the study; its lock must be held.
        engine: Runs the cells; it is started and stopped here.
        display: Display that shows what happens.

    Raises:
        SweepError: Cells failed, and the others are finished; or one could not be saved, and the run ended there.
        EngineError: The engine cannot be started.
        KeyboardInterrupt: The user stopped the run; the engine is stopped first.
    """
    store.clean()
    plan = _Plan(config, store, display)
    missing = plan.missing_cells()  # which removes corrupt ones
    total = plan.total_cells()
    display.begin(total, total - missing)
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
            cell, failure, unsaved = engine.next()
            running -= 1
            ready = []
            if unsaved:
                raise SweepError(f"{cell}: it cannot be saved ({failure}), so the run ends")
            if failure is not None:
                failures.append(f"{cell}: {failure}")
                display.note(f"failed: {failures[-1]}")
                continue
            display.finished(cell, _summary(store.load(cell)))
            ready = plan.after(cell)
            if (total_now := plan.total_cells()) > total:
                display.added(total_now - total)
                total = total_now
    finally:
        engine.stop()
        with suppress(OSError):  # the next run cleans as well, and the first error counts
            store.clean()  # of what workers were writing when they were killed
        display.end()
    if failures:
        raise SweepError(f"{plural(len(failures), 'cell')} failed, the first: {failures[0]}")


class _Plan:
    """The cells of a study, and those that can run now."""

    def __init__(self, config: StudyConfig, store: Store, display: Display) -> None:
        self.store, self.display, self.config = store, display, config
        self.arms = config.arms()
        self.of: dict[str, Arm] = {}
        self.cells: dict[str, Cell] = {}
        self.confirmed: dict[str, list[Cell]] = {}  # by condition
        self.settings: dict[tuple[str, str], Setting] = {}  # chosen, by condition and mechanism

    def total_cells(self) -> int:
        """Number of cells, as far as it is known: a confirmation counts once final seeds ask for it."""
        every = [len(self._tuning(c)) + len(self._expected_finals(c)) for c in self.arms]
        return sum(every) + sum(len(cells) for cells in self.confirmed.values())

    def missing_cells(self) -> int:
        missing = 0
        for arm in self.arms:
            tuning = [cell for cell in self._tuning(arm) if not self._finished(cell)]
            finals = self._expected_finals(arm)
            missing += len(tuning) + sum(1 for cell in finals if tuning or not self._finished(cell))
        for condition in dict.fromkeys(arm.condition for arm in self.arms):
            missing += sum(1 for cell in self._confirming(condition) if not self._finished(cell))
        return missing

    def ready(self) -> list[Cell]:
        """The cells that can run at the start."""
        cells = [cell for arm in self.arms for cell in self._next(arm)]
        for condition in list(self.confirmed):
            cells += self._new(self.confirmed[condition])
        return cells

    def after(self, cell: Cell) -> list[Cell]:
        """The cells that can run now that `cell` is finished."""
        if cell.role == "confirmation":
            return []
        if cell.role == "final":
            return self._new(self._confirming(cell.condition))
        arm = self.of[cell.identity]
        new = self._next(arm)
        if new or all(self.store.has(tuning) for tuning in self._tuning(arm)):
            for final in self._expected_finals(arm):
                # The cell is known to be one of the study only now. A tuning cell may have ended since `_next` looked:
                # then the final ones have not run, and wait for `after` of that cell.
                if final.identity not in self.cells and self._finished(final):
                    self.cells[final.identity] = final
                    self.display.finished(final, "finished before")
        return new or self._new(self._confirming(arm.condition))

    def _next(self, arm: Arm) -> list[Cell]:
        tuning = [cell for cell in self._tuning(arm) if not self._finished(cell)]
        new = self._new(tuning or self._finals(arm))
        self.of.update({cell.identity: arm for cell in new})
        return new

    def _new(self, cells: list[Cell]) -> list[Cell]:
        """Return the cells that are neither finished nor at work."""
        new = [cell for cell in cells if cell.identity not in self.cells and not self._finished(cell)]
        self.cells.update({cell.identity: cell for cell in new})
        return new

    def _tuning(self, arm: Arm) -> list[Cell]:
        return arm.tuning_cells(self.store)

    def _expected_finals(self, arm: Arm) -> list[Cell]:
        """The final cells; before the setting is known as many at any, to be counted and never to be run."""
        if not all(self.store.has(cell) for cell in self._tuning(arm)):
            return arm.final_cells(_ANY)
        return self._finals(arm)

    def _finals(self, arm: Arm) -> list[Cell]:
        """The final cells of an arm whose tuning is finished."""
        key = arm.condition, arm.mechanism
        if key not in self.settings:  # it is asked for after every cell, and reads all tuning cells
            tuning = [(cell, self.store.counted(cell)) for cell in self._tuning(arm)]
            self.settings[key] = choose_setting(tuning) if tuning else arm.training.settings[0]
        return arm.final_cells(self.settings[key], self.store)

    def _confirming(self, condition: str) -> list[Cell]:
        """The cells that confirm what the final seeds of a condition show, if there is something to confirm."""
        progress = [progress_of(self.store, c) for c in self.arms if c.condition == condition]
        cells = [
            cell
            for found in candidates(self.store, self.config, progress)
            for cell in found.confirmation_cells(self.store)
        ]
        if cells:
            self.confirmed[condition] = cells
        return cells

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
    reached = seeds["accuracy"] if seeds["accuracy"].null_count() < count else seeds["validation"]
    return f"{solved} of {plural(count, 'seed')} solved, mean accuracy {reached.mean():.3f}, {result.seconds:.0f} s"
