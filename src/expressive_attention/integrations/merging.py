"""Gains of `calibrate` folded into the query projections, so that a calibrated model is an ordinary one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .classes import original_class
from .conversion import Conversion, has_gain, record_choice
from .errors import ConversionError
from .inspection import names_used
from .switching import GAIN

__all__ = ["merge_gains"]

# Projections to queries alone, and to queries, keys and values in this order, by the names that libraries give them.
_QUERY = ("q_proj", "query", "q_lin", "to_q", "wq", "q", "query_proj")
_FUSED = ("qkv", "c_attn", "qkv_proj", "to_qkv", "Wqkv")

# How libraries call the width of a head.
_WIDTH = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "d_kv")

_NORM = re.compile(r"(^|_)(q|query|qk)_?(layer)?norm|norm_(q|query)")


def merge_gains(conversion: Conversion | nn.Module) -> list[str]:
    """Multiply the query projection of each layer by its gains, and take the gains away: the model stays the same.

    It can then be saved and loaded by any library that knows the model. Only heads whose queries are linear in the
    projection can be merged: where queries are normalized afterwards, gains would be lost.

    Args:
        conversion: The conversion that `convert` returned, or its model.

    Returns:
        Names of the layers whose gains were merged.

    Raises:
        ConversionError: A layer with gains has no query projection that is known to be linear in them, or has weights
            that cannot be multiplied, as quantized ones. Nothing is changed.

    Example:
        >>> import torch
        >>> from expressive_attention.integrations import calibrate, convert, merge_gains
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> conversion = convert(model)
        >>> calibration = calibrate(conversion, [torch.randn(3, 7, 16)])
        >>> merge_gains(conversion)
        ['self_attn']
    """
    model = conversion.model if isinstance(conversion, Conversion) else conversion
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if has_gain(module)}
    merges = []
    for name, layer in layers.items():
        # The layer of x-transformers weighs keys, and the projections are those of the module around it.
        around = modules[name.rpartition(".")[0]] if name else layer
        found = _merge_of(layer, layer) or (_merge_of(around, layer) if type(around) is not type(layer) else None)
        if found is None:
            raise ConversionError(
                f"{name or 'the model'} ({original_class(layer).__name__}) has gains, and no query projection that "
                "queries are known to be linear in"
            )
        merges.append(found)
    with torch.no_grad():
        for merge in merges:
            merge()
    for layer in layers.values():
        del layer._parameters[GAIN]
    record_choice(model)
    return list(layers)


def _merge_of(module: Any, layer: nn.Module) -> Callable[[], None] | None:
    """A function that multiplies the query projection of a module by the gains of a layer; None: there is none."""
    gain = getattr(layer, GAIN)
    normed = [name for name, child in module.named_children() if _NORM.search(name) and type(child) is not nn.Identity]
    normalizes = getattr(module, "qk_norm", bool(names_used(type(module)) & {"normalize", "l2norm"}))
    if normed or normalizes:
        return None
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return _scaling(gain, module.q_proj_weight, module.in_proj_bias, module.embed_dim)
        return _scaling(gain, module.in_proj_weight, module.in_proj_bias, module.embed_dim)
    width = next((getattr(module, name) for name in _WIDTH if isinstance(getattr(module, name, None), int)), None)
    for name in (*_QUERY, *_FUSED):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            continue
        transposed = type(child).__name__ == "Conv1D"  # of transformers: (inputs, outputs)
        if not (type(child) is nn.Linear or transposed) or type(child.weight.data) is not Tensor:
            return None  # an adapter, or quantized
        weight: Tensor = child.weight.mT if transposed else child.weight  # pyright: ignore[reportAssignmentType]
        rows = weight.shape[0] if name in _QUERY else (width or 0) * gain.numel()
        if rows == 0 or rows % gain.numel() or (width is not None and rows != width * gain.numel()):
            return None
        return _scaling(gain, weight, child.bias, rows)  # pyright: ignore[reportArgumentType]
    return None


def _scaling(gain: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[], None]:
    """Multiplies the first `rows` rows, those of the queries, head after head, by the gain of their head."""

    def scale() -> None:
        factor = gain.to(weight.device, weight.dtype).repeat_interleave(rows // gain.numel())
        weight[:rows].mul_(factor.unsqueeze(-1))
        if bias is not None:
            bias[:rows].mul_(factor)

    return scale
