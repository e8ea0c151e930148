"""The limit of small scores: how close trained EA models are to it, and how they change when z^2 replaces f.

f(z) = z^2 / (1 + z^2) is z^2 where scores are small, and z^2 runs in linear time (docs/operator.md). All is measured on
validation sequences: test sequences are touched once, by the training of final seeds.

DIR/limit/<identity>.seeds.parquet, .heads.parquet    of one finished cell, written once
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from ...nn import SelfAttention
from ..config.cells import Cell
from ..config.record import RecordedTask
from ..files import parquet, read_parquet, write_atomically
from ..runs.environment import threads_of
from ..runs.exported import read_table
from ..runs.results import StudyResults
from ..runs.store import Store, StoreError
from ..training.evaluation import Prepared, score
from ..training.loop import train_further
from ..training.model import trained_ensemble
from ..words import plural
from .summaries import evidence
from .trained import cells_by_seed

__all__ = [
    "HEAD_SCHEMA",
    "LIMIT_SCHEMA",
    "SHARE",
    "limit_cells",
    "limit_of",
    "limit_sentences",
    "limit_tables",
    "not_measured",
    "write_limit",
]

# The training after the replacement is so long a part of the first one, and starts at so small a part of its rate.
SHARE, _RATE = 0.05, 0.1

# The quantiles of |z| that are kept of each head.
_QUANTILES = {"z_10": 0.1, "z_50": 0.5, "z_90": 0.9, "z_99": 0.99, "z_max": 1.0}

# Scores of about so many pairs of query and key are looked at per seed and head.
_PAIRS = 1 << 16

_MODELS = ("expressive", "squared", "expressive_trained", "squared_trained")

# One row per final seed of EA, on validation sequences. "expressive" is the model as it was trained, "squared" the same
# with z^2 in the place of f; "..._trained" is each of the two after `steps` further steps.
LIMIT_SCHEMA: dict[str, Any] = {
    "seed": pl.Int64,
    "steps": pl.Int64,
    **{f"{model}_{measure}": pl.Float64 for model in _MODELS for measure in ("accuracy", "cross_entropy")},
}

# One row per final seed, layer and head of EA: quantiles of |z| over the pairs of query and key that see each other.
HEAD_SCHEMA: dict[str, Any] = {
    "seed": pl.Int64,
    "layer": pl.Int64,  # from 0
    "head": pl.Int64,  # from 0
    **dict.fromkeys(_QUANTILES, pl.Float64),
}

# Further columns of the tables of a study, of z^2 trained from the start on the same seed: `squared_from_start_...`.
_FROM_START = {"validation": "accuracy", "validation_cross_entropy": "cross_entropy"}

# The columns of both tables of a study.
_EXPORTED = {
    "limit": {"condition": pl.String, **LIMIT_SCHEMA}
    | {f"squared_from_start_{measure}": pl.Float64 for measure in _FROM_START.values()},
    "limit_heads": {"condition": pl.String, **HEAD_SCHEMA},
}


def limit_cells(results: StudyResults, store: Store, *, trust: bool = False) -> list[Cell]:
    """The finished cells with final seeds of EA, ready to be measured.

    Raises:
        StoreError: Tasks are in Python files that are not trusted, or there is no such cell.
    """
    cells = _cells(results, store, trust=trust)
    for cell in cells:
        if isinstance(cell.task, RecordedTask):
            raise StoreError(
                f"{store.directory}: the task of {cell.condition!r} is in a Python file, which --trust runs"
            )
    if not cells:
        raise StoreError(f"{store.directory} has no finished cell with final seeds of EA")
    return cells


def write_limit(
    cell: Cell, store: Store, share: float = SHARE, note: Callable[[str], object] | None = None
) -> pl.DataFrame:
    """Measure a cell and keep the result in the folder of the study, unless it is there already; its table of seeds.

    It takes as many threads as the training of the cell: small models are slower with more.

    Args:
        cell: A finished cell of EA.
        store: Where the study is kept.
        share: Steps of the training after the replacement, as a share of those of the cell.
        note: Is told of a damaged result, which is measured again.

    Raises:
        CorruptCellError: The cell is not what was written; the message names the file.
        StoreError: The result cannot be kept.
    """
    steps = max(1, round(share * cell.training.steps))
    try:
        kept = _read(_paths(store, cell))
    except _DamagedError as error:
        kept = None
        if note is not None:
            note(f"{error}; it is measured again")
    if kept is None or (kept[0]["steps"] != steps).any():
        _make_writable(store.directory / "limit")
        with threads_of(store.about(cell)["environment"]):
            kept = limit_of(cell, store.load(cell, weights=True).weights, steps)
        for path, table in zip(_paths(store, cell)[::-1], kept[::-1], strict=True):  # seeds last: then it is whole
            write_atomically(path, parquet(table))
    return kept[0]


def limit_of(cell: Cell, weights: dict[str, Tensor], steps: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Measures of the seeds, `LIMIT_SCHEMA`, and of their heads, `HEAD_SCHEMA`.

    Args:
        cell: A cell of EA.
        weights: Its trained parameters, ``(R, ...)`` each.
        steps: How long EA and z^2 are trained after the replacement.
    """
    examples = cell.task.held_out_examples(cell.training.validation_sequences, "validation")
    validation = Prepared.of(cell.task, examples)
    rows: list[dict[str, Any]] = [{"seed": seed, "steps": steps} for seed in cell.seeds]
    heads: list[pl.DataFrame] = []
    for mechanism in ("expressive", "squared"):
        model = trained_ensemble(cell, weights)
        for module in _attentions(model):
            module.mechanism = mechanism
        if mechanism == "expressive":
            heads = _heads(cell, model, validation.inputs)
        for name in (mechanism, f"{mechanism}_trained"):
            if name != mechanism:
                train_further(cell, model, steps, _RATE * cell.setting.learning_rate)
            scores = score(model, validation, len(cell.seeds))
            for row, accuracy, loss in zip(rows, scores.accuracy.tolist(), scores.cross_entropy.tolist(), strict=True):
                row |= {f"{name}_accuracy": accuracy, f"{name}_cross_entropy": loss}
    return pl.DataFrame(rows, schema=LIMIT_SCHEMA), pl.concat(heads)


