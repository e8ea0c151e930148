"""Any code that calls `torch.nn.functional.scaled_dot_product_attention`, without a change to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from torch.overrides import TorchFunctionMode

from ..forms import check_form
from ..functional import expressive_attention
from ..nn.multihead import multi_head_attention_forward
from .guard import note_expressive, note_function

__all__ = ["expressive_sdpa"]

# The same function as torch's own, by its operator.
_OPERATORS = (torch.ops.aten.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)

# Operators that compute softmax inside, and are called otherwise: torch's fused inference paths, from the parameters of
# a whole layer; its kernels by their names; attention over packed sequences (`torch.nn.attention.varlen`).
_FUSED = frozenset(
    name + overload
    for name in (
        *("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_triton_multi_head_attention"),
        *("_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        *("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_flash_attention_quantized"),
        *("_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward"),
        *("_varlen_attn", "_varlen_attn_out"),
    )
    for overload in ("", ".default", ".quantized")
)


class expressive_sdpa(TorchFunctionMode):  # noqa: N801 used like a function, as torch.no_grad is
    """A context in which calls of torch's dot-product attention compute expressive attention.

    `torch.nn.functional.scaled_dot_product_attention` becomes `expressive_attention`, which has the same arguments,
    and `torch.nn.functional.multi_head_attention_forward`, which `torch.nn.MultiheadAttention` calls, becomes
    `expressive_attention.nn.multihead.multi_head_attention_forward`. Torch's fused inference paths are not taken
    inside. It nests (the innermost counts), holds for the thread that enters it, as all modes of torch do, and
    may be entered inside a function that `torch.compile` compiles.

    It cannot see softmax that a model computes by itself, and kernels that are not torch's (flash-attn, xformers).
    `convert` finds these, and its `verify` proves where expressive attention ran.

    Activation checkpointing runs a part of the forward pass again during the backward pass, outside of the context
    that it ran in first. Give the mode to `torch.utils.checkpoint.checkpoint`, too:

        checkpoint(f, x, use_reentrant=False, context_fn=lambda: (expressive_sdpa(), expressive_sdpa()))

    Args:
        form: ``"expressive"`` or ``"squared"``, as in `expressive_attention`.
        gain: Factor ``(H,)`` on the queries of each head.

    Raises:
        ValueError: The form is neither.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 2, 4, 16, 8).unbind(0)
        >>> with expressive_sdpa():
        ...     output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    """

    def __init__(self, form: str = "expressive", gain: Tensor | None = None) -> None:
        check_form(form)
        super().__init__()
        self.form, self.gain = form, gain

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            note_expressive()
            return multi_head_attention_forward(*args, **kwargs, form=self.form, gain=self.gain)
        if func in _OPERATORS:
            return self._attention(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _FUSED:
            raise NotImplementedError(
                f"{name} of torch computes softmax, and cannot be replaced; call the layer, or "
                "expressive_attention_varlen for packed sequences"
            )
        if name == "flex_attention":
            return self._flex_attention(*args, **kwargs)
        note_function(func)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        note_expressive()
        if self.gain is not None:
            heads = query.shape[-3] if query.ndim > 2 else 1
            if heads != self.gain.numel():
                raise ValueError(
                    f"gain must have an entry for each of the {heads} heads of query, got {self.gain.numel()}; a layer "
                    "that folds its heads into the batch cannot be calibrated"
                )
            query = query * self.gain[:, None, None].to(query.dtype) if query.ndim > 2 else query * self.gain
        return expressive_attention(query, *args, **kwargs, form=self.form)

    def _flex_attention(
        self, query: Tensor, key: Tensor, value: Tensor, score_mod: Any, block_mask: Any, scale: float, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """FlexAttention's operator: the output, and statistics of softmax, which there are none of."""
        if getattr(score_mod, "__name__", "") != "_identity":
            raise NotImplementedError(
                "flex_attention with score_mod changes scores for softmax, which expressive attention does not define"
            )
        keep = _visible(block_mask, query, key)
        gqa = query.shape[1] != key.shape[1]
        output = self._attention(query, key, value, keep, scale=scale, enable_gqa=gqa)
        none = torch.full(query.shape[:-1], torch.nan, dtype=torch.float32, device=query.device)
        return output, none, none


def _visible(block_mask: tuple[Any, ...], query: Tensor, key: Tensor) -> Tensor | None:
    """A mask ``(B, H, L, S)`` of the tuple that `BlockMask` makes of itself."""
    _, _, partly_count, partly, full_count, full, *_, rows, columns, mask_mod = block_mask
    length, keys = query.shape[-2], key.shape[-2]
    if full_count is None and rows >= length and columns >= keys and mask_mod.__name__ == "noop_mask":
        return None
    batch, heads = query.shape[:2]
    seen = create_mask(mask_mod, batch, heads, length, keys, device=str(query.device))
    keep = _blocks(partly_count, partly, rows, columns, length, keys) & seen
    return keep if full_count is None else keep | _blocks(full_count, full, rows, columns, length, keys)


def _blocks(count: Tensor, places: Tensor, rows: int, columns: int, length: int, keys: int) -> Tensor:
    """True in the blocks of keys that a row of blocks lists, the first `count` of `places`: ``(B, H, L, S)``."""
    listed = torch.arange(places.shape[-1], device=places.device) < count.unsqueeze(-1)
    blocks = torch.zeros((*places.shape[:-1], places.shape[-1] + 1), dtype=torch.bool, device=places.device)
    blocks = blocks.scatter(-1, torch.where(listed, places, places.shape[-1]).long(), True)[..., :-1]
    row = torch.arange(length, device=places.device) // rows
    column = torch.arange(keys, device=places.device) // columns
    return blocks[..., row, :][..., column]
