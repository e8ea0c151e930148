"""Finished cells on disk: one folder each, which is there whole or not at all.

DIR/config.toml                    the study's configuration
DIR/*.py                           copies of the files of tasks that it names
DIR/cells/<identity>/cell.toml     what was run, on what, and checksums of the other files
seeds, curves, splits (.parquet), weights.safetensors
DIR/cells/.checkpoint-<identity>   of a cell in training; see `checkpoints`
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import tomli_w
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import Cell, StudyConfig, parse_config, tomllib
from .devices import CPU, device_name
from .errors import StudyError
from .files import to_disk, write_atomically
from .results import CURVE_SCHEMA, SEED_SCHEMA, SPLIT_SCHEMA, Setting, StudyResults
from .training import CellResult
from .user_tasks import TaskFile

__all__ = [
    "CorruptCellError",
    "Store",
    "StoreError",
    "choose_setting",
    "collect",
    "environment",
    "finished_cells",
]

_LOCK = ".lock"
_CHECKPOINT = ".checkpoint-"

_TABLES = {"seeds": SEED_SCHEMA, "curves": CURVE_SCHEMA, "splits": SPLIT_SCHEMA}


class StoreError(StudyError):
    """A folder that cannot be used as a study; the message says why, in one line."""


class CorruptCellError(StoreError):
    """A cell on disk that is not what was written; it is never read as a result."""


class Store:
    """The folder of one study.

    Args:
        directory: Where it is, or is to be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cells = directory / "cells"

    # ---- the configuration ----

    def create(self, text: str, task_files: Iterable[TaskFile] = ()) -> FileLock:
        """Make the folder, or take an existing study on, with this configuration; returns its `lock`.

        Args:
            text: The configuration.
            task_files: The files of tasks that it names, to be kept beside it.

        Raises:
            StoreError: The folder holds something else, cannot be made, or another run is writing to it.
        """
        config = self.directory / "config.toml"
        files = {file.name: file.text for file in task_files} | {config.name: text}
        ours = {self.cells.name, _LOCK, *files}
        if self.directory.exists() and not self.directory.is_dir():
            raise StoreError(f"{self.directory} is not a directory")
        if (
            self.directory.is_dir()
            and not config.exists()
            and any(
                path.name not in ours and not path.name.startswith(tuple(f".{name}-" for name in files))
                for path in self.directory.iterdir()
            )
        ):
            raise StoreError(f"{self.directory} is not empty and not a study (it has no config.toml)")
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            lock = self.lock()
            for name, content in files.items():  # the configuration last: it needs the others
                write_atomically(self.directory / name, content.encode())
        except OSError as error:
            raise StoreError(f"{self.directory} cannot be written: {error.strerror}") from None
        return lock

    def config(self) -> tuple[StudyConfig, str]:
        """The configuration and its text.

        Raises:
            StoreError: The folder is not a study.
            ConfigError: Its configuration does not fit.
        """
        path = self.directory / "config.toml"
        if not path.is_file():
            raise StoreError(f"{self.directory} is not a study: it has no config.toml")
        text = path.read_text(encoding="utf-8")
        return parse_config(text, str(path), lambda name: self.directory / Path(name).name), text

    def lock(self) -> FileLock:
        """Held while cells are written. The system frees it with the process, however that ends.

        Raises:
            StoreError: Another process holds it.
        """
        lock = FileLock(self.directory / _LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise StoreError(f"{self.directory}: another run is writing to this study") from None
        return lock

    # ---- cells ----

    def path(self, cell: Cell) -> Path:
        """The folder of a cell, there or not."""
        return self.cells / cell.identity

    def has(self, cell: Cell) -> bool:
        """Whether the cell has been finished."""
        return self.path(cell).exists()

    def checkpoint(self, cell: Cell) -> Path:
        """The file from which a killed cell goes on, there or not."""
        return self.cells / f"{_CHECKPOINT}{cell.identity}"

    def save(self, cell: Cell, result: CellResult, machine: dict[str, str] | None = None) -> None:
        """Write a finished cell, all of it or, if killed, nothing; its checkpoint is removed.

        Args:
            cell: Which one.
            result: What was found.
            machine: The `environment` in which it was; None: this one.
        """
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.cells))
        for name in _TABLES:
            getattr(result, name).write_parquet(partial / f"{name}.parquet")
        save_file(result.weights, partial / "weights.safetensors")
        files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        content = {
            "identity": cell.identity,
            "seconds": result.seconds,
            "cell": {**cell.model_dump(mode="json", exclude_none=True, exclude={"task"})},
            "environment": environment() if machine is None else machine,
            "sha256": files,
        }
        content["cell"]["task"] = cell.task.model_dump(mode="json", exclude_none=True)
        (partial / "cell.toml").write_bytes(tomli_w.dumps(content).encode())
        for path in partial.iterdir():
            to_disk(path)
        if self.path(cell).exists():
            shutil.rmtree(self.path(cell))
        partial.rename(self.path(cell))
        to_disk(self.cells)
        self.checkpoint(cell).unlink(missing_ok=True)

    def load(self, cell: Cell, *, weights: bool = False) -> CellResult:
        """Read a finished cell.

        Args:
            cell: Which one.
            weights: Whether to read the trained parameters too.

        Raises:
            CorruptCellError: A file is missing, incomplete or changed; the message names it.
        """
        about = self.about(cell)
        folder = self.path(cell)
        for name in (*(f"{table}.parquet" for table in _TABLES), "weights.safetensors"):
            path = folder / name
            if not path.is_file():
                raise CorruptCellError(f"{path} is missing")
            if (name != "weights.safetensors" or weights) and about["sha256"].get(name) != _checksum(path):
                raise CorruptCellError(f"{path} is corrupt: its checksum is not the one in cell.toml")
        tables = {}
        for name, schema in _TABLES.items():
            path = folder / f"{name}.parquet"
            try:
                tables[name] = pl.read_parquet(path)
            except (pl.exceptions.PolarsError, OSError) as error:
                raise CorruptCellError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
            if dict(tables[name].schema) != schema:
                raise CorruptCellError(f"{path} has other columns than this version writes")
        try:
            parameters = load_file(folder / "weights.safetensors") if weights else {}
        except SafetensorError as error:
            raise CorruptCellError(f"{folder / 'weights.safetensors'} cannot be read: {error}") from None
        return CellResult(**tables, weights=parameters, seconds=about["seconds"])

    def about(self, cell: Cell) -> dict[str, Any]:
        """The content of cell.toml.

        Raises:
            CorruptCellError: It is missing or not what was written.
        """
        path = self.path(cell) / "cell.toml"
        try:
            about = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            raise CorruptCellError(f"{path} is missing or not TOML") from None
        if about.get("identity") != cell.identity or not {"seconds", "sha256", "environment"} <= about.keys():
            raise CorruptCellError(f"{path} does not describe this cell")
        return about

    def discard(self, cell: Cell) -> None:
        """Remove a corrupt cell."""
        path = self.path(cell)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what killed runs have left; to be called under `lock`."""
        for path in self.cells.glob(".partial-*"):
            shutil.rmtree(path)
        for path in self.cells.glob(f".{_CHECKPOINT}*"):  # half written
            path.unlink(missing_ok=True)
        for path in self.cells.glob(f"{_CHECKPOINT}*"):
            if (self.cells / path.name.removeprefix(_CHECKPOINT)).exists():
                path.unlink(missing_ok=True)


def choose_setting(results: Iterable[tuple[Cell, CellResult]]) -> Setting:
    """The setting whose tuning seeds are most accurate, then fastest, then the smaller one.

    Every process that asks has to choose the same: sums are exact, and do not depend on the order of the cells.
    """
    seeds: dict[Setting, list[tuple[float, int]]] = {}
    for cell, result in results:
        setting = Setting(cell.learning_rate, cell.initial_gain)
        seeds.setdefault(setting, []).extend(result.seeds.select("accuracy", "steps").iter_rows())

    def rank(setting: Setting) -> tuple[float, float, Setting]:
        accuracies, steps = zip(*seeds[setting], strict=True)
        return -math.fsum(accuracies) / len(accuracies), sum(steps) / len(steps), setting

    return min(seeds, key=rank)


def finished_cells(store: Store, config: StudyConfig) -> tuple[list[Cell], list[str]]:
    """Those of a study's cells that are finished, and a line about each that is not.

    Raises:
        StoreError: A cell on which a setting was chosen is corrupt; the message names the file.
    """
    finished: list[Cell] = []
    unfinished: list[str] = []
    for comparison in config.comparisons():
        cells = tuning = comparison.tuning_cells()
        if all(store.has(cell) for cell in tuning):
            chosen = choose_setting((cell, store.load(cell)) for cell in tuning) if tuning else None
            cells = tuning + comparison.final_cells(chosen or config.training.settings[0])
        else:
            unfinished.append(f"{comparison.condition}, {comparison.mechanism}, final: waits for tuning")
        finished += [cell for cell in cells if store.has(cell)]
        unfinished += [str(cell) for cell in cells if not store.has(cell)]
    return finished, unfinished


def collect(store: Store) -> StudyResults:
    """All finished cells of a study.

    Raises:
        StoreError: The folder is not a study, or a cell is corrupt; the message names the file.
        ConfigError: Its configuration does not fit.
    """
    config, text = store.config()
    tables: dict[str, list[pl.DataFrame]] = {name: [] for name in _TABLES}
    finished, unfinished = finished_cells(store, config)
    found: dict[str, str] = {}
    seconds = 0.0
    for cell in finished:
        result = store.load(cell)
        labels = {"condition": cell.condition, "mechanism": cell.mechanism, "role": cell.role}
        columns = [pl.lit(value).alias(name) for name, value in labels.items()]
        columns += [pl.lit(getattr(cell, name)).alias(name) for name in Setting._fields]
        for name, parts in tables.items():
            parts.append(getattr(result, name).with_columns(columns))
        seconds += result.seconds
        found = store.about(cell)["environment"]
    empty = dict.fromkeys(("condition", "mechanism", "role"), pl.String) | dict.fromkeys(Setting._fields, pl.Float64)
    joined = {
        name: pl.concat(parts) if parts else pl.DataFrame(schema={**_TABLES[name], **empty})
        for name, parts in tables.items()
    }
    return StudyResults(
        name=config.name, config=text, conditions=config.conditions(), mechanisms=list(config.mechanisms),
        **joined, unfinished=unfinished, claims=list(config.claims), environment=found or environment(),
        seconds=seconds,
    )  # fmt: skip


def environment(device: torch.device = CPU) -> dict[str, str]:
    """Versions and machine, among which are all that may change the bits of a result trained on a device.

    ``revision`` is the commit, where the package runs from a checkout; ``threads`` are those of this process.
    """
    return {**_machine(), "threads": str(torch.get_num_threads()), "device": device_name(device)}


@lru_cache
def _machine() -> dict[str, str]:
    return {
        "expressive-attention": version("expressive-attention"),
        **_revision(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def _revision() -> dict[str, str]:
    """The commit that the package's own folder is of, marked if files differ from it."""
    folder = Path(__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=False
        )
        if tracked.returncode:
            return {}
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"revision": said.stdout.strip()}


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
