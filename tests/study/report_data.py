"""A study that never ran, with the look of one that did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from expressive_attention.study.results import CURVE_SCHEMA, SEED_SCHEMA, SPLIT_SCHEMA, Condition, StudyResults

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
        },
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
        "solved": solved,
        "steps_to_solve": 1000 if solved else None,
        "rollout_digits": accuracy**5,
        "rollout_exact": accuracy**10,
        "contexts_seen": 0.01,
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
        "unfinished": [],
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
        "solved": bool(solved),
        "steps_to_solve": int(steps[np.argmax(accuracy >= 0.995)]) if solved else None,
        "rollout_digits": float(accuracy[-1] ** 5),
        "rollout_exact": float(accuracy[-1] ** 10),
        "contexts_seen": float(np.exp2(-condition.facts["complexity"] / 4)),
        "diverged_at": None,
    }
    curve = [
        {"seed": seed, "step": int(step), "loss": float(-np.log(value)), "accuracy": float(value)}
        for step, value in zip(steps, accuracy, strict=True)
    ]
    return row, curve
