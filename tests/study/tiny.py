"""Cells and studies so small that they train in a second."""

from __future__ import annotations

from pathlib import Path

from expressive_attention.study.config.cells import Cell
from expressive_attention.study.config.load import parse_config
from expressive_attention.study.config.schema import ModelConfig, TrainingConfig
from expressive_attention.study.config.study import StudyConfig
from expressive_attention.study.tasks.recurrences.nt import NTTask

TINY = """
name = "tiny"
mechanisms = ["expressive", "dot_product"]
[model]
embed_dim = 8
[training]
steps = 30
batch_size = 8
learning_rates = [1e-2, 2e-2]
warmup = 5
evaluate_every = 10
validation_sequences = 16
test_sequences = 16
rollouts = 8
rollout_digits = 4
[seeds]
tuning = 1
final = 2
together = 2
[[grid]]
task = { basis = 4, delay = 2 }
"""


def tiny(**replaced: str) -> str:
    """The text of the tiny study with some of its text replaced."""
    text = TINY
    for old, new in replaced.items():
        assert old in text
        text = text.replace(f"{old} = ", f"{old} = {new}  # ")
    return text


def tiny_config(**replaced: str) -> StudyConfig:
    return parse_config(tiny(**replaced), "tiny")


def written(directory: Path, **replaced: str) -> Path:
    path = directory / "tiny.toml"
    path.write_text(tiny(**replaced))
    return path


def cell(mechanism="expressive", seeds=(0, 1), model=None, task=None, rate=1e-2, **training) -> Cell:
    defaults = {"steps": 30, "batch_size": 8, "warmup": 5, "evaluate_every": 10, "validation_sequences": 32}
    defaults |= {"test_sequences": 32, "rollouts": 8, "rollout_digits": 4}
    return Cell(
        condition="a condition",
        task=task or NTTask(basis=4, delay=2),
        model=ModelConfig(**{"embed_dim": 8, **(model or {})}),
        mechanism=mechanism,
        learning_rate=rate,
        role="final",
        seeds=seeds,
        training=TrainingConfig(**{**defaults, **training}),
    )
