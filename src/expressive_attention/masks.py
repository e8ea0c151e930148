"""Operations on masks: joining two, their strides, and the largest bias of a row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["join_masks", "repeated_strides", "row_bias_max"]


def join_masks(first: Tensor, second: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Two masks in one, each of which is bool (False: hidden) or a bias (-inf: hidden).

    A hidden pair stays hidden, whatever bias the other mask has there.

    Args:
        first: A mask.
        second: Another one, of a shape that broadcasts with it.
        dtype: Dtype of the result if the first mask alone has a bias; default: its own. The gradient of a 16-bit mask
            is a sum of many terms, which float32 holds.
    """
    if first.dtype == second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        return second.masked_fill(~first, -torch.inf)
    if second.dtype == torch.bool:
        return (first if dtype is None else first.to(dtype)).masked_fill(~second, -torch.inf)
    return torch.where(second == -torch.inf, second, second + first)


def repeated_strides(mask: Tensor) -> tuple[int, ...]:
    """Strides that repeat the dimensions of size one."""
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def row_bias_max(bias: Tensor, rows: range, diagonal: int | None) -> Tensor:
    """The largest bias that each row can see, ``(b, h, len(rows) | 1, 1)``; 0 where it sees none.

    Weights are computed from ``bias - bias_max``, which is at most 0, so that a bias means what it means for
    softmax (adding a constant to a row changes nothing) and never overflows or underflows a whole row.

    Args:
        bias: ``(b, h, len(rows) | 1, S | 1)``, the rows `rows` of the mask, in the accumulation dtype.
        rows: Indices of the query rows, with step 1.
        diagonal: As `call.Call.diagonal`.
    """
    bias = bias.detach()
    if diagonal is not None:
        row = torch.arange(rows.start, rows.stop, device=bias.device).unsqueeze(1)
        if bias.shape[-1] == 1:
            hidden = row + diagonal < 0
        else:
            hidden = torch.arange(bias.shape[-1], device=bias.device) > row + diagonal
        bias = bias.masked_fill(hidden, -torch.inf)
    if bias.shape[-1] == 0:
        return bias.new_zeros((*bias.shape[:-1], 1))
    largest = bias.amax(-1, keepdim=True)
    return largest.masked_fill(largest == -torch.inf, 0.0)
