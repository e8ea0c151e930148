"""Results from the tables that `ea study export` has written, where the cells themselves are elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import polars as pl

from ..config.cells import Arm, Cell
from ..config.condition import Condition, Setting
from ..config.schema import PROTOCOL, Role
from ..config.study import StudyConfig
from ..files import read_parquet
from ..training.result import ROW_KEYS, TABLES, CellResult
from .cell_files import is_duration, names_threads
from .facts import plain_number
from .results import StudyResults, collect, declared, setting_of
from .store import Store, StoreError

__all__ = ["ABOUT", "ExportedCells", "about", "load_results", "read_table"]

ABOUT = "about.json"  # beside the tables: what these do not say
_ABOUT: dict[str, Any] = {"environment": {}, "seconds": 0.0, "unfinished": [], "regrouped": False}  # with its defaults
_KEYS = dict.fromkeys(("condition", "mechanism", "role"), pl.String) | dict.fromkeys(Setting._fields, pl.Float64)


def load_results(directory: Path | str, *, trust: bool = False) -> StudyResults:
    """The results of a study from its folder, or from a folder of tables that were exported as CSV or parquet.

    Args:
        directory: The folder.
        trust: As for `collect`; tables that were exported need it only where their record is missing.

    Raises:
        StoreError: The folder is neither; the message says what is missing.
        ConfigError: Its configuration does not fit.
    """
    store = Store(directory)
    if not store.is_exported:
        return collect(store, trust=trust)
    directory = store.directory
    if not (directory / "config.toml").is_file():
        raise StoreError(
            f"{directory} has exported tables and no config.toml, which says what was run: pass the run folder, e.g. "
            "runs/quick, or export it again"
        )
    config, text = store.config(trust=trust)
    tables: dict[str, Any] = {name: _table(directory, name) for name in TABLES}
    if (wrong := _wrong_with(tables["seeds"]) or _strange_to(config, tables["seeds"])) is not None:
        raise StoreError(f"{directory}: the table of seeds is not what `ea study export` writes: {wrong}")
    for name in ("curves", "splits"):  # examples of several cells lie in one table
        if tables[name].select(*_KEYS, *ROW_KEYS[name]).is_duplicated().any():
            raise StoreError(f"{directory}: the table of {name} has a row twice: export the study again")
    kept = _about(directory / ABOUT)
    conditions = _conditions(config, kept.pop("facts"))
    return StudyResults(**declared(config, text), **tables, conditions=conditions, **kept)


class ExportedCells:
    """The cells whose rows are in exported tables, which have no trained parameters.

    Args:
        directory: Folder of the tables.
        trust: As for `load_results`.

    Raises:
        StoreError: As `load_results`; or the tables do not say which seeds trained together.
        ConfigError: As `load_results`.
    """

    def __init__(self, directory: Path | str, *, trust: bool = False) -> None:
        self._directory, self._results = directory, load_results(directory, trust=trust)
        if self._results.regrouped:
            raise StoreError(
                f"{directory}: the study was extended or cut, and its tables do not say which seeds trained together: "
                "pass the run folder"
            )

    def finished(self, arms: Iterable[Arm]) -> list[Cell]:
        """The cells of these arms that the tables have.

        Raises:
            StoreError: Seeds of a cell are missing, although others are there or all cells are said to be finished.
        """
        cells: list[Cell] = []
        for arm in arms:
            final = self._results.seeds.filter(condition=arm.condition, mechanism=arm.mechanism, role="final")
            needed, more = arm.tuning_cells(), list[Cell]()
            if len(final):
                needed += arm.final_cells(setting_of(final))
                more = arm.confirmation_cells(setting_of(final))
            elif not self._results.unfinished:
                raise StoreError(f"{self._directory}: {arm.condition}, {arm.mechanism}: no final seed is there")
            cells += [cell for cell in needed if self._has(cell, not self._results.unfinished)]
            cells += [cell for cell in more if self._has(cell, False)]
        return cells

    def _has(self, cell: Cell, is_needed: bool) -> bool:
        found = len(self._rows("seeds", cell))
        if found < len(cell.seeds) and (found or is_needed):
            raise StoreError(f"{self._directory}: {cell}: {found} of {len(cell.seeds)} seeds are there")
        return found > 0

    def load(self, cell: Cell) -> CellResult:
        """The result of a cell: its rows, without parameters and time."""
        return CellResult(**{name: self._rows(name, cell) for name in TABLES}, weights={}, seconds=0.0)

    def lacks(self, cell: Cell) -> set[str]:
        """The parts of a `CellResult` that the tables do not have of this cell by itself."""
        examples = self._rows("examples", cell)["example"]
        is_alone = len(examples) > 0 and not examples.is_duplicated().any()  # else rows of several cells are there
        return {"weights"} if is_alone else {"weights", "examples"}

    @property
    def environment(self) -> dict[str, str]:
        """Versions and machine with which the study was run."""
        return self._results.environment

    def _rows(self, name: str, cell: Cell) -> pl.DataFrame:
        table: pl.DataFrame = getattr(self._results, name)
        rows = table.filter(
            condition=cell.condition, mechanism=cell.mechanism, role=cell.role, **cell.setting._asdict()
        )
        if "seed" in rows.columns:
            rows = rows.filter(pl.col("seed").is_in(cell.seeds))
        return rows.select(*TABLES[name])


def about(results: StudyResults) -> str:
    """The text of `ABOUT`."""
    found = {name: getattr(results, name) for name in _ABOUT}
    found["facts"] = {condition.label: condition.facts for condition in results.conditions}
    return json.dumps(found, indent=1, default=plain_number)


def _conditions(config: StudyConfig, facts: dict[str, dict[str, Any]]) -> list[Condition]:
    """The conditions with their facts as they were: of a text, this machine's may be others; older exports had none."""
    bare = config.conditions(lambda *_: {})
    if any(condition.label not in facts for condition in bare):
        return config.conditions()
    return [replace(condition, facts=facts[condition.label]) for condition in bare]


