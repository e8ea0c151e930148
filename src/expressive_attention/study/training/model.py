"""The models of a cell, untrained and trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...nn import Transformer
from ..config.cells import Cell
from ..config.mechanism_files import ensure
from ..config.schema import ModelConfig
from ..tasks import Task
from ..tasks.rng import stream
from .ensemble import stack

__all__ = ["build_model", "model_arguments", "trained_ensemble", "trained_model"]


def model_arguments(task: Task, model: ModelConfig, mechanism: str) -> dict[str, Any]:
    """The arguments with which `nn.Transformer` makes a model for a task, without the initial gain."""
    base = max(10.0, 2.0 * task.length) if model.rope_base is None else model.rope_base
    return {
        "vocab_size": task.vocab_size,
        "max_length": task.length,
        "embed_dim": model.embed_dim,
        "num_layers": model.layers,
        "num_heads": model.heads,
        "mechanism": mechanism,
        "position": model.position,
        "rope_base": base,
        "norm": model.norm,
        "norm_affine": model.norm_affine,
        "mlp_ratio": model.mlp_ratio,
        "activation": model.activation,
        "gain": model.gain,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "bias": model.bias,
        "embedding_std": model.embedding_std,
        "embedding_shift": model.embedding_shift,
        "input_dim": task.input_dim,
        "is_causal": task.is_causal,
    }


def build_model(task: Task, model: ModelConfig, mechanism: str, seed: int, initial_gain: float = 1.0) -> Transformer:
    """The untrained model of one seed: random numbers depend on task, model and seed, not on the mechanism."""
    built = Transformer(**model_arguments(task, model, mechanism), initial_gain=initial_gain)
    bits = stream(seed, "parameters")
    built.initialize(torch.Generator().manual_seed(int(bits.random_raw()) >> 1))
    return built


def trained_model(cell: Cell, weights: dict[str, Tensor], index: int) -> Transformer:
    """The trained model of the cell's seed number `index`, from the weights of its result."""
    ensure(cell.mechanism_file)
    model = build_model(cell.task, cell.model, cell.function, cell.streams[index])
    model.load_state_dict({name: x[index] for name, x in weights.items()})
    return model


def trained_ensemble(cell: Cell, weights: dict[str, Tensor]) -> nn.Module:
    """The trained models of all seeds of a cell as one module, ``(R, ...)`` each parameter."""
    ensure(cell.mechanism_file)
    whole = stack([build_model(cell.task, cell.model, cell.function, seed) for seed in cell.streams])
    whole.load_state_dict(weights)
    return whole
