"""The files of finished cells: `store` says where they are."""

from __future__ import annotations

import errno
import hashlib
import math
import re
import time
from pathlib import Path
from typing import Any

import polars as pl
import tomli_w
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..config.cells import Cell
from ..config.schema import PROTOCOL
from ..config.toml import tomllib
from ..errors import StudyError
from ..files import parquet, read_parquet, to_disk
from ..training.result import EXAMPLE_SCHEMA, TABLES, CellResult

__all__ = [
    "CorruptCellError",
    "Lengths",
    "StoreError",
    "description_of",
    "is_duration",
    "read_about",
    "read_cell",
    "sealed",
    "write_cell",
]


# Columns that protocol 2 did not have yet.
_LATER = {
    "seeds": ("validation", "validation_cross_entropy", "unseen_predictions", "unseen_contexts"),
    "examples": tuple(EXAMPLE_SCHEMA),
}
# The last line of a cell.toml, which a parser takes for a comment.
_SEAL = b"# sha256 of the lines above: "
# Errors of a file that is not there, or is none.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


_COARSEST_CLOCK = 2_000_000_000  # of file systems, in nanoseconds


class StoreError(StudyError):
    """A folder that cannot be used as a study; the message says why, in one line."""


class CorruptCellError(StoreError):
    """A cell on disk that is damaged; it is never read as a result."""


def write_cell(folder: Path, cell: Cell, result: CellResult, machine: dict[str, str]) -> None:
    """Write the files of a cell to a folder."""
    for name in TABLES:
        (folder / f"{name}.parquet").write_bytes(parquet(getattr(result, name)))
    (folder / "weights.safetensors").write_bytes(save(result.weights))
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    content = {
        "identity": cell.identity,
        "seconds": result.seconds,
        "cell": {**cell.model_dump(mode="json", exclude_none=True, exclude={"task", "mechanism_file", "surplus"})},
        "environment": machine,
        "sha256": files,
    }
    content["cell"]["task"] = cell.task.model_dump(mode="json", exclude_none=True)
    (folder / "cell.toml").write_bytes(sealed(tomli_w.dumps(content).encode()))
    for path in folder.iterdir():
        to_disk(path)


def read_cell(folder: Path, cell: Cell, *, weights: bool) -> CellResult:
    """Read the files of a cell; arguments and errors as of `Store.load`."""
    about = read_about(folder, cell)
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


def read_about(folder: Path, cell: Cell) -> dict[str, Any]:
    """The content of cell.toml; errors as of `Store.about`."""
    path = folder / "cell.toml"
    try:
        content = _content(path)
        about = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise CorruptCellError(f"{path} is not TOML") from None
    if cell.protocol >= PROTOCOL and sealed(content.rpartition(_SEAL)[0]) != content:
        raise CorruptCellError(f"{path} is corrupt: its checksum is not the one in its last line")
    if about.get("identity") != cell.identity or not _describes_a_cell(about):
        raise CorruptCellError(f"{path} does not describe this cell")
    return about


def description_of(folder: Path) -> dict[str, Any] | None:
    """The cell that a cell.toml describes, whatever the study; None where it cannot be read."""
    try:
        cell = tomllib.loads((folder / "cell.toml").read_text(encoding="utf-8"))["cell"]
    except (OSError, ValueError, KeyError):
        return None
    return cell if isinstance(cell, dict) and isinstance(cell.get("task", {}), dict) else None


def sealed(content: bytes) -> bytes:
    """The content of a cell.toml with the checksum of its lines."""
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


def _describes_a_cell(about: dict[str, Any]) -> bool:
    """Whether a cell.toml has the entries that are read, with values that can be."""
    tables = [about.get("sha256"), about.get("environment")]
    return (
        all(isinstance(table, dict) and all(isinstance(x, str) for x in table.values()) for table in tables)
        and is_duration(about.get("seconds"))
        and names_threads(about["environment"])
    )


def names_threads(environment: dict[str, str]) -> bool:
    """Whether the numbers of threads that an environment has, if any, can be such."""
    number = "[1-9][0-9]{0,3}"
    return re.fullmatch(f"{number}(, {number})*", environment.get("threads", "1")) is not None


def is_duration(seconds: Any) -> bool:
    """Whether a value that was read is a number of seconds."""
    return isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < math.inf


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


class Lengths:
    """Numbers of seeds of the finished cells in a folder: a study finds seeds that it ran with other numbers of them.

    Args:
        cells: The folder of the cells; it need not exist yet.
    """

    def __init__(self, cells: Path) -> None:
        self.cells = cells
        self.seeds: dict[str, range] = {}  # by the name of the cell
        self.lengths: dict[int, list[int]] = {}
        self.read = 0  # when the folder had last been changed, as these were read

    def known(self) -> dict[int, list[int]]:
        """Numbers of seeds that cells have, the largest first, by the first of the seeds."""
        changed = self.cells.stat().st_mtime_ns if self.cells.is_dir() else 0
        if changed != self.read:
            names = [path.name for path in self.cells.iterdir() if not path.name.startswith(".")] if changed else []
            self.seeds = {name: self.seeds.get(name) or _seeds_of(self.cells / name) for name in names}
            found: dict[int, set[int]] = {}
            for seeds in filter(None, self.seeds.values()):
                found.setdefault(seeds.start, set()).add(len(seeds))
            self.lengths = {first: sorted(lengths, reverse=True) for first, lengths in found.items()}
            # A second change may bear the time of the first one, where clocks are coarse.
            self.read = changed if time.time_ns() - changed > _COARSEST_CLOCK else 0
        return self.lengths


def _seeds_of(folder: Path) -> range:
    """The seeds of the cell in a folder; none where it does not say, or has gaps."""
    try:
        seeds = (description_of(folder) or {})["seeds"]
        found = range(seeds[0], seeds[0] + len(seeds))
        return found if list(found) == seeds else range(0)
    except (KeyError, TypeError, IndexError):
        return range(0)
