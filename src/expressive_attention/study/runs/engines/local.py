"""Cells in worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

import torch

from ...config.cells import Cell
from ...interrupts import delayed_interrupts
from ...training.checkpoints import SECONDS_BETWEEN, CheckpointFile
from ...training.devices import CPU, available_cores
from ...training.loop import train_cell
from ..environment import environment
from ..store import Store
from .base import Engine, Outcome, reason

__all__ = ["LocalEngine", "threads_per_cell"]


def threads_per_cell(workers: int) -> int:
    """Threads of each of so many workers: their share of `available_cores`, and no more than ``OMP_NUM_THREADS``."""
    share = max(1, available_cores() // workers)
    allowed = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(share, int(allowed)) if allowed.isdecimal() and int(allowed) else share


class LocalEngine(Engine):
    """Worker processes, each with a pipe of its own: one that is killed does not harm the others.

    Args:
        workers: Number of processes, at least 1.
        checkpoint_seconds: Time between two checkpoints of a cell.
        devices: Devices to train on; workers are dealt out to them in turn.
    """

    def __init__(
        self,
        workers: int,
        checkpoint_seconds: float = SECONDS_BETWEEN,
        devices: Sequence[torch.device] = (CPU,),
    ) -> None:
        super().__init__(checkpoint_seconds)
        self.workers = workers
        self.devices = cycle(devices)
        self.waiting: deque[Cell] = deque()
        self.idle: list[Connection] = []
        self.at_work: dict[Connection, Cell] = {}
        self.processes: dict[Connection, BaseProcess] = {}

    def submit(self, cell: Cell) -> None:
        self.waiting.append(cell)

    def next(self) -> Outcome:
        while True:
            while self.waiting and (self.idle or len(self.at_work) < self.workers):
                self._hand_out(self.waiting.popleft())
            for connection in wait(list(self.at_work)):
                if (outcome := self._hear(cast(Connection, connection))) is not None:
                    return outcome

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
        for connection, process in self.processes.items():
            process.join()
            connection.close()
        self.processes.clear()

    def _hand_out(self, cell: Cell) -> None:
        connection = self.idle.pop() if self.idle else self._start_worker()
        self.at_work[connection] = cell
        with suppress(OSError):  # a worker that has died is noticed when it is heard
            connection.send(cell)
        self._tell_started(cell)

    def _start_worker(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        arguments = (theirs, self.store, threads_per_cell(self.workers), self.checkpoint_seconds, next(self.devices))
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with _without_interrupts():
            process.start()
            self.processes[mine] = process
        theirs.close()  # so that the end of the worker is the end of the pipe
        return mine

    def _hear(self, connection: Connection) -> Outcome | None:
        """Take a message of a worker; returns the outcome of its cell, if the message has it."""
        cell = self.at_work[connection]
        try:
            kind, *content = connection.recv()
        except (EOFError, OSError):
            del self.at_work[connection]
            self.processes.pop(connection).join()
            connection.close()
            return self._after_death(cell, "its worker process died (killed, or out of memory)")
        if kind == "done":
            del self.at_work[connection]
            self.idle.append(connection)
            return Outcome(cell, *content)
        if kind == "advanced":
            self.display.advanced(cell, *content)
        else:
            self.display.note(*content)
        return None


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block SIGINT: a process that is started meanwhile inherits that, and leaves Ctrl-C to its parent.

    Another thread may take the signal, and Python tells the main one of it: the handler waits, too, so that no process
    is left half started.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # the first process starts it, which would let SIGINT through again
    with delayed_interrupts():
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# ---- in the workers ----


def _serve(connection: Connection, store: Store, threads: int, checkpoint_seconds: float, device: torch.device) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        connection.send(("done", *_run(connection, store, checkpoint_seconds, device)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(
    connection: Connection, store: Store, checkpoint_seconds: float, device: torch.device
) -> tuple[str | None, bool]:
    """Take a cell, train it and save it; returns the rest of its `Outcome`."""

    def tell(kind: str, *content: object) -> None:
        connection.send((kind, *content))

    try:
        cell: Cell = connection.recv()
        file = CheckpointFile(store.checkpoint(cell), cell.identity, partial(tell, "note"), checkpoint_seconds, device)
        result = train_cell(cell, partial(tell, "advanced"), file, device)
    except EOFError:  # the parent is gone
        raise
    except (Exception, SystemExit) as error:  # a task may call sys.exit
        return reason(error), False
    try:
        store.save(cell, result, environment(device))
    except Exception as error:
        return reason(error), True
    return None, False
