"""`torch.nn.MultiheadAttention`, by itself and in torch's transformer layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..nn import MultiheadAttention
from .conversion import Found, Undo
from .switching import Switched, WithExpressiveSdpa, restore
from .switching import switch as give_class

__all__ = ["find", "switch"]


class _ExpressiveHeads(Switched):
    """The forward pass of our class, on the parameters of torch's."""

    forward = MultiheadAttention.forward


def find(model: nn.Module) -> list[Found]:
    """All that are not of our class already."""
    return [
        Found(name, module, how="nn.MultiheadAttention of this package, same parameters")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention)
    ]


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> list[Undo]:
    """Give them our forward pass, and keep the layers that hold them from torch's fused path."""
    undos = []
    for found in layers:
        if type(found.module).forward is nn.MultiheadAttention.forward:
            # Torch's layers take their fused path, which computes softmax, only where that attribute is True.
            undos.append(give_class(found.module, _ExpressiveHeads, form=form, _qkv_same_embed_dim=False))
        else:
            undos.append(give_class(found.module, WithExpressiveSdpa, _expressive_form=form, _qkv_same_embed_dim=False))
    modules = {found.module for found in layers}
    return undos + [
        _without_nested_tensors(encoder)
        for encoder in model.modules()
        if isinstance(encoder, nn.TransformerEncoder) and not modules.isdisjoint(encoder.modules())
    ]


def _without_nested_tensors(encoder: nn.TransformerEncoder) -> Undo:
    """A stack of layers makes nested tensors for the fused path; without that path nothing can read them."""
    before = {"use_nested_tensor": encoder.use_nested_tensor}
    encoder.use_nested_tensor = False
    return lambda: restore(encoder, before, before)
