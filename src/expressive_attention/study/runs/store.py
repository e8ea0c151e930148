"""Finished cells on disk: one folder each, which is there whole or not at all.

DIR/config.toml                    the study's configuration
DIR/*.py                           copies of the files of tasks and mechanisms that it names
DIR/record.json                    tasks and mechanisms in them, so that reading a study does not run them
DIR/facts.json                     facts of its tasks, counted once
DIR/cells/<identity>/cell.toml     the cell, its machine, and checksums of the other files and of itself
seeds, curves, splits, examples (.parquet), weights.safetensors
DIR/cells/.checkpoint-<identity>   of a cell in training; see `checkpoints`
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import tomli_w
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config.cells import Cell
from ..config.load import own_files, parse_config
from ..config.record import RECORD, Record, RecordError, check_files, read_record
from ..config.schema import PROTOCOL
from ..config.study import StudyConfig
from ..config.task_files import TaskFile
from ..config.toml import tomllib
from ..errors import StudyError
from ..files import read_parquet, to_disk, write_atomically
from ..training.result import EXAMPLE_SCHEMA, TABLES, CellResult
from .environment import environment
from .lengths import Lengths

__all__ = ["CorruptCellError", "Store", "StoreError"]


_LOCK = ".lock"
_CHECKPOINT = ".checkpoint-"

# Columns that protocol 2 did not have yet.
_LATER = {
    "seeds": ("validation", "validation_cross_entropy", "unseen_predictions", "unseen_contexts"),
    "examples": tuple(EXAMPLE_SCHEMA),
}
# The last line of a cell.toml, which a parser takes for a comment.
_SEAL = b"# sha256 of the lines above: "
# Errors of a file that is not there, or is none.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


class StoreError(StudyError):
    """A folder that cannot be used as a study; the message says why, in one line."""


class CorruptCellError(StoreError):
    """A cell on disk that is damaged; it is never read as a result."""


class Store:
    """The folder of one study.

    Args:
        directory: Its path; it need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cells = directory / "cells"
        self._lengths = Lengths(self.cells)

    # ---- the configuration ----

    def create(self, text: str, sources: Iterable[TaskFile] = (), record: Record | None = None) -> FileLock:
        """Make the folder, or extend an existing study, with this configuration; returns its `lock`.

        Args:
            text: The configuration; the number of the protocol is put before it where it does not say.
            sources: The files of tasks and mechanisms that it names, to be kept beside it.
            record: The tasks and mechanisms that they define.

        Raises:
            StoreError: The folder holds something else or a study of another protocol, cannot be made, or another run
                is writing to it.
        """
        config = self.directory / "config.toml"
        if (of := _protocol(text, PROTOCOL)) != PROTOCOL:
            raise StoreError(f"a study of protocol {of} can be read, and not be run: this version runs {PROTOCOL}")
        files = {file.name: file.text for file in sources}
        if record is not None and files:
            files[RECORD] = record.to_json()
        files[config.name] = text if "protocol" in _toml(text) else f"protocol = {PROTOCOL}\n{text}"
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
        if config.is_file() and (of := _protocol(config.read_text(encoding="utf-8"), 2)) != PROTOCOL:
            raise StoreError(
                f"{self.directory} holds a study of protocol {of}, which can be read, and not be gone on with: this "
                f"version runs protocol {PROTOCOL}, whose results do not mix with it; give another folder (--out)"
            )
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            lock = self.lock()
            for name, content in files.items():  # the configuration last: it needs the others
                write_atomically(self.directory / name, content.encode())
        except OSError as error:
            raise StoreError(f"{self.directory} cannot be written: {error.strerror}") from None
        return lock

    def config(self, *, trust: bool = False) -> tuple[StudyConfig, str]:
        """The configuration and its text.

        Args:
            trust: Run the study's files of tasks and mechanisms, as is needed to train its cells or to use its
                models. Otherwise their tasks and mechanisms are taken from the study's record.

        Raises:
            StoreError: The folder is not a study, or has no record of its files and is not trusted, or a file is to be
                run that is not the one of the record, with which the cells were trained.
            ConfigError: Its configuration does not fit.
        """
        path = self.directory / "config.toml"
        if not path.is_file():
            raise StoreError(f"{self.directory} is not a study: it has no config.toml; {self._hint()}")
        text = path.read_text(encoding="utf-8")
        names = [Path(name).name for name in own_files(text)]
        try:
            record = read_record(self.directory, names) if names and not trust else None
            if trust:
                check_files(self.directory, names)
        except RecordError as error:
            raise StoreError(str(error)) from None
        find = lambda name: self.directory / Path(name).name  # noqa: E731
        return parse_config(text, str(path), find, protocol=2, record=record), text

    def _hint(self) -> str:
        """The folder that was probably meant."""
        above = next((folder for folder in self.directory.parents if (folder / "config.toml").is_file()), None)
        below = sorted(path.parent for path in self.directory.glob("*/config.toml"))
        meant = above or (below[0] if below else Path("runs/quick"))
        return f"pass the run folder, e.g. {meant}"

    def lock(self) -> FileLock:
        """The lock that is held while cells are written. The system frees it when the process ends, in whatever way.

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
        """The folder of a cell; it need not exist."""
        return self.cells / cell.identity

    def has(self, cell: Cell) -> bool:
        """Whether the cell has been finished."""
        return self.path(cell).exists()

    def lengths(self) -> dict[int, list[int]]:
        """Numbers of seeds that finished cells have, the largest first, by the first of the seeds."""
        return self._lengths.known()

    def checkpoint(self, cell: Cell) -> Path:
        """The file from which a killed cell resumes; it need not exist."""
        return self.cells / f"{_CHECKPOINT}{cell.identity}"

    def save(self, cell: Cell, result: CellResult, machine: dict[str, str] | None = None) -> None:
        """Write a finished cell, all of it or, if killed, nothing; its checkpoint is removed.

        Args:
            cell: The cell.
            result: Its result.
            machine: The `environment` in which it was; None: this one.
        """
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.cells))
        for name in TABLES:
            getattr(result, name).write_parquet(partial / f"{name}.parquet")
        save_file(result.weights, partial / "weights.safetensors")
        files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        content = {
            "identity": cell.identity,
            "seconds": result.seconds,
            "cell": {**cell.model_dump(mode="json", exclude_none=True, exclude={"task", "mechanism_file", "surplus"})},
            "environment": environment() if machine is None else machine,
            "sha256": files,
        }
        content["cell"]["task"] = cell.task.model_dump(mode="json", exclude_none=True)
        (partial / "cell.toml").write_bytes(_sealed(tomli_w.dumps(content).encode()))
        for path in partial.iterdir():
            to_disk(path)
        self.discard(cell)
        partial.rename(self.path(cell))
        to_disk(self.cells)
        self.checkpoint(cell).unlink(missing_ok=True)

    def load(self, cell: Cell, *, weights: bool = False) -> CellResult:
        """Read a finished cell.

        Args:
            cell: The cell.
            weights: Whether to read the trained parameters too.

        Raises:
            CorruptCellError: A file is missing, incomplete or changed; the message names it.
            StoreError: A file cannot be read now, for lack of permission or because of a disk error.
        """
        about = self.about(cell)
        folder = self.path(cell)
        later = _LATER if cell.protocol < PROTOCOL else {}
        schemas = {
            table: {name: kind for name, kind in schema.items() if name not in later.get(table, ())}
            for table, schema in TABLES.items()
        }
        stored = {table: schema for table, schema in schemas.items() if schema}
        for name in (*(f"{table}.parquet" for table in stored), "weights.safetensors"):
            path = folder / name
            if not path.is_file():
                raise CorruptCellError(f"{path} is missing")
            if (name != "weights.safetensors" or weights) and about["sha256"].get(name) != _checksum(path):
                raise CorruptCellError(f"{path} is corrupt: its checksum is not the one in cell.toml")
        tables = {}
        for name, schema in stored.items():
            path = folder / f"{name}.parquet"
            try:
                tables[name] = read_parquet(path)
            except (pl.exceptions.PolarsError, OSError) as error:
                raise CorruptCellError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
            if dict(tables[name].schema) != schema:
                raise CorruptCellError(f"{path} has other columns than this version writes")
        for name, schema in TABLES.items():
            found = tables.get(name, pl.DataFrame(schema=schema))
            missing = [pl.lit(None, kind).alias(column) for column, kind in schema.items() if column not in found]
            tables[name] = found.with_columns(missing).select(*schema)
        try:
            parameters = load_file(folder / "weights.safetensors") if weights else {}
        except SafetensorError as error:
            raise CorruptCellError(f"{folder / 'weights.safetensors'} cannot be read: {error}") from None
        return CellResult(**tables, weights=parameters, seconds=about["seconds"])

    def counted(self, cell: Cell) -> CellResult:
        """Read a finished cell without the seeds that are more than the study asks for.

        Its examples are those of all seeds, which tell how they differ.

        Raises:
            StoreError: As `load`.
        """
        result = self.load(cell)
        if not cell.surplus:
            return result
        tables = ("seeds", "curves", "splits")
        counts = pl.col("seed").is_in(cell.counted)
        return replace(result, **{name: getattr(result, name).filter(counts) for name in tables})

    def about(self, cell: Cell) -> dict[str, Any]:
        """The content of cell.toml.

        Raises:
            CorruptCellError: It is missing or not what was written.
        """
        path = self.path(cell) / "cell.toml"
        try:
            content = _content(path)
            about = tomllib.loads(content.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError):
            raise CorruptCellError(f"{path} is not TOML") from None
        if cell.protocol >= PROTOCOL and _sealed(content.rpartition(_SEAL)[0]) != content:
            raise CorruptCellError(f"{path} is corrupt: its checksum is not the one in its last line")
        if about.get("identity") != cell.identity or not _describes_a_cell(about):
            raise CorruptCellError(f"{path} does not describe this cell")
        return about

    def discard(self, cell: Cell) -> None:
        """Remove a corrupt cell, or a link in its place, if there is one."""
        path = self.path(cell)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove the remains of killed runs; to be called under `lock`."""
        for path in self.cells.glob(".partial-*"):
            shutil.rmtree(path)
        for path in self.cells.glob(f".{_CHECKPOINT}*"):  # half written
            path.unlink(missing_ok=True)
        for path in self.cells.glob(f"{_CHECKPOINT}*"):
            if (self.cells / path.name.removeprefix(_CHECKPOINT)).exists():
                path.unlink(missing_ok=True)


def _toml(text: str) -> dict[str, Any]:
    """The content of a TOML text; empty where it is not TOML, which the parser of the configuration reports."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _protocol(text: str, default: int) -> Any:
    return _toml(text).get("protocol", default)


def _sealed(content: bytes) -> bytes:
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


def _describes_a_cell(about: dict[str, Any]) -> bool:
    """Whether a cell.toml has the entries that `Store` reads, with the right types."""
    tables = [about.get("sha256"), about.get("environment")]
    return isinstance(about.get("seconds"), (int, float)) and all(
        isinstance(table, dict) and all(isinstance(x, str) for x in table.values()) for table in tables
    )


def _checksum(path: Path) -> str:
    return hashlib.sha256(_content(path)).hexdigest()


def _content(path: Path) -> bytes:
    """The bytes of a file of a cell. A file that may be whole and only cannot be read now is not called corrupt."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise CorruptCellError(f"{path} is missing") from None
        raise StoreError(f"{path} cannot be read, and is kept: {error.strerror}") from None