def limit_tables(results: StudyResults, store: Store, *, trust: bool = False) -> dict[str, pl.DataFrame]:
    """All that `write_limit` has kept of a study, or its export: ``limit`` and ``limit_heads``; empty without any.

    Both have the column ``condition``. ``limit`` has ``squared_from_start_accuracy`` and ``..._cross_entropy``, of
    the study's mechanism ``"squared"`` on the same seed, null where it has none. `trust` is that of `collect`.

    Raises:
        StoreError: A file is damaged; the message names it.
    """
    if store.is_exported:
        read = {name: read_table(store.directory, name, schema) for name, schema in _EXPORTED.items()}
        return {name: table for name, table in read.items() if table is not None}
    if not (store.directory / "limit").is_dir():
        return {}
    tables: dict[str, list[pl.DataFrame]] = {"limit": [], "limit_heads": []}
    for cell in _cells(results, store, trust=trust):
        try:
            kept = _read(_paths(store, cell))
        except _DamagedError as error:
            raise StoreError(f"{error}; `ea study limit {store.directory}` measures it again") from None
        if kept is None:
            continue
        counts = pl.col("seed").is_in(cell.counted)
        columns = ["seed", *_FROM_START]
        start = evidence(results.seeds, cell.condition, "squared").select(columns)
        names = {column: f"squared_from_start_{measure}" for column, measure in _FROM_START.items()}
        seeds = kept[0].join(start.rename(names), on="seed", how="left")
        for parts, table in zip(tables.values(), (seeds, kept[1]), strict=True):
            parts.append(table.filter(counts).select(pl.lit(cell.condition).alias("condition"), pl.all()))
    return {name: pl.concat(parts) for name, parts in tables.items() if parts}


def not_measured(results: StudyResults, tables: Mapping[str, pl.DataFrame]) -> list[str]:
    """The conditions with final seeds of EA that `limit_tables` lacks, where it has others."""
    if not tables:
        return []
    final = results.seeds.filter(role="final", mechanism="expressive")["condition"].unique(maintain_order=True)
    return [label for label in final if label not in set(tables["limit"]["condition"])]


