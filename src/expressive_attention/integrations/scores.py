"""The scores z of the attention layers of a model on some data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Call
from .tracing import traced

__all__ = ["scores_of", "tell_calls"]

# Scores that are in memory at a time, in float64.
_PAIRS = 1 << 22


@torch.no_grad()
def tell_calls(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], told: Callable[[str, Call], None]
) -> None:
    """Run a model on some data, and tell of each call of expressive attention in one of the layers.

    Args:
        model: Any module.
        layers: Its layers by name.
        batches: Inputs of the model: a tensor, a tuple of positional or a mapping of named arguments each.
        told: Called with the name of the layer and the call.

    Raises:
        ValueError: There are no batches, or a layer is not reached.
    """
    reached = set[str]()

    def tell(layer: str, call: Call) -> None:
        reached.add(layer)
        told(layer, call)

    with traced(layers, tell):
        count = 0
        for batch in batches:
            count += 1
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*(batch if isinstance(batch, tuple) else (batch,)))
    if not count:
        raise ValueError("batches must hold at least one input of the model, got none")
    if missing := [name for name in layers if name not in reached]:
        raise ValueError(f"batches must reach every switched layer, but these were not: {', '.join(missing)}")


def scores_of(call: Call) -> Iterator[tuple[Tensor, Tensor]]:
    """The scores z of a call and which of them are seen, ``(B, Hq, l, S)`` in float64 and bool, for l rows in turn."""
    key = call.key.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    batch, heads, rows, _ = call.query.shape
    step = max(1, _PAIRS // max(1, batch * heads * key.shape[2]))
    for start in range(0, rows, step):
        part = torch.arange(start, min(start + step, rows), device=key.device)
        z = call.scale * call.query[:, :, start : start + step].double() @ key.mT
        mask = call.visibility.mask_of(part, call.query, call.key)
        keep = mask if mask.dtype == torch.bool else mask > -torch.inf
        if (own := call.attn_mask) is not None:
            own = own if own.shape[2] == 1 else own[:, :, start : start + step]
            keep = keep & (own if own.dtype == torch.bool else own > -1e4)  # finfo.min and -inf both mask
        yield z, keep.expand_as(z)
