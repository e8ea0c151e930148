"""A study that never ran, with the look of one that did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from expressive_attention.study.config.condition import Condition
from expressive_attention.study.runs.results import StudyResults, collect
from expressive_attention.study.runs.store import Store
from expressive_attention.study.tasks import TASKS
from expressive_attention.study.training.loop import train_cell
from expressive_attention.study.training.result import CURVE_SCHEMA, EXAMPLE_SCHEMA, SEED_SCHEMA, SPLIT_SCHEMA

from .tiny import tiny

KEY_SCHEMA = {"condition": pl.String, "mechanism": pl.String, "learning_rate": pl.Float64}
KEY_SCHEMA |= {"initial_gain": pl.Float64, "role": pl.String}
QUICK = ((4, 5, "rope"), (16, 5, "rope"), (16, 5, "learned"))
LADDER = tuple(
    (basis, delay, position)
    for position in ("rope", "learned")
    for basis, delay in (
        *((2, 5), (2, 10), (4, 5), (4, 10), (8, 5)),
        *((8, 10), (16, 5), (16, 10), (32, 5), (32, 10)),
    )
)
MECHANISMS = ("expressive", "dot_product")
RATES = (5e-3, 1e-2, 2e-2)
STEPS = 2000


def make_condition(basis: int, delay: int, position: str) -> Condition:
    return Condition(
        label=f"sum, basis {basis}, delay {delay}, {position}",
        task={"kind": "nt", "operation": "sum", "basis": basis, "delay": delay},
        model={"layers": 1, "embed_dim": 16, "num_heads": 1, "position": position},
        facts={
            "state_space": basis**delay,
            "complexity": delay * math.log2(basis),
            "cycles": "1, 3, 7, 21" if basis == 2 else "not enumerated",
            "chance": 1 / basis,
            "majority": 1 / basis + 0.004,
            "copy_last": 1 / basis - 0.003,
            "held_out": 0.5,
            "test_sequences": 1024,
            "predictions": 1024,
            "contexts": 1024,
            "fixed_data": False,
        },
        task_label=f"sum, basis {basis}, delay {delay}",
        formula=TASKS["nt"].model_validate({"kind": "nt", "basis": basis, "delay": delay}).formula,
    )


def seed_row(condition: str, mechanism: str, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    """A final seed of which only the accuracy matters; solved from 0.995 on."""
    solved = accuracy >= 0.995
    row = {
        "seed": seed,
        "steps": STEPS,
        "loss": 1 - accuracy,
        "accuracy": accuracy,
        "cross_entropy": 1 - accuracy,
        "validation": accuracy,
        "validation_cross_entropy": 1 - accuracy,
        "solved": solved,
        "steps_to_solve": 1000 if solved else None,
        "rollout_digits": accuracy**5,
        "rollout_exact": accuracy**10,
        "contexts_seen": 0.01,
        "unseen_predictions": 1000,
        "unseen_contexts": 500,
        "diverged_at": None,
        "condition": condition,
        "mechanism": mechanism,
        "learning_rate": 1e-2,
        "initial_gain": 1.0,
        "role": "final",
    }
    return row | changes


def results_of(
    rows: Sequence[dict[str, Any]],
    conditions: Sequence[Condition],
    mechanisms: Sequence[str] = MECHANISMS,
    curves: Sequence[dict[str, Any]] = (),
    **changes: Any,
) -> StudyResults:
    """A study with just these rows."""
    fields: dict[str, Any] = {
        "name": "test",
        "config": 'name = "test"\n',
        "conditions": list(conditions),
        "mechanisms": list(mechanisms),
        "seeds": pl.DataFrame(list(rows), schema=SEED_SCHEMA | KEY_SCHEMA, orient="row"),
        "curves": pl.DataFrame(list(curves), schema=CURVE_SCHEMA | KEY_SCHEMA, orient="row"),
        "splits": pl.DataFrame(schema=SPLIT_SCHEMA | KEY_SCHEMA),
        "examples": pl.DataFrame(schema=EXAMPLE_SCHEMA | KEY_SCHEMA),
        "unfinished": [],
        "claims": [],
        "environment": {"torch": "2.13.0"},
        "seconds": 61.0,
    }
    return StudyResults(**fields | changes)


def make_results(
    grid: Sequence[tuple[int, int, str]] = QUICK,
    mechanisms: Sequence[str] = MECHANISMS,
    seeds: int = 8,
    **changes: Any,
) -> StudyResults:
    """A whole study: EA reliable with RoPE, DPA often stuck there, the reverse with learned positions.

    Args:
        grid: Basis, delay and position of each condition.
        mechanisms: As in `StudyResults`.
        seeds: Final seeds per condition and mechanism.
        **changes: Fields of `StudyResults` to set otherwise.
    """
    rng = np.random.default_rng(0)
    conditions = [make_condition(*point) for point in grid]
    rows, curves = [], []
    for condition in conditions:
        for mechanism in mechanisms:
            for role, rate, seed in [
                *(("tuning", rate, seed) for rate in RATES for seed in range(100, 102)),
                *(("final", _chosen_rate(mechanism), seed) for seed in range(seeds)),
            ]:
                row, curve = _train(condition, mechanism, rate, seed, rng)
                keys = {
                    "condition": condition.label,
                    "mechanism": mechanism,
                    "learning_rate": rate,
                    "initial_gain": 1.0,
                    "role": role,
                }
                rows.append(row | keys)
                curves += [point | keys for point in curve]
    environment = {
        "expressive-attention": "0.1.0",
        "torch": "2.13.0+cpu",
        "python": "3.12.4",
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "processor": "AMD EPYC 7763 64-Core Processor, 2 cores used",
    }
    config = (
        'name = "quick"\n\n[[grid]]\ntask = { basis = [4, 16], delay = 5 }\n'
        '\n[model]\nlayers = 1\nembed_dim = 16\nposition = "rope"\n\n[training]\nsteps = 2000\n'
        "learning_rates = [0.005, 0.01, 0.02]\n"
    )
    whole = {"name": "quick", "config": config, "environment": environment, "seconds": 134.2}
    return results_of(rows, conditions, mechanisms, curves, **whole | changes)


def mixed_results() -> StudyResults:
    """Two conditions with splits: ``"mixed"`` by position and by rule, ``"plain"`` by position alone.

    Seed s of EA is right on ``0.5 + s / 10`` of each group, of DPA on 0.1 less; the best predictor on 0.9.
    """
    conditions = [replace(make_condition(16, 5, "rope"), label="mixed"), make_condition(4, 5, "rope")]
    conditions[1] = replace(conditions[1], label="plain")
    rows, splits = [], []
    for label, names in {"mixed": ("position", "rule"), "plain": ("position",)}.items():
        for mechanism, less in {"expressive": 0.0, "dot_product": 0.1}.items():
            for seed in range(3):
                rows.append(seed_row(label, mechanism, seed, 0.5 + seed / 10 - less))
                keys = {name: rows[-1][name] for name in KEY_SCHEMA} | {"seed": seed}
                splits += [
                    {"split": split, "group": group, "name": f"{split} {group}", "count": 8, "ceiling": 0.9}
                    | {"accuracy": 0.5 + seed / 10 - less}
                    | keys
                    for split in names
                    for group in (3, 4)
                ]
    table = pl.DataFrame(splits, schema=SPLIT_SCHEMA | KEY_SCHEMA, orient="row")
    return results_of(rows, conditions, curves=[
        {"seed": row["seed"], "step": STEPS, "loss": 0.5, "accuracy": row["accuracy"]}
        | {name: row[name] for name in KEY_SCHEMA}
        for row in rows
    ], splits=table)  # fmt: skip


def trained(directory: Path) -> StudyResults:
    """The tiny study, trained: its cells in `directory`, and what they hold."""
    store = Store(directory)
    store.create(tiny(learning_rates="[1e-2]")).release()
    config, _ = store.config()
    for comparison in config.arms():
        for cell in comparison.final_cells(config.training.settings[0]):
            store.save(cell, train_cell(cell))
    return collect(store)


def diverged(store, mechanism, lost):
    """Store the result of a mechanism once more, as if some of its seeds had diverged."""
    arm = next(arm for arm in store.config()[0].arms() if arm.mechanism == mechanism)
    (cell,) = arm.final_cells(arm.training.settings[0])
    result = store.load(cell, weights=True)
    for x in result.weights.values():
        x[lost] = torch.nan
    changed = {"accuracy": 0.0, "cross_entropy": torch.nan, "diverged_at": 10}
    seeds = result.seeds.with_columns(
        pl.when(pl.col("seed").is_in(lost)).then(pl.lit(value, SEED_SCHEMA[name])).otherwise(name).alias(name)
        for name, value in changed.items()
    )
    store.save(cell, replace(result, seeds=seeds))


def _chosen_rate(mechanism: str) -> float:
    return 2e-2 if mechanism == "expressive" else 1e-2


def _train(
    condition: Condition, mechanism: str, rate: float, seed: int, rng: np.random.Generator
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    favoured = (mechanism == "expressive") == (condition.model["position"] == "rope")
    difficulty = condition.facts["complexity"] / 50
    risk = 0.3 * difficulty if favoured else 0.3 + 1.2 * difficulty
    stuck = rng.random() < risk + (rate == RATES[0]) * 0.3
    top = float(rng.uniform(0.4, 0.85) if stuck else rng.uniform(0.996, 1.0))
    middle = float(rng.uniform(400, 1300) if mechanism == "expressive" else rng.uniform(200, 900))
    chance = condition.facts["chance"]
    steps = np.arange(100, STEPS + 1, 100)
    accuracy = chance + (top - chance) / (1 + np.exp(-(steps - middle) / 90))
    accuracy = np.clip(accuracy + rng.normal(0, 0.012 * (1.002 - accuracy)), 0.01, 1)
    solved = accuracy[-1] >= 0.995
    row = {
        "seed": seed,
        "steps": STEPS,
        "loss": float(-np.log(accuracy[-1])),
        "accuracy": float(accuracy[-1]),
        "cross_entropy": float(-np.log(accuracy[-1])),
        "validation": float(accuracy[-1]),
        "validation_cross_entropy": float(-np.log(accuracy[-1])),
        "solved": bool(solved),
        "steps_to_solve": int(steps[np.argmax(accuracy >= 0.995)]) if solved else None,
        "rollout_digits": float(accuracy[-1] ** 5),
        "rollout_exact": float(accuracy[-1] ** 10),
        "contexts_seen": float(np.exp2(-condition.facts["complexity"] / 4)),
        "unseen_predictions": 900,
        "unseen_contexts": 900,
        "diverged_at": None,
    }
    curve = [
        {"seed": seed, "step": int(step), "loss": float(-np.log(value)), "accuracy": float(value)}
        for step, value in zip(steps, accuracy, strict=True)
    ]
    return row, curve
