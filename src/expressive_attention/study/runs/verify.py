"""Run finished cells again, and compare their results with the stored ones."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from ..config.cells import Cell
from ..config.schema import PROTOCOL
from ..training.devices import CPU
from ..training.loop import train_cell
from ..training.result import ROW_KEYS, CellResult
from .environment import environment, threads_of
from .exported import ExportedCells
from .selection import finished_cells
from .store import Store, StoreError

__all__ = ["Kept", "Recheck", "sample_cells", "verify_cell"]

Kept = Store | ExportedCells  # where results are: with weights, or as tables alone


@dataclass(frozen=True)
class Recheck:
    """A cell that was run again.

    Attributes:
        differences: The differences and their sizes, one phrase each; none: all that was kept is the same.
        circumstances: Changes since the cell ran first: versions, processor, threads, device.
        seconds: Time of the second training.
    """

    differences: tuple[str, ...]
    circumstances: tuple[str, ...]
    seconds: float


def sample_cells(directory: Path | str, count: int, seed: int, *, trust: bool = False) -> tuple[Kept, list[Cell]]:
    """Up to `count` finished cells of a study, drawn at random, and where their results are.

    Args:
        directory: Folder of the study, or of its exported tables.
        count: Largest number of cells.
        seed: Random seed of the choice.
        trust: Run the study's Python files, which a study that has any needs.

    Raises:
        StoreError: The folder is not a study, has no finished cell, is of another protocol than this version runs, or
            has Python files and is not trusted.
        ConfigError: Its configuration does not fit.
    """
    store = Store(directory)
    config, _ = store.config(trust=trust)
    if config.protocol != PROTOCOL:
        raise StoreError(
            f"{directory} is of protocol {config.protocol}: this version trains by protocol {PROTOCOL}, and would find "
            "something else"
        )
    if config.has_files and not trust:
        copied = "; copy them from the run folder beside config.toml" if store.is_exported else ""
        raise StoreError(f"{directory} has tasks or mechanisms in Python files, which --trust runs{copied}")
    kept: Kept
    if store.is_exported:
        kept = ExportedCells(directory, trust=trust)
        cells = kept.finished(config.arms())
    else:
        kept, (cells, _) = store, finished_cells(store, config)
    if not cells:
        raise StoreError(f"{directory}: no cell is finished yet")
    return kept, random.Random(seed).sample(cells, min(count, len(cells)))


def verify_cell(cell: Cell, kept: Kept, device: torch.device = CPU) -> Recheck:
    """Train a finished cell again with as many threads as it had, one if that was not kept.

    Args:
        cell: The cell.
        kept: Where its result is.
        device: Device to train on.

    Raises:
        CorruptCellError: The stored result cannot be read; the message names the file.
    """
    if isinstance(kept, ExportedCells):
        result, then, lacks = kept.load(cell), kept.environment, kept.lacks(cell)
    else:
        result, then, lacks = kept.load(cell, weights=True), kept.about(cell)["environment"], ()
    with threads_of(then):
        again, now = train_cell(cell, device=device), environment(device)
    circumstances = [
        f"{name} {then.get(name, 'unknown')}, now {now.get(name, 'unknown')}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
    return Recheck(tuple(compare(result, again, lacks)), tuple(circumstances), again.seconds)


def compare(kept: CellResult, again: CellResult, lacks: Collection[str] = ()) -> list[str]:
    """Differences between two results of a cell, and their sizes; NaN equals NaN. Parts in `lacks` are left out."""
    differences = []
    for table, keys in ROW_KEYS.items():
        if table in lacks:
            continue
        before, after = getattr(kept, table), getattr(again, table)
        if not before.sort(keys).equals(after.sort(keys)):
            differences.append(f"{table}: {_table_difference(before, after, keys)}")
    if "weights" in lacks:
        return differences
    if kept.weights.keys() != again.weights.keys():
        names = sorted(kept.weights.keys() ^ again.weights.keys())
        differences.append(f"weights: only one of the two has {', '.join(names)}")
    else:
        pairs = [(before, again.weights[name]) for name, before in kept.weights.items()]
        if any(before.shape != after.shape for before, after in pairs):
            differences.append("weights: other shapes")
        elif not all(_same_bits(before, after) for before, after in pairs):
            largest = max(_largest(before, after) for before, after in pairs)
            differences.append(f"weights: by up to {largest:.2g}")
    return differences


def _table_difference(before: pl.DataFrame, after: pl.DataFrame, keys: list[str]) -> str:
    joined = before.join(after, on=keys, suffix="_again", validate="1:1")
    changed = [name for name in before.columns if name not in keys and not _same(joined, name)]
    found = [
        name if before[name].dtype == pl.String else f"{name} by up to {_largest(*_tensors(joined, name)):.2g}"
        for name in changed
    ]
    if (alone := max(len(before), len(after)) - len(joined)) > 0:
        found.append(f"{alone} {'row' if alone == 1 else 'rows'} in one alone")
    return ", ".join(found)


def _same(joined: pl.DataFrame, name: str) -> bool:
    return joined[name].equals(joined[f"{name}_again"])


def _tensors(joined: pl.DataFrame, measure: str) -> tuple[Tensor, Tensor]:
    columns = (joined[name].cast(pl.Float64).fill_null(torch.nan) for name in (measure, f"{measure}_again"))
    before, after = (column.to_numpy(writable=True) for column in columns)
    return torch.from_numpy(before), torch.from_numpy(after)


def _same_bits(before: Tensor, after: Tensor) -> bool:
    return torch.equal(before.contiguous().view(torch.uint8), after.contiguous().view(torch.uint8))


def _largest(before: Tensor, after: Tensor) -> float:
    """The largest difference; infinite where one of the two alone is NaN."""
    both = before.isnan() & after.isnan()
    difference = torch.where(both | (before == after), 0.0, (before - after).abs()).nan_to_num(nan=torch.inf)
    return float(difference.max()) if difference.numel() else 0.0
