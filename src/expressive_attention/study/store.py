"""Finished cells on disk: one folder each, which is there whole or not at all.

DIR/config.toml                    the study's configuration
DIR/*.py                           copies of the files of tasks and mechanisms that it names
DIR/record.json                    what they define, so that reading a study does not run them
DIR/facts.json                     facts of its tasks, counted once
DIR/cells/<identity>/cell.toml     what was run, on what, and checksums of the other files and of itself
seeds, curves, splits, examples (.parquet), weights.safetensors
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

from .config import PROTOCOL, Cell, Comparison, StudyConfig, parse_config, runs_files, tomllib
from .devices import CPU, device_name
from .errors import StudyError
from .exclusive import alone
from .facts import KnownFacts
from .family import PRIMARY_COMPARISONS
from .files import to_disk, write_atomically
from .record import Record, RecordError
from .results import CURVE_SCHEMA, EXAMPLE_SCHEMA, SEED_SCHEMA, SPLIT_SCHEMA, Setting, StudyResults
from .training import CellResult
from .user_tasks import TaskFile

__all__ = [
    "CorruptCellError",
    "Store",
    "StoreError",
    "candidates",
    "choose_setting",
    "collect",
    "environment",
    "finished_cells",
    "progress_of",
]

_LOCK = ".lock"
_CHECKPOINT = ".checkpoint-"

_RECORD = "record.json"
_FACTS = "facts.json"
_TABLES = {"seeds": SEED_SCHEMA, "curves": CURVE_SCHEMA, "splits": SPLIT_SCHEMA, "examples": EXAMPLE_SCHEMA}
# Columns that protocol 2 did not have yet.
_LATER = {
    "seeds": ("validation", "validation_cross_entropy", "unseen_predictions", "unseen_contexts"),
    "examples": tuple(EXAMPLE_SCHEMA),
}
# The last line of a cell.toml, which a parser takes for a comment.
_SEAL = b"# sha256 of the lines above: "


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

    def create(self, text: str, sources: Iterable[TaskFile] = (), record: Record | None = None) -> FileLock:
        """Make the folder, or take an existing study on, with this configuration; returns its `lock`.

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
            files[_RECORD] = record.to_json()
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
                models. Without, what they define is taken from the study's record.

        Raises:
            StoreError: The folder is not a study, or has no record of its files and is not trusted.
            ConfigError: Its configuration does not fit.
        """
        path = self.directory / "config.toml"
        if not path.is_file():
            raise StoreError(f"{self.directory} is not a study: it has no config.toml")
        text = path.read_text(encoding="utf-8")
        record = self._record() if runs_files(text) and not trust else None
        find = lambda name: self.directory / Path(name).name  # noqa: E731
        return parse_config(text, str(path), find, protocol=2, record=record), text

    def _record(self) -> Record:
        path = self.directory / _RECORD
        try:
            return Record.from_json(path.read_text(encoding="utf-8"))
        except OSError:
            reason = "is missing"
        except (RecordError, UnicodeDecodeError) as error:
            reason = str(error)
        raise StoreError(f"{path} {reason}: only --trust, which runs the study's Python files, can tell its tasks")

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
            "cell": {**cell.model_dump(mode="json", exclude_none=True, exclude={"task", "mechanism_file"})},
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
            cell: Which one.
            weights: Whether to read the trained parameters too.

        Raises:
            CorruptCellError: A file is missing, incomplete or changed; the message names it.
        """
        about = self.about(cell)
        folder = self.path(cell)
        later = _LATER if cell.protocol < PROTOCOL else {}
        schemas = {
            table: {name: kind for name, kind in schema.items() if name not in later.get(table, ())}
            for table, schema in _TABLES.items()
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
                tables[name] = pl.read_parquet(path)
            except (pl.exceptions.PolarsError, OSError) as error:
                raise CorruptCellError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
            if dict(tables[name].schema) != schema:
                raise CorruptCellError(f"{path} has other columns than this version writes")
        for name, schema in _TABLES.items():
            found = tables.get(name, pl.DataFrame(schema=schema))
            missing = [pl.lit(None, kind).alias(column) for column, kind in schema.items() if column not in found]
            tables[name] = found.with_columns(missing).select(*schema)
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
            content = path.read_bytes()
            about = tomllib.loads(content.decode())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            raise CorruptCellError(f"{path} is missing or not TOML") from None
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
        """Remove what killed runs have left; to be called under `lock`."""
        for path in self.cells.glob(".partial-*"):
            shutil.rmtree(path)
        for path in self.cells.glob(f".{_CHECKPOINT}*"):  # half written
            path.unlink(missing_ok=True)
        for path in self.cells.glob(f"{_CHECKPOINT}*"):
            if (self.cells / path.name.removeprefix(_CHECKPOINT)).exists():
                path.unlink(missing_ok=True)


def _toml(text: str) -> dict[str, Any]:
    """The content of a TOML text; none where it is not TOML, which whoever parses it will say."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _protocol(text: str, default: int) -> Any:
    return _toml(text).get("protocol", default)


def _sealed(content: bytes) -> bytes:
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


def _describes_a_cell(about: dict[str, Any]) -> bool:
    """Whether a cell.toml has what `Store` reads of it, of the right types."""
    tables = [about.get("sha256"), about.get("environment")]
    return isinstance(about.get("seconds"), (int, float)) and all(
        isinstance(table, dict) and all(isinstance(x, str) for x in table.values()) for table in tables
    )


def choose_setting(results: Iterable[tuple[Cell, CellResult]]) -> Setting:
    """The setting whose tuning seeds are most accurate on validation sequences, then fastest, then the smaller one.

    Fastest is by the mean of the steps to solve, an unsolved seed counting as all steps. Every process that asks has to
    choose the same: sums are exact, and do not depend on the order of the cells. Protocol 2 ranked by test sequences,
    and by the steps taken.
    """
    seeds: dict[Setting, list[tuple[float, int]]] = {}
    for cell, result in results:
        setting = Setting(cell.learning_rate, cell.initial_gain)
        if cell.protocol < PROTOCOL:
            rows = result.seeds.select("accuracy", "steps")
        else:
            steps = pl.col("steps_to_solve").fill_null(cell.training.steps)
            rows = result.seeds.select("validation", steps)
        seeds.setdefault(setting, []).extend(rows.iter_rows())

    def rank(setting: Setting) -> tuple[float, float, Setting]:
        accuracies, steps = zip(*seeds[setting], strict=True)
        return -math.fsum(accuracies) / len(accuracies), sum(steps) / len(steps), setting

    return min(seeds, key=rank)


@dataclass(frozen=True)
class Progress:
    """How far one comparison has come.

    Attributes:
        comparison: Which one.
        cells: The cells that it needs, as far as is known: the final ones once a setting is chosen.
        setting: The one chosen; None: the tuning is not finished.
    """

    comparison: Comparison
    cells: list[Cell]
    setting: Setting | None

    @property
    def final(self) -> list[Cell]:
        """The final cells, once they are known."""
        return [cell for cell in self.cells if cell.role == "final"]

    def confirmation_cells(self, store: Store) -> list[Cell]:
        """The cells of fresh seeds at the setting chosen."""
        assert self.setting is not None
        return self.comparison.confirmation_cells(self.setting, store.has)


def progress_of(store: Store, comparison: Comparison) -> Progress:
    """How far a comparison has come.

    Raises:
        CorruptCellError: A tuning cell is corrupt.
    """
    tuning = comparison.tuning_cells(store.has)
    if not all(store.has(cell) for cell in tuning):
        return Progress(comparison, tuning, None)
    chosen = choose_setting((cell, store.load(cell)) for cell in tuning) if tuning else comparison.training.settings[0]
    return Progress(comparison, tuning + comparison.final_cells(chosen, store.has), chosen)


def candidates(store: Store, config: StudyConfig, progress: Sequence[Progress]) -> list[Progress]:
    """The comparisons whose conditions EA or DPA has to itself by the final seeds, where the study asks for that.

    Either both comparisons of a condition are there or neither is.
    """
    if "exclusive_range" not in config.claims or not config.seeds.confirmation:
        return []
    sides: dict[str, dict[str, Progress]] = {}
    for found in progress:
        if found.setting is not None and all(store.has(cell) for cell in found.final):
            sides.setdefault(found.comparison.condition, {})[found.comparison.mechanism] = found
    chosen = []
    for by_mechanism in sides.values():
        pair = [by_mechanism.get(name) for name in ("expressive", "dot_product")]
        known = [found for found in pair if found is not None]
        if len(known) == 2:
            (ours, theirs) = (_solved(store, found.final) for found in known)
            if alone(ours, theirs) or alone(theirs, ours):
                chosen += known
    return chosen


def _solved(store: Store, cells: Sequence[Cell]) -> tuple[int, int]:
    seeds = pl.concat([store.load(cell).seeds for cell in cells])
    return int(seeds["solved"].sum()), len(seeds)


def finished_cells(store: Store, config: StudyConfig) -> tuple[list[Cell], list[str]]:
    """Those of a study's cells that are finished, and a line about each that is not.

    Raises:
        StoreError: A cell on which a setting was chosen is corrupt; the message names the file.
    """
    finished: list[Cell] = []
    unfinished: list[str] = []
    progress = [progress_of(store, comparison) for comparison in config.comparisons()]
    confirmed = {id(found) for found in candidates(store, config, progress)}
    for found in progress:
        cells = list(found.cells)
        if found.setting is None:
            unfinished.append(f"{found.comparison.condition}, {found.comparison.mechanism}, final: waits for tuning")
        elif id(found) in confirmed:
            cells += found.confirmation_cells(store)
        finished += [cell for cell in cells if store.has(cell)]
        unfinished += [str(cell) for cell in cells if not store.has(cell)]
    return finished, unfinished


def collect(store: Store) -> StudyResults:
    """All finished cells of a study; none of its Python files is run.

    Raises:
        StoreError: The folder is not a study, or a cell is corrupt; the message names the file.
        ConfigError: Its configuration does not fit.
    """
    config, text = store.config()
    facts = KnownFacts(store.directory / _FACTS)
    conditions = config.conditions(facts.of)
    facts.keep()
    fixed = {condition.label for condition in conditions if condition.facts.get("fixed_data")}
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
            if name != "examples" or cell.condition in fixed:
                parts.append(getattr(result, name).with_columns(columns))
        seconds += result.seconds
        found = store.about(cell)["environment"]
    empty = dict.fromkeys(("condition", "mechanism", "role"), pl.String) | dict.fromkeys(Setting._fields, pl.Float64)
    joined = {
        name: pl.concat(parts) if parts else pl.DataFrame(schema={**_TABLES[name], **empty})
        for name, parts in tables.items()
    }
    return StudyResults(
        name=config.name, config=text, conditions=conditions, mechanisms=list(config.mechanisms),
        **joined, unfinished=unfinished, claims=list(config.claims), environment=found or environment(),
        seconds=seconds, protocol=config.protocol,
        family=PRIMARY_COMPARISONS if config.family == "primary" else 0,
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
