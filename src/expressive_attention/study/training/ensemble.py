"""Many models of one shape as one module, ensemble dimension first.

Members never meet: every operation acts on each of them alone. Input and output carry the ensemble dimension,
``(R, batch, ...)``; parameters keep their names and gain a first dimension R.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import HeadGain, LearnedAlibi, RelativeBias
from ...nn.positions import distance_bias, distance_index

__all__ = ["member_state", "stack"]


class _Linear(nn.Module):
    """`torch.nn.Linear` per member: x ``(R, ..., in)`` to ``(R, ..., out)``."""

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _stacked([m.weight for m in members])
        self.bias = None if members[0].bias is None else _stacked([m.bias for m in members])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1, -2)
        if self.bias is None:
            y = torch.bmm(flat, self.weight.mT)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), flat, self.weight.mT)
        return y.view(*x.shape[:-1], -1)


class _Embedding(nn.Module):
    """`torch.nn.Embedding` per member: index ``(R, ...)`` to ``(R, ..., D)``.

    An index of one dimension ``(L,)``, as of positions, is shared: ``(R, 1, L, D)``.
    """

    def __init__(self, members: Sequence[nn.Embedding]) -> None:
        super().__init__()
        self.num_embeddings = members[0].num_embeddings
        self.weight = _stacked([m.weight for m in members])

    def forward(self, index: Tensor) -> Tensor:
        if index.ndim == 1:
            return self.weight[:, index].unsqueeze(1)
        first = torch.arange(len(self.weight), device=index.device) * self.num_embeddings
        return F.embedding(index + first.view(-1, *(1,) * (index.ndim - 1)), self.weight.flatten(0, 1))


class _LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over the last dimension, per member."""

    def __init__(self, members: Sequence[nn.LayerNorm]) -> None:
        super().__init__()
        self.normalized_shape, self.eps = members[0].normalized_shape, members[0].eps
        affine = members[0].elementwise_affine
        self.weight = _stacked([m.weight for m in members]) if affine else None
        self.bias = _stacked([m.bias for m in members]) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        if self.weight is None or self.bias is None:
            return y
        ones = (1,) * (x.ndim - 2)
        return y * self.weight.view(len(x), *ones, -1) + self.bias.view(len(x), *ones, -1)


class _HeadGain(nn.Module):
    """`HeadGain` per member: x ``(R, ..., H, L, E)``."""

    def __init__(self, members: Sequence[HeadGain]) -> None:
        super().__init__()
        self.weight = _stacked([m.weight for m in members])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(len(x), *(1,) * (x.ndim - 4), -1, 1, 1)


class _RelativeBias(nn.Module):
    """`RelativeBias` per member: ``(R, 1, H, L, S)``."""

    def __init__(self, members: Sequence[RelativeBias]) -> None:
        super().__init__()
        self.max_length = members[0].max_length
        self.table = _stacked([m.table for m in members])

    def forward(self, queries: int, keys: int) -> Tensor:
        return self.table[:, None, :, distance_index(queries, keys, self.max_length, self.table.device)]


class _LearnedAlibi(nn.Module):
    """`LearnedAlibi` per member: slopes ``(R, 1, H)``, masks ``(R, 1, H, L, S)`` or ``(R, 1, H, 1, S)``."""

    def __init__(self, members: Sequence[LearnedAlibi]) -> None:
        super().__init__()
        self.log_slopes = _stacked([m.log_slopes for m in members])

    def forward(self, queries: int, keys: int, *, is_causal: bool = False) -> Tensor:
        return distance_bias(self.slopes(), queries, keys, is_causal=is_causal)

    def slopes(self) -> Tensor:
        return self.log_slopes.exp().unsqueeze(1)


_STACKED = {
    nn.Linear: _Linear,
    nn.Embedding: _Embedding,
    nn.LayerNorm: _LayerNorm,
    HeadGain: _HeadGain,
    RelativeBias: _RelativeBias,
    LearnedAlibi: _LearnedAlibi,
}


def stack(members: Sequence[nn.Module]) -> nn.Module:
    """One module that runs all `members`, which differ in their parameters alone.

    Raises:
        ValueError: Without members.
        TypeError: For a module with parameters of its own that no class here stacks.
    """
    if not members:
        raise ValueError("members must hold at least one module, got none")
    first = members[0]
    if type(first) in _STACKED:
        return _STACKED[type(first)](members)
    if next(first.parameters(recurse=False), None) is not None:
        raise TypeError(f"{type(first).__name__} has parameters and cannot be stacked")
    whole = copy.deepcopy(first)
    for name, _ in first.named_children():
        whole._modules[name] = stack([cast(nn.Module, m._modules[name]) for m in members])
    return whole


def member_state(ensemble: nn.Module, index: int) -> dict[str, Tensor]:
    """The state dict of one member, for the module that was stacked."""
    return {name: x[index].detach().clone() for name, x in ensemble.named_parameters()}


def _stacked(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([x.detach() for x in parameters]))
