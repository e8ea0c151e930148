"""Results from the tables that `ea study export` has written, where the cells themselves are elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from ..config.condition import Setting
from ..config.declared import PRIMARY_COMPARISONS
from ..files import read_parquet
from ..training.result import TABLES
from .results import StudyResults, collect
from .store import Store, StoreError

__all__ = ["ABOUT", "about", "load_results"]

ABOUT = "about.json"  # beside the tables: what these do not say
_KEYS = dict.fromkeys(("condition", "mechanism", "role"), pl.String) | dict.fromkeys(Setting._fields, pl.Float64)


def load_results(directory: Path, *, trust: bool = False) -> StudyResults:
    """The results of a study from its folder, or from a folder of tables that were exported as CSV or parquet.

    Args:
        directory: The folder.
        trust: As for `collect`; tables that were exported need it only where their record is missing.

    Raises:
        StoreError: The folder is neither; the message says what is missing.
        ConfigError: Its configuration does not fit.
    """
    store = Store(directory)
    if store.cells.is_dir() or _file(directory, "seeds") is None:
        return collect(store, trust=trust)
    if not (directory / "config.toml").is_file():
        raise StoreError(
            f"{directory} has exported tables and no config.toml, which says what was run: pass the run folder, e.g. "
            "runs/quick, or export it again"
        )
    config, text = store.config(trust=trust)
    return StudyResults(
        name=config.name, config=text, conditions=config.conditions(), mechanisms=list(config.mechanisms),
        **{name: _read(directory, name) for name in TABLES}, claims=list(config.claims), protocol=config.protocol,
        family=PRIMARY_COMPARISONS if config.family == "primary" else 0,
        record=config.record() if config.has_files else None, **_about(directory / ABOUT),
    )  # fmt: skip


def about(results: StudyResults) -> dict[str, Any]:
    """The content of `ABOUT`."""
    return {name: getattr(results, name) for name in ("environment", "seconds", "unfinished")}


def _about(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = {"environment": {}, "seconds": 0.0, "unfinished": []}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} is not JSON: {error}") from None
        if not isinstance(found, dict) or any(
            not isinstance(found.get(name, value), (int, float) if name == "seconds" else type(value))
            for name, value in known.items()
        ):
            raise StoreError(f"{path} is not what `ea study export` writes; export the study again")
        known |= {name: value for name, value in found.items() if name in known}
    return known


def _file(directory: Path, name: str) -> Path | None:
    return next((path for end in ("parquet", "csv") if (path := directory / f"{name}.{end}").is_file()), None)


def _read(directory: Path, name: str) -> pl.DataFrame:
    """A table with all of its columns; those that an older export did not have are null."""
    schema = TABLES[name] | _KEYS
    path = _file(directory, name)
    if path is None:
        return pl.DataFrame(schema=schema)
    try:
        found = read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, schema_overrides=schema)
        missing = [pl.lit(None, kind).alias(column) for column, kind in schema.items() if column not in found.columns]
        return found.with_columns(missing).select(pl.col(name).cast(kind) for name, kind in schema.items())
    except pl.exceptions.PolarsError as error:
        raise StoreError(f"{path} is not a table of a study: {str(error).splitlines()[0]}") from None
