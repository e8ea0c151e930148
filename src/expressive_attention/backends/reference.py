"""Expressive attention in plain torch, as it is defined: the judge of every other backend.

Any device and floating dtype, dropout, double backward, `torch.func` and forward-mode derivatives. It builds
the ``(L, S)`` matrix of weights and is meant to be read, not to be fast.

The definition (Gros, arXiv 2407.18601), with z_ij = scale * q_i . k_j:

    w_ij = f(z_ij) exp(bias_ij),  f(z) = z^2 / (1 + z^2)  (expressive)  or  z^2  (squared)
    N_i  = sum_j w_ij,            o_i  = sum_j w_ij v_j / N_i           (o_i = 0 where N_i = 0)

Weights do not change when a row of z becomes small as a whole, or a constant is added to a row of the bias,
but floating point would underflow. So query and key vectors are brought to length one, and each small row of
z to a largest entry of one, by powers of two, which round nothing:

    z_ij = 2^r_i y_ij,   f(z_ij) = 4^r_i y_ij^2 / (1 + 4^r_i y_ij^2),   r_i <= 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .pattern import Pattern
from .problem import Problem, accumulation_dtype, empty_peak, row_peak

__all__ = ["forward", "supports", "takes"]

# Beyond this |z|, f(z) is 1 and f'(z) is 0 in every dtype; z^2 is still finite in float32.
_SATURATED = 2.0**60


def supports(problem: Problem) -> str | None:
    """The reason why this backend declines `problem`; None: it does not."""
    return None


def takes(pattern: Pattern) -> bool:
    """Whether this backend knows all that a pattern asks for."""
    return pattern.is_diagonal


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    pattern: Pattern,
    scale: float,
    form: str,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``(B, Hq, L, Ev)``, normalizer and peak ``(B, Hq, L)``, where N_i = normalizer_i * exp(peak_i).

    Without a float mask the peak is `empty_peak`, and means 0. Arguments are as in `backends.problem`; the
    pattern is one that it `takes`.
    Differentiable with respect to query, key, value and a float mask, any number of times.
    """
    dtype = accumulation_dtype(query.dtype)
    rows, keys = query.shape[-2], key.shape[-2]
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    keep, diagonal = None, pattern.diagonal(query, key)
    if diagonal is not None:
        keep = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(diagonal)
    bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = attn_mask if keep is None else keep & attn_mask
    elif attn_mask is not None:
        bias = attn_mask.to(dtype)

    y, exponent = _scores(q, k, scale, keep, form)
    # The coefficient of y^2 in the denominator of f: 4^r, or 0 where f(z) = z^2 to the last bit.
    saturation = torch.exp2(2.0 * exponent) if form == "expressive" else torch.zeros_like(exponent)
    weight = _weight(y, saturation)
    peak = None
    if bias is not None:
        peak = row_peak(bias, range(rows), diagonal)
        weight = weight * torch.exp(bias - peak)
    if keep is not None:
        weight = torch.where(keep, weight, 0.0)

    total = weight.sum(-1, keepdim=True)
    attention = weight / torch.where(total == 0, 1.0, total)
    attention = torch.dropout(attention, dropout_p, train=True) if dropout_p else attention
    output = (attention @ v).to(query.dtype)
    normalizer = (total * torch.exp2(2.0 * exponent)).squeeze(-1)
    return output, normalizer, empty_peak(normalizer, None) if peak is None else peak.squeeze(-1).expand_as(normalizer)


def _scores(q: Tensor, k: Tensor, scale: float, keep: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """y ``(B, H, L, S)`` and the exponent r ``(B, H, L, 1)`` with z = 2^r y, |y| <= 1 where r < 0."""
    mantissa, scale_exponent = math.frexp(scale)
    q, q_exponent = _unit(q)
    k, k_exponent = _unit(k)
    y = (q * mantissa) @ k.mT
    exponent = q_exponent + k_exponent.mT + scale_exponent
    lowest = -(2.0**20)  # below every exponent of a product of floats
    size = torch.where(y.detach() == 0, lowest, torch.frexp(y.detach()).exponent + exponent)
    if keep is not None:
        size = torch.where(keep, size, lowest)
    # A key more keeps the maximum defined where there is none.
    size = torch.nn.functional.pad(size, (0, 1), value=lowest)
    largest = size.amax(-1, keepdim=True)
    largest = torch.where(largest == lowest, 0.0, largest)
    if form == "expressive":
        largest = largest.clamp(max=0.0)
    limits = torch.finfo(q.dtype)
    shift = (exponent - largest).clamp(math.log2(limits.tiny), math.log2(limits.max))
    y = (y * torch.exp2(shift.to(q.dtype))).clamp(-_SATURATED, _SATURATED)
    return y, largest.to(q.dtype)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / 2^e, its largest entry between 1/2 and 1, and e ``(..., 1)``, integers in the dtype of x."""
    exponent = torch.frexp(x.detach().abs().amax(-1, keepdim=True)).exponent.to(x.dtype)
    limit = -math.log2(torch.finfo(x.dtype).tiny)
    exponent = exponent.clamp(-limit, limit)
    return x * torch.exp2(-exponent), exponent


def _weight(y: Tensor, t: Tensor) -> Tensor:
    """y^2 / (1 + t y^2), so written that derivatives of every order lose nothing.

    Autograd of the quotient subtracts two numbers that agree to 1 / (t y^2), where that is small; of 1 / (t + y^-2)
    it subtracts none.
    """
    large = (t * y * y).detach() > 1.0
    s = torch.where(large, 0.0, y).square()
    inverse = 1.0 / torch.where(large, y, 1.0)
    return torch.where(large, 1.0 / (t + inverse * inverse), s / (1.0 + t * s))
