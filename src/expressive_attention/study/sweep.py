"""Run all cells of a study in worker processes, keeping each as soon as it is finished."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from .config import Cell, Comparison, StudyConfig
from .progress import Display
from .results import Setting
from .store import CorruptCellError, Store, choose_setting
from .training import CellResult, train_cell

__all__ = ["SweepError", "run_study"]

_ANY = Setting(0.0, 0.0)  # where only the number of cells matters


class SweepError(RuntimeError):
    """Some cells could not be run; the message says which and why. Finished ones are kept."""


def run_study(config: StudyConfig, store: Store, workers: int, display: Display) -> None:
    """Run the cells of a study that are not finished yet.

    Settings are chosen per condition and mechanism as soon as their tuning cells are finished; the final
    cells follow. Killed at any moment, it goes on from the finished cells when called again.

    Args:
        config: The study.
        store: Where it is kept; its lock must be held.
        workers: Number of worker processes, at least 1.
        display: Told what happens.

    Raises:
        SweepError: A cell failed.
        KeyboardInterrupt: As it came, after the workers were stopped.
    """
    store.clean()
    plan = _Plan(config, store, display)
    total = plan.total_cells()
    display.begin(total, total - plan.missing_cells())
    ready = plan.ready()
    if not ready:
        display.end()
        return
    context = multiprocessing.get_context("spawn")
    events = context.SimpleQueue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    executor = ProcessPoolExecutor(
        min(workers, plan.missing_cells()), context, initializer=_start_worker, initargs=(events, threads)
    )
    listener = threading.Thread(target=_listen, args=(events, plan.cells, display), daemon=True)
    listener.start()
    running: dict[Future[None], Cell] = {}
    failures: list[str] = []
    try:
        while ready or running:
            for cell in ready:
                with _without_interrupts():
                    running[executor.submit(_work, cell, store)] = cell
            ready = []
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise SweepError(f"{cell}: its worker process died (killed, or out of memory)")
                if error is not None:
                    failures.append(f"{cell}: {type(error).__name__}: {error}")
                    display.note(f"failed: {failures[-1]}")
                    continue
                result = store.load(cell)
                display.finished(cell, _summary(result))
                ready += plan.after(cell)
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        events.put(None)
        listener.join(timeout=5)
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


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block SIGINT: a process that is started meanwhile inherits that, and leaves Ctrl-C to its parent."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in the workers ----

_events: list[Any] = []  # the queue to the parent, once the worker has started


def _start_worker(events: Any, threads: int) -> None:
    _events.append(events)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(cell: Cell, store: Store) -> None:
    identity, report = cell.identity, _events[0].put
    report((identity, None, None))
    store.save(cell, train_cell(cell, lambda step, accuracy: report((identity, step, accuracy))))


def _listen(events: Any, cells: dict[str, Cell], display: Display) -> None:
    while (event := events.get()) is not None:
        identity, step, accuracy = event
        if step is None:
            display.started(cells[identity])
        else:
            display.advanced(cells[identity], step, accuracy)


def _summary(result: CellResult) -> str:
    seeds = result.seeds
    solved, count = int(seeds["solved"].sum()), len(seeds)
    return f"{solved} of {count} seeds solved, mean accuracy {seeds['accuracy'].mean():.3f}, {result.seconds:.0f} s"
