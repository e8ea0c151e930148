"""Loggers, which write a run's numbers to TensorBoard and Weights & Biases, if asked for."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import polars as pl

from ..config.cells import Cell
from ..errors import StudyError
from .progress import Display
from .store import Store

__all__ = ["LOGGERS", "Logger", "LoggerError", "Several", "TensorBoard", "WeightsAndBiases", "make_loggers"]

# The measures logged of a finished cell: means over its seeds, on the test sequences.
MEASURES = ("accuracy", "cross_entropy", "solved", "steps", "rollout_digits", "rollout_exact")


class LoggerError(StudyError):
    """A log that cannot be written; the message says why, in one line."""


class Logger:
    """A display that writes a log for each cell of a run.

    Subclasses define a log. It gets a cell's mean accuracy at each evaluation as it comes, and its `MEASURES` when the
    cell is finished; cells that were finished before are left out.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.logs: dict[str, Any] = {}  # of the cells at work
        self.steps: dict[str, set[int]] = {}  # that their logs have

    def open(self, cell: Cell) -> Any:
        """Begin a log for the cell."""
        raise NotImplementedError

    def write(self, log: Any, step: int, accuracy: float) -> None:
        """Add the mean validation accuracy after so many steps."""
        raise NotImplementedError

    def close(self, log: Any, step: int, measures: dict[str, float]) -> None:
        """Add the final measures and end the log."""
        raise NotImplementedError

    def abandon(self, log: Any) -> None:
        """End the log of a cell that was not finished."""
        raise NotImplementedError

    # ---- the display ----

    def begin(self, total_cells: int, finished_cells: int) -> None: ...

    def added(self, cells: int) -> None: ...

    def started(self, cell: Cell) -> None:
        self.logs[cell.identity], self.steps[cell.identity] = self.open(cell), set()

    def advanced(self, cell: Cell, step: int, accuracy: float) -> None:
        if step not in self.steps[cell.identity]:
            self.write(self.logs[cell.identity], step, accuracy)
            self.steps[cell.identity].add(step)

    def finished(self, cell: Cell, summary: str) -> None:
        if cell.identity not in self.logs:
            return
        result = self.store.load(cell)
        for step, accuracy in _mean_curve(result.curves):  # those of an earlier run, where the cell goes on from one
            self.advanced(cell, step, accuracy)
        means = {name: result.seeds[name].cast(pl.Float64).mean() for name in MEASURES}
        measures = {name: value for name, value in means.items() if isinstance(value, float)}
        self.close(self.logs.pop(cell.identity), max(result.curves["step"].to_list()), measures)

    def note(self, message: str) -> None: ...

    def end(self) -> None:
        while self.logs:
            self.abandon(self.logs.popitem()[1])


