"""The interface between the scheduler and an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import NamedTuple

from ...config.cells import Cell
from ...config.task_files import blame, named
from ...errors import StudyError
from ...training.checkpoints import SECONDS_BETWEEN
from ..progress import Display
from ..store import Store

__all__ = ["Engine", "EngineError", "Outcome", "reason"]

# Number of times that a cell is run again after its worker died: the cell itself may kill it, by its memory.
_RERUNS = 2


class EngineError(StudyError):
    """An engine that cannot be used; the message says why, in one line."""


class Outcome(NamedTuple):
    """A cell that is on disk, or the one-line reason why it is not."""

    cell: Cell
    failure: str | None
    unsaved: bool = False  # it is trained and could not be written, as on a full disk


def reason(error: BaseException) -> str:
    """The reason why a cell failed, in one line."""
    return blame(error) or named(error)


class Engine(ABC):
    """Runs cells, several at a time: `start`, then `submit` and `next` in turn, and in the end `stop`.

    A cell whose worker dies is run again from its checkpoint.

    Args:
        checkpoint_seconds: Time between two checkpoints of a cell.
    """

    store: Store
    display: Display

    def __init__(self, checkpoint_seconds: float = SECONDS_BETWEEN) -> None:
        self.checkpoint_seconds = checkpoint_seconds
        self.begun: set[str] = set()
        self.deaths: Counter[str] = Counter()

    def start(self, store: Store, display: Display) -> None:
        """Be ready for the cells of a study.

        Args:
            store: Store for finished cells.
            display: Display of the cells in progress.

        Raises:
            EngineError: Something that the engine needs is missing.
        """
        self.store, self.display = store, display

    @abstractmethod
    def submit(self, cell: Cell) -> None:
        """Run this cell when there is room for it."""

    @abstractmethod
    def next(self) -> Outcome:
        """Wait until one of the submitted cells is finished, or has failed."""

    @abstractmethod
    def stop(self) -> None:
        """End all work, finished or not, and what `start` has started."""

    def _tell_started(self, cell: Cell) -> None:
        if cell.identity not in self.begun:
            self.begun.add(cell.identity)
            self.display.started(cell)

    def _after_death(self, cell: Cell, what: str) -> Outcome | None:
        """Recover from the death of a cell's worker: the cell's outcome, or None if it is run again."""
        if self.store.has(cell):  # it died after the last of its work
            return Outcome(cell, None)
        self.deaths[cell.identity] += 1
        if self.deaths[cell.identity] > _RERUNS:
            return Outcome(cell, f"{what}, {self.deaths[cell.identity]} times")
        self.display.note(f"{cell}: {what}; it goes on in another")
        self.submit(cell)
        return None
