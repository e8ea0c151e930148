"""What a backend is told about a call before it runs, and conventions that all backends share.

Inside the library every call has one shape: query ``(B, Hq, L, E)``, key ``(B, Hkv, S, E)``, value
``(B, Hkv, S, Ev)`` with ``Hq % Hkv == 0``, and a mask ``(B | 1, Hq | 1, L | 1, S | 1)`` or None. Causality is
one integer, `diagonal`: query i sees key j if and only if ``j <= i + diagonal`` (0: aligned to the upper
left, ``S - L``: to the lower right, None: not causal). A `pattern.Pattern` says more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FORMS", "Problem", "accumulation_dtype", "check_form", "empty_peak", "row_peak"]

FORMS = ("expressive", "squared")


class Problem(NamedTuple):
    """The properties of a call on which a backend may decline.

    Attributes:
        device: Device type, e.g. ``"cpu"``.
        dtype: Dtype of query, key and value.
        dropout_p: Probability with which weights are dropped.
        differentiated_by_func: Whether a `torch.func` derivative (grad, vjp, jvp, ...) or one of forward mode is
            being taken.
        head_dim: The larger of E and Ev.
    """

    device: str
    dtype: torch.dtype
    dropout_p: float = 0.0
    differentiated_by_func: bool = False
    head_dim: int = 1


def check_form(form: str) -> None:
    """Raise ValueError if `form` is none of `FORMS`."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, weights and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_peak(normalizer: Tensor, attn_mask: Tensor | None, slopes: Tensor | None = None) -> Tensor:
    """Memory for the peaks ``(B, Hq, L)`` of rows; without a float mask or slopes there are none, ``(B, Hq, 0)``."""
    has_bias = slopes is not None or (attn_mask is not None and attn_mask.dtype != torch.bool)
    return normalizer.new_empty(normalizer.shape if has_bias else (*normalizer.shape[:-1], 0))


def row_peak(bias: Tensor, rows: range, diagonal: int | None) -> Tensor:
    """The largest bias that each row can see, ``(b, h, len(rows) | 1, 1)``; 0 where it sees none.

    Weights are computed from ``bias - peak``, which is at most 0, so that a bias means what it means for
    softmax (adding a constant to a row changes nothing) and never overflows or underflows a whole row.

    Args:
        bias: ``(b, h, len(rows) | 1, S | 1)``, the rows `rows` of the mask, in the accumulation dtype.
        rows: Indices of the query rows, with step 1.
        diagonal: As in the module docstring.
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
    peak = bias.amax(-1, keepdim=True)
    return peak.masked_fill(peak == -torch.inf, 0.0)
