"""Cells as tasks of Ray, on this machine or a cluster."""

from __future__ import annotations

import os
import re
import socket
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...config.cells import Cell
from ...training.checkpoints import SECONDS_BETWEEN, CheckpointFile
from ...training.devices import CPU
from ...training.loop import train_cell
from ...training.result import CellResult
from ..environment import environment
from ..progress import Display
from ..store import Store
from .base import Engine, EngineError, Outcome, reason
from .local import threads_per_cell

__all__ = ["RayEngine"]

_SECONDS_BETWEEN_NEWS = 0.5


class RayEngine(Engine):
    """Each cell is a Ray task on one processor core; its result comes back to this process, which saves it.

    The nodes of a cluster need the same versions of this package and of torch. A node that sees the folder of
    the study under the same path keeps checkpoints in it; on others, a cell whose node is lost starts anew.

    Args:
        workers: Cells at a time on this machine.
        address: ``HOST:PORT`` of a running cluster, or ``"auto"`` on one of its nodes; the cluster then decides how
            many cells run at a time, each with one thread. None: Ray is started on this machine and ends with the run.
        checkpoint_seconds: Time between two checkpoints of a cell.
        gpus_per_cell: Share of a GPU that a cell takes, in (0, 1]: with 0.25, four cells are trained on each. 0: cells
            are trained on processors.

    Raises:
        EngineError: Ray is not installed, or the address is not valid.
    """

    def __init__(
        self,
        workers: int,
        address: str | None = None,
        checkpoint_seconds: float = SECONDS_BETWEEN,
        gpus_per_cell: float = 0.0,
    ) -> None:
        super().__init__(checkpoint_seconds)
        try:
            import ray
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise EngineError(
                "the engine 'ray' needs the package of that name; the extra 'ray' installs it: "
                "pip install 'expressive-attention[ray]'"
            ) from None
        if address not in (None, "auto") and not re.fullmatch(r"[^/\s]+:\d+", address):
            raise EngineError(f"the address of a Ray cluster must be HOST:PORT or 'auto', got {address!r}")
        self.ray, self.workers, self.address, self.gpus_per_cell = ray, workers, address, gpus_per_cell
        self.running: dict[Any, Cell] = {}
        self.cells: dict[str, Cell] = {}  # the same by identity

    def start(self, store: Store, display: Display) -> None:
        super().start(store, display)
        ray = self.ray
        # Nothing is reported to anyone unless the user has asked for it.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address is None:
            options |= {"address": "local", "num_cpus": self.workers, "include_dashboard": False}
        else:
            options["address"] = self.address
            _check_is_there(self.address)
        try:
            ray.init(**options)
        except Exception as error:
            raise EngineError(f"Ray cannot be started: {str(error).strip().splitlines()[0]}") from None
        where = "this machine" if self.address is None else f"the Ray cluster {self.address}"
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise EngineError(f"{where} has no processor core, and a cell needs one")
        if self.gpus_per_cell and ray.cluster_resources().get("GPU", 0) < 1:
            raise EngineError(f"{where} has no GPU, and each cell was to have {self.gpus_per_cell:g} of one")
        # Reruns are the base class's, which tells of them.
        self.task = ray.remote(num_cpus=1, num_gpus=self.gpus_per_cell, max_retries=0)(_run)
        self.news = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_News).remote()
        self.threads = threads_per_cell(self.workers) if self.address is None else 1

    def submit(self, cell: Cell) -> None:
        self.cells[cell.identity] = cell
        path = self.store.checkpoint(cell).absolute()
        device = torch.device("cuda") if self.gpus_per_cell else CPU  # the one GPU that Ray lets the task see
        self.running[self.task.remote(cell, self.threads, path, self.checkpoint_seconds, self.news, device)] = cell

    def next(self) -> Outcome:
        while True:
            done, _ = self.ray.wait(list(self.running), timeout=_SECONDS_BETWEEN_NEWS)
            self._pass_on_news()
            for reference in done:
                cell = self.running.pop(reference)
                self._tell_started(cell)  # that news may still be on its way
                if (outcome := self._outcome(cell, reference)) is not None:
                    del self.cells[cell.identity]
                    return outcome

    def stop(self) -> None:
        self.ray.shutdown()

    def _outcome(self, cell: Cell, reference: Any) -> Outcome | None:
        errors = self.ray.exceptions
        try:
            done = self.ray.get(reference)
        except errors.RayTaskError as error:  # it did not come to run the cell, e.g. for want of a package
            return Outcome(cell, str(error).strip().splitlines()[-1])
        except errors.RayError as error:
            return self._after_death(cell, f"its Ray worker was lost ({type(error).__name__})")
        if isinstance(done, str):
            return Outcome(cell, done)
        try:
            self.store.save(cell, *done)
        except OSError as error:
            return Outcome(cell, reason(error), unsaved=True)
        return Outcome(cell, None)

    def _pass_on_news(self) -> None:
        try:
            news = self.ray.get(self.news.take.remote())
        except self.ray.exceptions.RayError:  # it concerns what is shown, not what is found
            return
        for kind, identity, *content in news:
            if kind == "note":
                self.display.note(*content)
            elif identity in self.cells:
                self._tell_started(self.cells[identity])
                if kind == "advanced":
                    self.display.advanced(self.cells[identity], *content)


def _check_is_there(address: str) -> None:
    """Raise an error where nothing listens at the address: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or error}") from None


# ---- in the tasks ----


class _News:
    """News of Ray's tasks, kept until they are asked for."""

    def __init__(self) -> None:
        self.news: list[tuple[Any, ...]] = []

    def add(self, *news: Any) -> None:
        self.news.append(news)

    def take(self) -> list[tuple[Any, ...]]:
        taken, self.news = self.news, []
        return taken


def _run(
    cell: Cell, threads: int, checkpoint: Path, checkpoint_seconds: float, news: Any, device: torch.device
) -> tuple[CellResult, dict[str, str]] | str:
    """Train a cell; its result and where that was computed, or why it failed."""

    def tell(kind: str, *content: Any) -> None:
        news.add.remote(kind, cell.identity, *content)

    torch.set_num_threads(threads)
    tell("started")
    file = CheckpointFile(checkpoint, cell.identity, partial(tell, "note"), checkpoint_seconds, device)
    is_shared = checkpoint.parent.is_dir()
    try:
        result = train_cell(cell, partial(tell, "advanced"), file if is_shared else None, device)
    except (Exception, SystemExit) as error:  # a task may call sys.exit
        return reason(error)
    return result, environment(device)
