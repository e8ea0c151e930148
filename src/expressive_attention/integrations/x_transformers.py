"""x-transformers: give `attn_fn()` to ``attn_custom_attn_fn=``, or `convert` a model after it was made.

    Decoder(dim=512, depth=6, heads=8, attn_custom_attn_fn=expressive_attention.integrations.x_transformers.attn_fn())

x-transformers adds biases (ALiBi, T5) to the score before it calls that function, where they would raise expressive
weights, and overlooks the function with ``attn_flash=True``. `convert` has neither of these limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forms import check_form, weight
from ..functional import expressive_attention
from ..masks import join_masks
from .conversion import Found, Undo
from .guard import note_expressive
from .switching import GAIN, Switched
from .switching import switch as give_class

try:
    from x_transformers.attend import Attend, Intermediates
except ImportError as error:
    raise ImportError(
        "x-transformers 2.0 or newer is needed; the extra 'x-transformers' installs it: "
        "pip install 'expressive-attention[x-transformers]'"
    ) from error

__all__ = ["attn_fn", "find", "switch"]

# Options that change scores in ways that expressive attention does not define.
_UNDEFINED = {
    "softclamp_logits": "soft clamped scores",
    "head_learned_sink": "attention sinks",
    "selective": "selective attention",
    "l2_distance": "L2 distances in the place of dot products",
    "cog_signed": "signed attention",
    "inverted_attention": "inverted attention",
    "cope": "contextual positions",
    "pre_softmax_talking_heads": "talking heads",
    "post_softmax_talking_heads": "talking heads",
    "pre_scale_post_talking_heads": "talking heads",
}


def attn_fn(form: str = "expressive") -> Callable[[Tensor], Tensor]:
    """A function from masked scores ``(..., L, S)`` to weights, for ``attn_custom_attn_fn=``.

    Args:
        form: ``"expressive"`` or ``"squared"``.
    """
    check_form(form)

    def weights(scores: Tensor, **_: Any) -> Tensor:
        keep = scores > torch.finfo(scores.dtype).min / 2  # x-transformers masks with the lowest number
        z = scores.masked_fill(~keep, 0.0)
        z = z.clamp(-1e18, 1e18)
        # A factor per row does not change the shares, and without it the squares of small scores would be lost.
        relative = (z / z.abs().amax(-1, keepdim=True).clamp(torch.finfo(z.dtype).tiny, 1.0)).square()
        w = weight(z.square(), form, relative)
        return w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)

    return weights


class _ExpressiveAttend(Switched):
    """`Attend` by `expressive_attention`, biases in log-weight space; its maps of attention are not kept."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        prev_attn: Tensor | None = None,
        attn_delta: Tensor | None = None,
        row_mask: Tensor | None = None,
        flash_pack_seq_kwargs: dict[str, Any] | None = None,
        causal: bool | None = None,
    ) -> tuple[Tensor, Any]:
        """Query ``(B, H, L, E)``, key and value ``(B, Hkv, S, E)`` to ``(B, H, L, E)``."""
        note_expressive()
        packed = flash_pack_seq_kwargs
        undefined = (("prev_attn", prev_attn), ("attn_delta", attn_delta), ("flash_pack_seq_kwargs", packed))
        for name, value in undefined:
            if value is not None:
                raise NotImplementedError(f"Attend was given {name}, which EA does not define")
        owner: Any = self
        keep = mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask
        if attn_bias is not None:
            keep = attn_bias if keep is None else join_masks(keep, attn_bias)
        if (gain := getattr(self, GAIN, None)) is not None:
            q = q * gain[:, None, None]
        groups = q.shape[1] // k.shape[1]
        if groups > 1:  # head h reads head h mod Hkv here, and not h // groups
            k, v = (x.repeat(1, groups, 1, 1) for x in (k, v))
        output = expressive_attention(
            q, k, v, keep,
            owner.dropout if owner.training else 0.0,
            q.shape[-2] > 1 and (owner.causal if causal is None else causal),
            scale=owner.scale,
            form=self._expressive_form,
            causal_alignment="lower_right",
        )  # fmt: skip
        return output, Intermediates()


def find(model: nn.Module) -> list[Found]:
    """All `Attend`, the part of an attention layer that weighs keys."""
    # Layers that pass scores on to the next say so, and not the `Attend` in them.
    residual = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if getattr(module, "residual_attn", False) or getattr(module, "cross_residual_attn", False)
    ]
    return [
        _described(name, module, name.startswith(tuple(residual)))
        for name, module in model.named_modules()
        if isinstance(module, Attend)
    ]


def _described(name: str, module: nn.Module, is_residual: bool) -> Found:
    reasons = [what for option, what in _UNDEFINED.items() if getattr(module, option, None) not in (None, False)]
    if is_residual:
        reasons.append("residual attention")
    if not _is_plain(module.attn_fn):
        reasons.append(f"weights of another kind ({_innermost(module.attn_fn)})")
    if reasons:
        return Found(name, module, why_not=f"it has {reasons[0]}, which EA does not define")
    return Found(name, module, how="Attend by expressive_attention")


def _innermost(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__name__)


def _is_plain(function: Any) -> bool:
    """Whether weights are softmax's, or already those of `attn_fn`: top-k, hard or sigmoid ones would be lost."""
    while isinstance(function, partial):
        function = function.func
    return function is F.softmax or getattr(function, "__module__", "") == __name__


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
    """Replace the forward pass of each."""
    for found in layers:
        yield give_class(found.module, _ExpressiveAttend, form)
