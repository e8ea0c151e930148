"""Modules of any library whose code calls torch's attention functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..nn import MultiheadAttention
from .conversion import Found, Undo
from .inspection import names_used
from .switching import WithExpressiveSdpa
from .switching import switch as give_class

__all__ = ["find", "switch"]

_CALLS = {"scaled_dot_product_attention", "multi_head_attention_forward"}


def find(model: nn.Module) -> list[Found]:
    """Modules whose own code calls it."""
    return [
        Found(name, module, how="its calls of torch's attention are replaced")
        for name, module in model.named_modules()
        if _CALLS & names_used(type(module)) and not isinstance(module, MultiheadAttention)
    ]


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
    """Let each of them run inside of `expressive_sdpa`."""
    for found in layers:
        yield give_class(found.module, WithExpressiveSdpa, form)
