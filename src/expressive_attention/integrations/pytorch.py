"""`torch.nn.MultiheadAttention`, by itself and in torch's transformer layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..nn import MultiheadAttention
from .classes import set_attributes
from .conversion import Found, Undo
from .guard import note_expressive
from .switching import Switched, WithExpressiveSdpa
from .switching import switch as give_class

__all__ = ["find", "switch"]


class _ExpressiveHeads(Switched):
    """The forward pass of our class, on the parameters of torch's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As that of our class."""
        note_expressive()
        return MultiheadAttention.forward(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    @property
    def form(self) -> str:
        """The form, by the name that the class of this package has for it."""
        return self._expressive_form


def find(model: nn.Module) -> list[Found]:
    """All that are not of our class already."""
    return [
        Found(name, module, how="nn.MultiheadAttention of this package, same parameters")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention)
    ]


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
    """Give them our forward pass, and keep the layers that hold them from torch's fused path."""
    for found in layers:
        if type(found.module).forward is nn.MultiheadAttention.forward:
            yield give_class(found.module, _ExpressiveHeads, form)
        else:
            yield give_class(found.module, WithExpressiveSdpa, form)
    modules = {found.module for found in layers}
    for holder in model.modules():
        if modules.isdisjoint(holder.modules()):
            continue
        if isinstance(holder, nn.TransformerEncoder):  # it makes nested tensors, which only the fused path can read
            yield set_attributes(holder, use_nested_tensor=False)
        elif isinstance(holder, nn.TransformerEncoderLayer):  # 0: an activation that the fused path does not know
            yield set_attributes(holder, activation_relu_or_gelu=0)
