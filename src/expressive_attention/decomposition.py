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
from .call import accumulation_dtype, lower
from .masks import row_bias_max
from .schema import unflatten

__all__ = ["decompositions"]

_ATTENTION: Any = torch.ops.expressive_attention.attention.default

# Beyond it, f(z) is 1 and its square is finite in float32.
_SATURATED = 1e18


@register_decomposition(_ATTENTION)
def _attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalizer and largest biases, as `backends.reference` has them, to within rounding.

    With m_i the largest |z_ij| that query i sees, at most 1 for the form "expressive", weights are computed as
    (z / m)^2 / (1 + z^2), which a row of small scores does not underflow.
    """
    call = lower(unflatten(arguments)[0], reference)
    query, key, value, mask, _, scale, form, dropout_p, *_ = call
    dtype = accumulation_dtype(query.dtype)
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    rows, keys = query.shape[2], key.shape[2]
    keep, diagonal = None, call.diagonal
    if diagonal is not None:
        row, column = torch.arange(rows, device=q.device), torch.arange(keys, device=q.device)
        keep = column <= row.unsqueeze(-1) + diagonal
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        keep = mask if keep is None else keep & mask
    elif mask is not None:
        bias = mask.to(dtype)
    z = scale * (q @ k.mT)
    z = z if keep is None else torch.where(keep, z, 0.0)
    z = z.clamp(-_SATURATED, _SATURATED) if form == "expressive" else z
    largest = z.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    largest = largest.clamp(max=1.0) if form == "expressive" else largest
    weight = (z / largest).square()
    weight = weight / (1.0 + z.square()) if form == "expressive" else weight
    bias_max = q.new_empty((*query.shape[:2], 0))
    if bias is not None:
        largest_bias = row_bias_max(bias, range(rows), diagonal)
        weight = weight * torch.exp(bias - largest_bias)
        bias_max = largest_bias.squeeze(-1).expand(query.shape[:3])
    weight = weight if keep is None else torch.where(keep, weight, 0.0)
    total = weight.sum(-1, keepdim=True)
    if dropout_p:
        weight = kept_weights(weight, call)
    output = (weight / torch.where(total == 0, 1.0, total) @ v).to(query.dtype)
    normalizer = (total * largest.square()).squeeze(-1)
    return output, normalizer, bias_max


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions of the operators of this package, for `torch.export.ExportedProgram.run_decompositions`.

    Plain operators multiply hidden values by 0, so NaN or an infinity that is hidden makes rows NaN; the kernels leave
    it out. A key with score 0 and a bias that is larger by 88 or more hides the others.

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
