"""diffusers: set `ExpressiveAttnProcessor` as any other processor, or `convert` a model with the processors it has.

unet.set_attn_processor(expressive_attention.integrations.diffusers.ExpressiveAttnProcessor())
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..backends.problem import check_form
from .conversion import Found, Undo
from .inspection import names_used
from .sdpa import expressive_sdpa
from .switching import WithExpressiveSdpa
from .switching import switch as give_class

try:
    from diffusers.models.attention_processor import AttnProcessor2_0
except ImportError as error:
    raise ImportError(
        "diffusers 0.30 or newer is needed; the extra 'diffusers' installs it: "
        "pip install 'expressive-attention[diffusers]'"
    ) from error

__all__ = ["ExpressiveAttnProcessor", "find", "switch"]

_CALLS = {"scaled_dot_product_attention", "dispatch_attention_fn"}


class ExpressiveAttnProcessor(AttnProcessor2_0):
    """`AttnProcessor2_0` with expressive attention.

    Args:
        form: ``"expressive"`` or ``"squared"``.
    """

    def __init__(self, form: str = "expressive") -> None:
        check_form(form)
        super().__init__()
        self.form = form

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `AttnProcessor2_0`."""
        with expressive_sdpa(self.form):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)


def find(model: nn.Module) -> list[Found]:
    """Layers with a processor."""
    return [
        _described(name, module)
        for name, module in model.named_modules()
        if hasattr(module, "processor")
        and hasattr(module, "set_processor")
        and not isinstance(module.processor, ExpressiveAttnProcessor)
    ]


def _described(name: str, module: nn.Module) -> Found:
    processor = type(module.processor)
    if names_used(processor).isdisjoint(_CALLS):
        return Found(name, module, why_not=f"its processor {processor.__name__} does not call torch's attention")
    return Found(name, module, how=f"calls of torch's attention in {processor.__name__} are replaced")


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
    """Let each of them run inside of `expressive_sdpa`, whatever processor it has or is given."""
    for found in layers:
        yield give_class(found.module, WithExpressiveSdpa, form)
