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

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock, Timeout

from ..config.cells import Cell
from ..config.load import own_files, parse_config
from ..config.record import RECORD, Record, RecordError, check_files, read_record
from ..config.schema import PROTOCOL
from ..config.study import StudyConfig
from ..config.task_files import TaskFile
from ..config.toml import tomllib
from ..files import to_disk, write_atomically
from ..training.result import CellResult
from .cell_files import CorruptCellError, Lengths, StoreError, description_of, read_about, read_cell, write_cell
from .environment import environment

__all__ = ["CorruptCellError", "Store", "StoreError"]


_LOCK = ".lock"
_CHECKPOINT = ".checkpoint-"


class Store:
    """The folder of one study.

    Args:
        directory: Its path; it need not exist yet.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.cells = self.directory / "cells"
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
        if (of := _toml(text).get("protocol", PROTOCOL)) != PROTOCOL:
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
        if self.is_exported:
            raise StoreError(
                f"{self.directory} has exported tables and no cells, so there is no study to go on with; give another "
                "folder (--out)"
            )
        if config.is_file() and (of := self._protocol()) != PROTOCOL:
            raise StoreError(
                f"{self.directory} holds a study of protocol {of}, which can be read, and not be gone on with: this "
                f"version runs protocol {PROTOCOL}, whose results do not mix with it; give another folder (--out)"
            )
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            lock = self.lock()
            for name, content in files.items():  # the configuration last: it needs the others
                write_atomically(self.directory / name, content.encode())
            with tempfile.TemporaryFile(dir=self.cells):  # or the first cell would be lost
                pass
        except OSError as error:
            raise StoreError(f"{self.directory} cannot be written: {error.strerror}") from None
        return lock

    def config(self, *, trust: bool = False) -> tuple[StudyConfig, str]:
        """The configuration and its text.

        Args:
            trust: Run the study's files of tasks and mechanisms, as is needed to train its cells or to use its
                models. Otherwise their tasks and mechanisms are taken from the study's record.

        Raises:
            StoreError: The folder is not a study, has no record of its files and is not trusted, its configuration is
                not text, or a file is to be run that is not the one of the record, with which the cells were trained.
            ConfigError: Its configuration does not fit.
        """
        path = self.directory / "config.toml"
        if not path.is_file():
            raise StoreError(f"{self.directory} is not a study: {self._lack()}; {self._hint()}")
        text = self._text()
        names = [Path(name).name for name in own_files(text)]
        try:
            record = read_record(self.directory, names) if names and not trust else None
            if trust:
                check_files(self.directory, names)
        except RecordError as error:
            raise StoreError(str(error)) from None
        find = lambda name: self.directory / Path(name).name  # noqa: E731
        return parse_config(text, str(path), find, protocol=2, record=record), text

    @property
    def is_exported(self) -> bool:
        """Whether the folder has tables of `ea study export`, and no cells."""
        tables = (self.directory / f"seeds.{ending}" for ending in ("parquet", "csv"))
        return not self.cells.is_dir() and any(path.is_file() for path in tables)

    def check_cells(self) -> None:
        """Raise an error if the folder is an export.

        Raises:
            StoreError: It is; the message says which commands read it.
        """
        if self.is_exported:
            raise StoreError(
                f"{self.directory} has exported tables and no trained models: `ea study report`, `status`, `compare`, "
                "`export` and `verify` read them; for all else, pass the run folder, e.g. runs/quick"
            )

    def _text(self) -> str:
        """The text of the configuration, which is there."""
        path = self.directory / "config.toml"
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise StoreError(f"{path} is damaged: byte {error.start} is no UTF-8") from None

    def _protocol(self) -> Any:
        """The protocol of the study in the folder."""
        path, text = self.directory / "config.toml", self._text()
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise StoreError(f"{path} is damaged: not valid TOML: {error}") from None
        if "grid" not in content:
            raise StoreError(f"{path} is damaged: it has no grid")
        return content.get("protocol", 2)

    def _lack(self) -> str:
        """The reason why the path is not the folder of a study."""
        if not self.directory.exists():
            return "the path does not exist"
        return "it has no config.toml" if self.directory.is_dir() else "it is a file"

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
        try:
            write_cell(partial, cell, result, environment() if machine is None else machine)
        except Exception:  # as of a full disk, which the next cell may find with some room
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.chmod(0o755)  # a temporary folder is private
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
        return read_cell(self.path(cell), cell, weights=weights)

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
        return read_about(self.path(cell), cell)

    def described(self) -> Iterator[dict[str, Any]]:
        """The descriptions of the cells in the folder, whether or not its study has them."""
        yield from filter(None, (description_of(path) for path in sorted(self.cells.glob("[!.]*"))))

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
