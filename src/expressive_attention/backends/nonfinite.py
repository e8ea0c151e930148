"""NaN and infinities in the inputs of a backend that multiplies all pairs, hidden ones as well: 0 * NaN is NaN.

Such a backend computes with `cleaned` inputs, in which all is finite. Then rows that see something broken, and
gradients of what they see, are made NaN. NaN breaks whatever it is in. Infinity does so in values and biases; an
infinite query or key is as good as a very large one, of which f is 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..call import Call, Gradients, Result

__all__ = ["are_finite", "cleaned", "spoil", "spoil_gradients"]

# Pairs whose visibility is in memory at a time.
_PAIRS = 1 << 20


def are_finite(call: Call) -> bool:
    """Whether no number is NaN or infinite, or, of a mask, NaN or +inf. Waits for the device."""
    for x in call[:3]:
        if x.numel() and not all(end.isfinite() for end in torch.aminmax(x)):
            return False
    mask = call.attn_mask
    return mask is None or mask.dtype == torch.bool or mask.numel() == 0 or bool(mask.amax() < torch.inf)


def cleaned(call: Call) -> Call:
    """The call with finite numbers in place of those that are not; -inf in a mask hides, and stays."""
    query, key, value, mask = call[:4]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf)
    # Products of the largest numbers, and of one of them and the scale, are finite in float64.
    largest = min(torch.finfo(query.dtype).max, 2.0**500 if query.dtype == torch.float64 else 2.0**100)
    query, key = (x.nan_to_num(nan=0.0, posinf=largest, neginf=-largest) for x in (query, key))
    return Call(query, key, value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), mask, *call[4:])


def spoil(result: Result, call: Call) -> None:
    """Write NaN to those numbers of output and normalizer that see something broken in the inputs."""
    query, key, value = call[:3]
    output, normalizer, _ = result
    broken = torch.cat([key.isnan().any(-1, keepdim=True), ~value.isfinite()], -1).to(torch.float32)
    broken = broken.repeat_interleave(query.shape[1] // key.shape[1], 1)
    of_query = query.isnan().any(-1, keepdim=True)
    for rows, bias, visible in _visible(call):
        seen = visible.to(torch.float32) @ broken > 0
        spoiled = seen[..., :1] | (of_query[:, :, rows] & visible.any(-1, keepdim=True))
        if bias is not None:
            spoiled = spoiled | (visible & ~bias.isfinite()).any(-1, keepdim=True)
        output[:, :, rows].masked_fill_(spoiled | seen[..., 1:], torch.nan)
        normalizer[:, :, rows].masked_fill_(spoiled.squeeze(-1), torch.nan)


def spoil_gradients(gradients: Gradients, spoiled: Tensor, call: Call) -> None:
    """Write NaN to the gradients of all that takes part in the rows `spoiled` ``(B, Hq, L)``."""
    dq, dk, dv, dmask, *_ = gradients
    of_keys = torch.zeros((*dq.shape[:2], dk.shape[2]), dtype=torch.bool, device=dq.device)
    of_mask = None if dmask is None else torch.zeros_like(dmask, dtype=torch.int64)
    for rows, _, visible in _visible(call):
        pairs = visible & spoiled[:, :, rows, None]
        dq[:, :, rows].masked_fill_(pairs.any(-1, keepdim=True), torch.nan)
        of_keys |= pairs.any(-2)
        if of_mask is not None:
            part = of_mask if of_mask.shape[2] == 1 else of_mask[:, :, rows]
            part += pairs.long().sum_to_size(part.shape)
    of_keys = of_keys.unflatten(1, (dk.shape[1], -1)).any(2).unsqueeze(-1)
    dk.masked_fill_(of_keys, torch.nan)
    dv.masked_fill_(of_keys, torch.nan)
    if dmask is not None and of_mask is not None:
        dmask.masked_fill_(of_mask > 0, torch.nan)


def _visible(call: Call) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Ranges of rows, their bias, if they have one, and which keys they see, ``(B, Hq, l, S)``."""
    query, key, _, attn_mask = call[:4]
    diagonal = call.diagonal
    (batch, heads, rows, _), keys = query.shape, key.shape[2]
    step = max(1, _PAIRS // max(1, batch * heads * keys))
    column = torch.arange(keys, device=query.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        visible = torch.ones((), dtype=torch.bool, device=query.device)
        bias = None
        if attn_mask is not None:
            own = attn_mask if attn_mask.shape[2] == 1 else attn_mask[:, :, part]
            bias = None if own.dtype == torch.bool else own
            visible = own if bias is None else bias != -torch.inf
        if diagonal is not None:
            row = torch.arange(part.start, part.stop, device=query.device).unsqueeze(1)
            visible = visible & (column <= row + diagonal)
        yield part, bias, visible.expand(batch, heads, part.stop - part.start, keys)
