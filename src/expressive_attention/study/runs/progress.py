"""The progress of a run: a bar per cell in training and one overall, or plain lines without a terminal."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config.cells import Cell
from ..words import plural

__all__ = ["Bars", "Display", "Lines", "Silent", "make_display"]


class Display(Protocol):
    """A display of the events of a run."""

    def begin(self, total_cells: int, finished_cells: int) -> None:
        """The run starts; so many cells were finished before."""

    def added(self, cells: int) -> None:
        """More cells are to be run than was known."""

    def started(self, cell: Cell) -> None:
        """A worker has taken a cell."""

    def advanced(self, cell: Cell, step: int, accuracy: float) -> None:
        """A cell has been evaluated."""

    def finished(self, cell: Cell, summary: str) -> None:
        """A cell is on disk."""

    def note(self, message: str) -> None:
        """A note for the user."""

    def end(self) -> None:
        """The run is over, with or without success."""


class Silent:
    """A display of notes alone, on the error stream."""

    def begin(self, total_cells: int, finished_cells: int) -> None: ...

    def added(self, cells: int) -> None: ...

    def started(self, cell: Cell) -> None: ...

    def advanced(self, cell: Cell, step: int, accuracy: float) -> None: ...

    def finished(self, cell: Cell, summary: str) -> None: ...

    def note(self, message: str) -> None:
        Console(stderr=True, highlight=False).print(message, markup=False, emoji=False, soft_wrap=True)

    def end(self) -> None: ...


class Lines(Silent):
    """A line per finished cell, for logs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total = self.done = 0

    def begin(self, total_cells: int, finished_cells: int) -> None:
        self.total, self.done = total_cells, finished_cells
        self._print(f"{plural(total_cells, 'cell')}, {finished_cells} finished before")

    def added(self, cells: int) -> None:
        self.total += cells
        self._print(f"{plural(cells, 'cell')} more, to confirm an exclusive range on fresh seeds")

    def finished(self, cell: Cell, summary: str) -> None:
        self.done += 1
        self._print(f"[{self.done}/{self.total}] {cell}: {summary}")

    def note(self, message: str) -> None:
        self._print(message)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, emoji=False, soft_wrap=True)


class Bars(Lines):
    """Progress bars with the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=False,
        )
        self.bars: dict[str, TaskID] = {}
        self.overall = self.progress.add_task("all cells", state="", visible=False)
        self.steps = 1  # so that cells at work count by their share

    def begin(self, total_cells: int, finished_cells: int) -> None:
        self.total, self.done = total_cells, finished_cells
        self.progress.update(self.overall, visible=True, total=total_cells, completed=finished_cells)
        self._state()
        self.progress.start()

    def added(self, cells: int) -> None:
        super().added(cells)
        self.progress.update(self.overall, total=self.total)
        self._state()

    def started(self, cell: Cell) -> None:
        self.bars[cell.identity] = self.progress.add_task(str(cell), total=cell.training.steps, state="")

    def advanced(self, cell: Cell, step: int, accuracy: float) -> None:
        bar = self.bars.get(cell.identity)
        if bar is not None:
            self.progress.update(bar, completed=step, state=f"accuracy {accuracy:.3f}")

    def finished(self, cell: Cell, summary: str) -> None:
        bar = self.bars.pop(cell.identity, None)
        if bar is not None:
            self.progress.remove_task(bar)
        super().finished(cell, summary)
        self.progress.update(self.overall, completed=self.done)
        self._state()

    def end(self) -> None:
        for bar in self.bars.values():
            self.progress.remove_task(bar)
        self.bars.clear()
        self.progress.stop()

    def _state(self) -> None:
        self.progress.update(self.overall, state=f"{self.done} of {self.total}")


def make_display(*, quiet: bool) -> Display:
    """The display that fits: none when quiet, bars on a terminal, lines elsewhere."""
    if quiet:
        return Silent()
    console = Console(highlight=False)
    return Bars(console) if console.is_terminal else Lines(console)
