"""timm: give `Attention` to models that take ``attn_layer=``, or `convert` any model after it was made.

timm.create_model("vit_tiny_patch16_224", attn_layer=expressive_attention.integrations.timm.Attention)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .conversion import Found, Undo
from .inspection import names_used
from .sdpa import expressive_sdpa
from .switching import WithExpressiveSdpa
from .switching import switch as give_class

try:
    from timm.layers.attention import Attention as _Attention
except ImportError as error:
    raise ImportError(
        "timm 1.0.23 or newer is needed; the extra 'timm' installs it: pip install 'expressive-attention[timm]'"
    ) from error

__all__ = ["Attention", "find", "switch"]


class Attention(_Attention):
    """`timm.layers.Attention` with expressive attention, for ``attn_layer=``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["fused_attn"] = True  # else it would compute softmax by itself

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As timm's."""
        with expressive_sdpa():
            return super().forward(*args, **kwargs)


def find(model: nn.Module) -> list[Found]:
    """Layers that choose by `fused_attn` between torch's attention and softmax of their own."""
    return [
        Found(name, module, how="fused_attn on, its calls of scaled_dot_product_attention are replaced")
        for name, module in model.named_modules()
        if hasattr(module, "fused_attn")
        and not isinstance(module, Attention)
        and "scaled_dot_product_attention" in names_used(type(module))
    ]


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
    """Freeze `fused_attn` in each of them: timm's global switch does not reach models that exist."""
    for found in layers:
        yield give_class(found.module, WithExpressiveSdpa, form, fused_attn=True)
