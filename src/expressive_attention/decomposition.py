"""The operator in plain operators of torch, for exporters that know no others: ONNX, AOTInductor.

Integrations import this module, which tells torch of the decomposition: `torch.onnx.export(dynamo=True)` takes it by
itself. Others are given `decompositions()`. The matrix of weights is in memory, as in every export to plain operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from . import ops as ops  # which defines the operator
from .backends import reference
from .backends.dropout import kept_weights
from .call import accumulation_dtype, lower_whole
from .forms import weight as weight_of
from .schema import unflatten

__all__ = ["decompositions"]

_ATTENTION: Any = torch.ops.expressive_attention.attention.default

# Beyond it, f(z) is 1 and its square is finite in float32.
_SATURATED = 1e18

# How far above the largest bias that counts that of a key with score 0 may lie.
_LARGEST_EXCESS = 40.0


@register_decomposition(_ATTENTION)
def _attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalizer and largest biases, as `backends.reference` has them, to within rounding.

    With m_i the largest |z_ij| that query i sees, at most 1 for the form "expressive", weights are computed as
    (z / m)^2 / (1 + z^2), which a row of small scores does not underflow. All arithmetic is on finite numbers, as in
    the reference: rows that see others are made NaN in the end.
    """
    call = lower_whole(unflatten(arguments)[0], reference)
    query, key, value, mask, _, scale, form, dropout_p, *_ = call
    dtype = accumulation_dtype(query.dtype)
    limits = torch.finfo(dtype)
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    bias = None if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    keep = _visible(mask, call.diagonal, query, key)
    nan_rows = q.isnan().any(-1, keepdim=True)
    # Two flags of each key: it is no number, and its value has entries that are not finite.
    broken = torch.cat([k.isnan().any(-1, keepdim=True), ~v.isfinite().all(-1, keepdim=True)], -1)
    v = v if keep is None else torch.where(v.isfinite(), v, 0.0)
    q, q_size = _unit(q)
    k, k_size = _unit(k)
    largest_z = _SATURATED if form == "expressive" else limits.max
    z = (scale * (q @ k.mT) * q_size * k_size.mT).clamp(-largest_z, largest_z)
    z = z if keep is None else torch.where(keep, z, 0.0)
    largest = z.abs().amax(-1, keepdim=True).clamp(min=limits.tiny)
    largest = largest.clamp(max=1.0) if form == "expressive" else largest
    weight = weight_of(z.square(), form, (z / largest).square())
    bias_max = q.new_empty((*query.shape[:2], 0))
    if bias is not None and keep is not None:
        nan_rows = nan_rows | (keep & ~bias.isfinite()).any(-1, keepdim=True)
        bias = torch.where(keep & bias.isfinite(), bias, 0.0)
        largest_bias = torch.where(keep & (z != 0), bias, -torch.inf).amax(-1, keepdim=True)
        largest_bias = torch.where(largest_bias == -torch.inf, 0.0, largest_bias)
        weight = weight * torch.exp((bias - largest_bias).clamp(max=_LARGEST_EXCESS))
        bias_max = largest_bias.squeeze(-1).expand(query.shape[:3])
    if keep is None:
        nan_rows = nan_rows | broken[..., :1].any(-2, keepdim=True)
        nan_outputs = nan_rows
    else:
        weight = torch.where(keep, weight, 0.0)
        seen = keep.to(dtype) @ broken.to(dtype) > 0
        nan_rows = nan_rows & keep.any(-1, keepdim=True) | seen[..., :1]
        nan_outputs = nan_rows | seen[..., 1:]
    total = weight.sum(-1, keepdim=True)
    if dropout_p:
        weight = kept_weights(weight, call)
    output = weight / torch.where(total == 0, 1.0, total) @ v
    output = torch.where(nan_outputs, torch.nan, output).to(query.dtype)
    normalizer = torch.where(nan_rows, torch.nan, total * largest.square()).squeeze(-1)
    return output, normalizer, bias_max


def _visible(mask: Tensor | None, diagonal: int | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Which keys a query sees, ``(B | 1, H | 1, L | 1, S)``; None: all."""
    rows, keys = query.shape[2], key.shape[2]
    keep = mask
    if mask is not None:
        keep = (mask if mask.dtype == torch.bool else mask != -torch.inf).expand(-1, -1, -1, keys)
    if diagonal is None:
        return keep
    row, column = torch.arange(rows, device=query.device), torch.arange(keys, device=query.device)
    causal = (column <= row.unsqueeze(-1) + diagonal)[None, None]
    return causal if keep is None else keep & causal


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of entries up to 1 without NaN and infinities, which their products would not survive, and their size.

    An infinity is as large as the largest number.
    """
    largest = torch.finfo(x.dtype).max
    x = torch.where(x.isnan(), 0.0, x).clamp(-largest, largest)
    size = x.abs().amax(-1, keepdim=True).clamp(min=1.0)
    return x / size, size


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions of the operators of this package, for `torch.export.ExportedProgram.run_decompositions`.

    They mean what the operator means, NaN and infinities that are hidden included. Under a mask, a value that is seen
    and is no finite number makes all of its row NaN, and not its column alone.

    Returns:
        A table: ``exported.run_decompositions(decompositions())`` gives the forward pass in plain operators.

    Example:
        >>> from expressive_attention.integrations import convert, decompositions
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
        >>> conversion = convert(model)
        >>> exported = torch.export.export(model, (torch.randn(3, 7, 16),)).run_decompositions(decompositions())
        >>> any("expressive" in str(node.target) for node in exported.graph.nodes)
        False
    """
    return {_ATTENTION: _attention}
