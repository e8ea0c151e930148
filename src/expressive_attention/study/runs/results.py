"""The results of a study so far, in the form that analysis and report read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from ..config.condition import Condition, Setting
from ..config.declared import PRIMARY_COMPARISONS
from ..config.record import Record
from ..config.study import StudyConfig
from ..training.result import TABLES
from .environment import environment
from .facts import KnownFacts
from .selection import finished_cells, of_another_task
from .store import Store, StoreError

__all__ = ["StudyResults", "collect", "declared", "setting_of"]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that what follows from it can be kept
class StudyResults:
    """All finished cells of a study.

    Attributes:
        name: Name of the study.
        config: The configuration as TOML text.
        conditions: Conditions in the order of the configuration, those without results included.
        mechanisms: Mechanisms that are compared, e.g. ``["expressive", "dot_product"]``.
        seeds: `SEED_SCHEMA` plus ``condition`` (label), ``mechanism``, ``learning_rate``, ``initial_gain`` and
            ``role``: ``"tuning"`` (seeds on which rate and gain were chosen), ``"final"`` (fresh seeds with the
            chosen ones) or ``"confirmation"`` (fresh ones again, where the final ones show an exclusive range). All
            mechanisms' runs of one seed share initial parameters and batches.
        curves: `CURVE_SCHEMA` plus the same five columns.
        splits: `SPLIT_SCHEMA` plus the same five columns.
        examples: `EXAMPLE_SCHEMA` plus the same five columns; only of conditions with fixed data.
        unfinished: One line per cell that has no result yet.
        claims: The claims that the study tests, as `StudyConfig.claims`.
        steps: Steps of every final seed, by the configuration.
        confirmation: Fresh seeds of each mechanism on a candidate for an exclusive range, likewise.
        protocol: Number of the protocol by which it was run.
        family: Number of comparisons over which p is adjusted where the study has fewer; 0: over its own.
        record: The tasks and mechanisms of the study's own files; None: it has none.
        environment: Versions and machine, e.g. ``{"torch": "2.13.0", "processor": "..."}``; where cells differ, all of
            their values: ``"2.12.0, 2.13.0"``.
        seconds: Sum of the cells' training times in seconds.
        regrouped: Whether some seeds trained together with others than the configuration says, as the study had fewer
            or more of them when they ran.
    """

    name: str
    config: str
    conditions: list[Condition]
    mechanisms: list[str]
    seeds: pl.DataFrame
    curves: pl.DataFrame
    splits: pl.DataFrame
    examples: pl.DataFrame
    unfinished: list[str]
    claims: list[str]
    environment: dict[str, str]
    seconds: float
    steps: int = 0
    confirmation: int = 0
    protocol: int = 3
    family: int = 0
    record: Record | None = None
    regrouped: bool = False


_FACTS = "facts.json"


def declared(config: StudyConfig, text: str) -> dict[str, Any]:
    """The attributes of `StudyResults` that a configuration gives, and its text."""
    return {
        "name": config.name,
        "config": text,
        "mechanisms": list(config.mechanisms),
        "claims": list(config.claims),
        "steps": config.training.steps,
        "confirmation": config.seeds.confirmation,
        "protocol": config.protocol,
        "family": PRIMARY_COMPARISONS if config.family == "primary" else 0,
        "record": config.record() if config.has_files else None,
    }


def setting_of(rows: pl.DataFrame) -> Setting:
    """The setting of rows of a table of `StudyResults`, which have the same one."""
    return Setting(*rows.select(Setting._fields).row(0))


def collect(store: Store, *, trust: bool = False) -> StudyResults:
    """All finished cells of a study.

    Args:
        store: The study.
        trust: Run its Python files. Otherwise their tasks and mechanisms are read from its record.

    Raises:
        StoreError: As `Store.config`, or the folder is an export, or a cell is corrupt; the message names the file. Or
            all cells are of other tasks, as those on text are under another Python; the message names the difference.
        ConfigError: Its configuration does not fit.
    """
    store.check_cells()
    config, text = store.config(trust=trust)
    facts = KnownFacts(store.directory / _FACTS)
    conditions = config.conditions(facts.of)
    facts.keep()
    fixed = {condition.label for condition in conditions if condition.facts.get("fixed_data")}
    tables: dict[str, list[pl.DataFrame]] = {name: [] for name in TABLES}
    finished, unfinished = finished_cells(store, config)
    if not finished and (other := of_another_task(store, config)) is not None:
        raise StoreError(f"{store.directory} has finished cells, and none of the study as it is read here: {other}")
    arms = {(arm.condition, arm.mechanism): arm for arm in config.arms()}
    found: dict[str, dict[str, None]] = {}  # the values of each name, in the order of the cells
    seconds = 0.0
    for cell in finished:
        result = store.counted(cell)
        labels = {"condition": cell.condition, "mechanism": cell.mechanism, "role": cell.role}
        columns = [pl.lit(value).alias(name) for name, value in labels.items()]
        columns += [pl.lit(value).alias(name) for name, value in cell.setting._asdict().items()]
        for name, parts in tables.items():
            if name != "examples" or cell.condition in fixed:
                parts.append(getattr(result, name).with_columns(columns))
        seconds += result.seconds
        for name, value in store.about(cell)["environment"].items():
            found.setdefault(name, {})[value] = None
    empty = dict.fromkeys(("condition", "mechanism", "role"), pl.String) | dict.fromkeys(Setting._fields, pl.Float64)
    joined: dict[str, Any] = {
        name: pl.concat(parts) if parts else pl.DataFrame(schema={**TABLES[name], **empty})
        for name, parts in tables.items()
    }
    return StudyResults(
        **declared(config, text),
        **joined,
        conditions=conditions,
        unfinished=unfinished,
        environment={name: ", ".join(values) for name, values in found.items()} or environment(),
        seconds=seconds,
        regrouped=not all(arms[cell.condition, cell.mechanism].makes(cell) for cell in finished),
    )