def limit_sentences(results: StudyResults, tables: Mapping[str, pl.DataFrame]) -> list[str]:
    """Sentences on each condition in `limit_tables`: means over seeds, and the largest value of all heads."""
    sentences = []
    for condition in results.conditions:
        seeds, heads = (table.filter(condition=condition.label) for table in tables.values())
        if seeds.is_empty():
            continue

        def reached(model: str, seeds: pl.DataFrame = seeds) -> str:
            losses = seeds[f"{model}_cross_entropy"].drop_nulls()
            lost = len(losses) - int(losses.is_finite().sum())
            diverged = f"{lost} of {plural(len(losses), 'seed')} diverged"
            return f"{seeds[f'{model}_accuracy'].mean():.4f} ({diverged if lost else f'{losses.mean():.4f} nats'})"

        finite = heads.filter(pl.col("z_max").is_finite())
        small = "no score is finite"
        if len(finite):
            small = (
                f"99% of |z| are below {finite['z_99'].median():.2g} in half of the heads and below "
                f"{finite['z_99'].max():.2g} in all, the largest is {finite['z_max'].max():.2g}"
            )
        if 0 < len(finite) < len(heads):
            small += f", without {len(heads) - len(finite)} of {len(heads)} heads, whose scores are not finite"
        from_start = seeds["squared_from_start_accuracy"].null_count() < len(seeds)
        start = f"; z² from the start {reached('squared_from_start')}" if from_start else ""
        sentences.append(
            f"{condition.label}: {small}. Accuracy with f {reached('expressive')}, with z² in its place "
            f"{reached('squared')}; after {seeds['steps'][0]} further steps {reached('expressive_trained')} and "
            f"{reached('squared_trained')}{start}."
        )
    return sentences


def _cells(results: StudyResults, store: Store, *, trust: bool = False) -> list[Cell]:
    config, _ = store.config(trust=trust)
    found: dict[str, Cell] = {}
    for arm in config.arms():
        if arm.mechanism == "expressive":
            found |= {cell.identity: cell for cell in cells_by_seed(results, store, arm).values()}
    return list(found.values())


def _paths(store: Store, cell: Cell) -> list[Path]:
    return [store.directory / "limit" / f"{cell.identity}.{table}.parquet" for table in ("seeds", "heads")]


def _make_writable(folder: Path) -> None:
    """Make the folder, and a file in it for a moment.

    Raises:
        StoreError: It cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}") from None


class _DamagedError(ValueError):
    """A file of a measured cell that cannot be used; the message names it."""


def _read(paths: list[Path]) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """The two tables of a cell; None where they are not there, or were not written to the end.

    Raises:
        _DamagedError: One is not what this version writes.
    """
    if not paths[0].exists():  # it is written last
        return None
    tables = []
    for path, schema in zip(paths, (LIMIT_SCHEMA, HEAD_SCHEMA), strict=True):
        try:
            tables.append(read_parquet(path))
        except FileNotFoundError:
            raise _DamagedError(f"{path} is missing") from None
        except pl.exceptions.PolarsError as error:
            raise _DamagedError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        if dict(tables[-1].schema) != schema:
            raise _DamagedError(f"{path} has other columns than this version writes")
    return tables[0], tables[1]


def _attentions(model: nn.Module) -> Iterator[SelfAttention]:
    """The attention of each layer, the first one first."""
    return (module for module in model.modules() if isinstance(module, SelfAttention))


@torch.no_grad()
def _heads(cell: Cell, model: nn.Module, inputs: Tensor) -> list[pl.DataFrame]:
    """Quantiles of |z| of each layer, over the first of the inputs ``(n, L)``."""
    length, seeds = cell.task.length, len(cell.seeds)
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if cell.task.is_causal else seen
    read = inputs[: max(1, _PAIRS // int(seen.sum()))]
    found: list[np.ndarray] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, SelfAttention)
        q, k, _ = module.heads(args[0])  # (R, n, H, L, E)
        z = (q @ k.mT * q.shape[-1] ** -0.5).abs()[..., seen]
        found.append(np.quantile(z.transpose(1, 2).flatten(2).numpy(), list(_QUANTILES.values()), axis=-1))

    hooks = [module.register_forward_pre_hook(keep) for module in _attentions(model)]
    try:
        model(read.expand(seeds, *read.shape))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        pl.DataFrame(
            [
                {"seed": seed, "layer": layer, "head": head}
                | dict(zip(_QUANTILES, quantiles[:, index, head].tolist(), strict=True))
                for index, seed in enumerate(cell.seeds)
                for head in range(quantiles.shape[2])
            ],
            schema=HEAD_SCHEMA,
        )
        for layer, quantiles in enumerate(found)
    ]
