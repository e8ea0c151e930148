"""Any code that calls `torch.nn.functional.scaled_dot_product_attention`, without a change to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..backends.problem import check_form
from ..functional import expressive_attention
from ..nn.multihead import multi_head_attention_forward
from .guard import note_expressive, note_function

__all__ = ["expressive_sdpa"]

# torch's fused inference paths, which compute softmax from the parameters of a whole layer.
_FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")


class expressive_sdpa(TorchFunctionMode):  # noqa: N801 used like a function, as torch.no_grad is
    """A context in which calls of torch's dot-product attention compute expressive attention.

    `torch.nn.functional.scaled_dot_product_attention` becomes `expressive_attention`, which has the same arguments,
    and `torch.nn.functional.multi_head_attention_forward`, which `torch.nn.MultiheadAttention` calls, becomes
    `expressive_attention.nn.multihead.multi_head_attention_forward`. Torch's fused inference paths are not taken
    inside. It nests (the innermost counts), holds for the thread that enters it, as all modes of torch do, and
    may be entered inside a function that `torch.compile` compiles.

    What it cannot see: softmax that a model computes by itself, and kernels that are not torch's (flash-attn,
    xformers). `convert` finds these, and its `verify` proves where expressive attention ran.

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
        if getattr(func, "__name__", "") in _FUSED:
            raise NotImplementedError(f"torch.{func.__name__} computes softmax, and cannot be replaced; call the layer")
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
