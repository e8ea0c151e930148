"""Attention weights of the worst and the best seed of trained models, computed from stored parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from ...nn import SelfAttention, attend
from ..analysis.summaries import evidence
from ..analysis.trained import cells_by_seed, finite_seeds, trained
from ..analysis.wording import mechanism_name
from ..config.cells import Cell
from ..config.condition import Condition
from ..config.record import RecordedTask
from ..runs.results import StudyResults
from ..runs.store import Store

__all__ = ["AttentionMap", "attention_maps", "attention_weights", "captured_weights"]

_EXAMPLES = 32


@dataclass(frozen=True)
class AttentionMap:
    """Attention weights of one layer of one trained model.

    Attributes:
        condition: Label of the condition.
        mechanism: The mechanism, as in the configuration.
        seed: Its final seed.
        rank: ``"worst"`` or ``"best"``: the seed's place by accuracy among the mechanism's that did not diverge.
        accuracy: Its test accuracy.
        layer: Number of the layer, from 0.
        weights: Row i holds the weights of query i ``(L, L)``, mean over heads and validation examples.
    """

    condition: str
    mechanism: str
    seed: int
    rank: str
    accuracy: float
    layer: int
    weights: Tensor

    @property
    def title(self) -> tuple[str, str]:
        """Two lines of words."""
        name = f"{mechanism_name(self.mechanism)}, {self.rank} seed: {self.seed}"
        return name, f"accuracy {self.accuracy:.3f}, layer {self.layer + 1}"


@torch.no_grad()
def attention_weights(module: SelfAttention, x: Tensor) -> Tensor:
    """The weights ``(..., H, L, L)`` with which the module attends to its input ``(..., L, D)``.

    Attention to the rows of the identity returns the weights themselves, whatever the mechanism: sum_j a_ij e_j = a_i.

    Args:
        module: The attention of one layer.
        x: Its input ``(..., L, D)``.
    """
    length = x.shape[-2]
    q, k, _ = module.heads(x)
    identity = torch.eye(length, dtype=q.dtype, device=q.device).expand(*q.shape[:-1], length).contiguous()
    return attend(module.mechanism, q, k, identity, module.position_bias(x), 0.0, module.is_causal)


@torch.no_grad()
def captured_weights(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Weights ``(..., H, L, L)`` of every attention of a model, in the order in which it runs them.

    Args:
        model: A model with modules of class `SelfAttention`.
        inputs: Input of the model.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, SelfAttention)
        found.append(attention_weights(module, args[0]))

    hooks = [module.register_forward_pre_hook(keep) for module in model.modules() if isinstance(module, SelfAttention)]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def attention_maps(
    results: StudyResults, store: Store, conditions: Sequence[Condition], *, trust: bool = False
) -> list[AttentionMap]:
    """Maps of the worst and the best final seed of each mechanism that did not diverge, by the order of conditions.

    Args:
        results: Results of the study.
        store: Its folder; mechanisms whose final cells are not in it have no maps.
        conditions: Conditions to look at.
        trust: Run the study's Python files; without, tasks and mechanisms that they define have no maps.

    Raises:
        CorruptCellError: Stored parameters are not what was written; the message names the file.
    """
    if not store.cells.is_dir():
        return []
    wanted = [condition.label for condition in conditions]
    config, _ = store.config(trust=trust)
    found: list[AttentionMap] = []
    for arm in config.arms():
        rows = evidence(results.seeds, arm.condition, arm.mechanism)
        needs_files = isinstance(arm.task, RecordedTask) or arm.mechanism_file is not None
        if arm.condition not in wanted or rows.is_empty() or (needs_files and not trust):
            continue
        cells = cells_by_seed(results, store, arm)
        shown = set(cells).intersection(finite_seeds(rows))
        ranked = rows.filter(pl.col("seed").is_in(list(shown))).sort("accuracy", "seed")
        ends = {"worst": 0, "best": -1} if ranked.height > 1 else {"best": -1} if ranked.height else {}
        for rank, place in ends.items():
            seed, accuracy = ranked.select("seed", "accuracy").row(place)
            found += [
                AttentionMap(arm.condition, arm.mechanism, seed, rank, accuracy, layer, weights)
                for layer, weights in enumerate(_mean_weights(store, cells[seed], seed))
            ]
    return sorted(found, key=lambda each: wanted.index(each.condition))


def _mean_weights(store: Store, cell: Cell, seed: int) -> list[Tensor]:
    """Weights ``(L, L)`` per layer, mean over heads and validation examples."""
    model = trained(store, cell, seed)
    examples = cell.task.held_out_examples(_EXAMPLES, "validation")
    weights = captured_weights(model, torch.from_numpy(examples.inputs))
    return [layer.flatten(0, -3).mean(0) for layer in weights]