def _about(path: Path) -> dict[str, Any]:
    known = _ABOUT | {"facts": {}}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise StoreError(f"{path} is not JSON: {error}") from None
        if not isinstance(found, dict) or not _describes_a_study(known | found):
            raise StoreError(f"{path} is not what `ea study export` writes; export the study again")
        known |= {name: value for name, value in found.items() if name in known}
    return known


def _describes_a_study(about: dict[str, Any]) -> bool:
    environment, unfinished = about["environment"], about["unfinished"]
    return (
        is_duration(about["seconds"])
        and isinstance(environment, dict)
        and isinstance(unfinished, list)
        and isinstance(about["regrouped"], bool)
        and isinstance(about["facts"], dict)
        and all(isinstance(facts, dict) and is_duration(facts.get("complexity")) for facts in about["facts"].values())
        and all(isinstance(text, str) for text in (*environment.values(), *unfinished))
        and names_threads(environment)
    )


def _table(directory: Path, name: str) -> pl.DataFrame:
    schema = TABLES[name] | _KEYS
    found = read_table(directory, name, schema)
    return pl.DataFrame(schema=schema) if found is None else found


def _wrong_with(seeds: pl.DataFrame) -> str | None:
    """The reason why rows cannot be those of seeds, which a hand may have changed; None: they can."""
    final = seeds.filter(pl.col("role") != "tuning")
    arm = ["condition", "mechanism", "role"]
    for name in (*arm, "learning_rate", "seed", "steps", "solved"):
        if seeds[name].null_count():
            return f"a row has no {name}"
    if not final["accuracy"].fill_null(float("nan")).is_finite().all():
        return "an accuracy is no number"
    if seeds.select(*arm, *Setting._fields, "seed").is_duplicated().any():
        return "a seed is there twice"
    if (final.group_by(arm).agg(pl.col("learning_rate").n_unique())["learning_rate"] > 1).any():
        return "final seeds ran at several learning rates"
    return None


def _strange_to(config: StudyConfig, seeds: pl.DataFrame) -> str | None:
    """The reason why rows cannot be of seeds that a configuration asks for; None: they can."""
    if config.protocol != PROTOCOL:
        return None
    arms = {(arm.condition, arm.mechanism): arm for arm in config.arms()}
    for (condition, mechanism, role), rows in seeds.group_by("condition", "mechanism", "role", maintain_order=True):
        arm = arms.get((str(condition), str(mechanism)))
        if arm is None or role not in get_args(Role):
            return f"config.toml has no {condition}, {mechanism}, {role}"
        if strange := set(rows["seed"]).difference(arm.seeds_of(role)):
            return f"config.toml has no seed {min(strange)} of {condition}, {mechanism}, {role}"
        if strange := set(rows.select(Setting._fields).rows()).difference(arm.training.settings):
            return f"config.toml has no {Setting(*strange.pop())} of {condition}, {mechanism}, {role}"
    return None


def read_table(directory: Path, name: str, schema: Mapping[str, Any]) -> pl.DataFrame | None:
    """A table of an export with all of its columns; those that an older export did not have are null.

    Args:
        directory: Folder of the export.
        name: Name of the table; its file ends with ``.parquet`` or ``.csv``, or there are both.
        schema: Its columns and their types.

    Returns:
        The table; None: there is no such file.

    Raises:
        StoreError: A file is no such table, or there are two, which differ.
    """
    paths = [path for ending in ("parquet", "csv") if (path := directory / f"{name}.{ending}").is_file()]
    tables = [_read(path, schema) for path in paths]
    if not all(table.equals(tables[0]) for table in tables):
        raise StoreError(
            f"{paths[0]} and {paths[1].name} differ: remove the older of the two, or export the study again"
        )
    return tables[0] if tables else None


def _read(path: Path, schema: Mapping[str, Any]) -> pl.DataFrame:
    try:
        if path.suffix == ".parquet":
            found = read_parquet(path)
        else:
            found = pl.read_csv(path, schema_overrides=schema, glob=False)
        missing = [pl.lit(None, kind).alias(column) for column, kind in schema.items() if column not in found.columns]
        return found.with_columns(missing).select(pl.col(name).cast(kind) for name, kind in schema.items())
    except pl.exceptions.PolarsError as error:
        raise StoreError(f"{path} is not a table of a study: {str(error).splitlines()[0]}") from None