class TensorBoard(Logger):
    """Event files in ``DIR/tensorboard``, a folder per cell: ``tensorboard --logdir DIR/tensorboard``."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self.writer = SummaryWriter

    def open(self, cell: Cell) -> Any:
        folder = self.store.directory / "tensorboard" / _file_name(cell.condition) / _file_name(_title(cell))
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        return self.writer(str(folder))

    def write(self, log: Any, step: int, accuracy: float) -> None:
        log.add_scalar("validation/accuracy", accuracy, step)
        log.flush()

    def close(self, log: Any, step: int, measures: dict[str, float]) -> None:
        for name, value in measures.items():
            log.add_scalar(f"test/{name}", value, step)
        log.close()

    def abandon(self, log: Any) -> None:
        log.close()


class WeightsAndBiases(Logger):
    """A run per cell in the project ``expressive-attention``, grouped by study; files go to ``DIR/wandb``.

    ``WANDB_MODE=offline`` keeps all on this machine; the other variables of W&B apply, too.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        try:
            self.wandb = import_module("wandb")
        except ImportError:
            raise _missing("wandb") from None
        if os.environ.get("WANDB_MODE", "online") == "online":
            try:
                known = self.wandb.login()
            except Exception as error:
                raise LoggerError(f"wandb: {' '.join(str(error).split())}") from None
            if not known:
                raise LoggerError("wandb: no account is known: run wandb login, or set WANDB_MODE=offline")

    def open(self, cell: Cell) -> Any:
        run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "expressive-attention"),
            group=self.store.directory.resolve().name,
            job_type=cell.role,
            name=f"{cell.condition}, {_title(cell)}",
            config={**cell.model_dump(mode="json", exclude={"task"}), "task": cell.task.model_dump(mode="json")},
            dir=str(self.store.directory),
            reinit="create_new",  # several cells are at work at once
        )
        run.define_metric("validation/accuracy", step_metric="step")  # steps need not come in order
        return run

    def write(self, log: Any, step: int, accuracy: float) -> None:
        log.log({"step": step, "validation/accuracy": accuracy})

    def close(self, log: Any, step: int, measures: dict[str, float]) -> None:
        log.summary.update({f"test/{name}": value for name, value in measures.items()})
        log.finish()

    def abandon(self, log: Any) -> None:
        log.finish(exit_code=1)


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Several:
    """A display that passes all on to a first one and to loggers. A logger that fails is dropped, with a note."""

    def __init__(self, first: Display, loggers: Sequence[Display]) -> None:
        self.first, self.loggers = first, list(loggers)

    def begin(self, total_cells: int, finished_cells: int) -> None:
        self._tell("begin", total_cells, finished_cells)

    def added(self, cells: int) -> None:
        self._tell("added", cells)

    def started(self, cell: Cell) -> None:
        self._tell("started", cell)

    def advanced(self, cell: Cell, step: int, accuracy: float) -> None:
        self._tell("advanced", cell, step, accuracy)

    def finished(self, cell: Cell, summary: str) -> None:
        self._tell("finished", cell, summary)

    def note(self, message: str) -> None:
        self._tell("note", message)

    def end(self) -> None:
        self._tell("end")

    def _tell(self, event: str, *arguments: Any) -> None:
        getattr(self.first, event)(*arguments)
        for logger in list(self.loggers):
            self._tell_logger(logger, event, arguments)

    def _tell_logger(self, logger: Display, event: str, arguments: tuple[Any, ...]) -> None:
        try:
            getattr(logger, event)(*arguments)
        except Exception as error:  # a log that fails does not stop the training
            if logger in self.loggers:
                self.loggers.remove(logger)
            self.first.note(f"{type(logger).__name__}: {error}; the run goes on without it")


def make_loggers(names: Sequence[str], store: Store) -> list[Logger]:
    """The loggers of these names, each once.

    Raises:
        LoggerError: A name is not one of `LOGGERS`, its package is missing, or it refuses to work.
    """
    for name in names:
        if name not in LOGGERS:
            raise LoggerError(f"--log must be one of {list(LOGGERS)}, got {name!r}")
    return [LOGGERS[name](store) for name in dict.fromkeys(names)]


def _missing(package: str) -> LoggerError:
    return LoggerError(
        f"--log {package}: the package {package!r} is missing; the extra {package!r} installs it: "
        f"pip install 'expressive-attention[{package}]'"
    )


def _mean_curve(curves: pl.DataFrame) -> Iterator[tuple[int, float]]:
    """Steps and mean accuracies; a seed that has ended counts with its last one, as in training."""
    by_seed = curves.pivot(on="seed", index="step", values="accuracy").sort("step")
    for step, *accuracies in by_seed.with_columns(pl.exclude("step").forward_fill()).iter_rows():
        yield step, sum(accuracies) / len(accuracies)


def _title(cell: Cell) -> str:
    """The difference of a cell from the others of its condition."""
    seeds = f"seeds {cell.seeds[0]} to {cell.seeds[-1]}"
    return f"{cell.mechanism}, {cell.role}, {cell.setting}, {seeds}"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w .,=+-]", "_", text)
