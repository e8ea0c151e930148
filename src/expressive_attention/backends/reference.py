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

All arithmetic is on finite numbers: NaN and infinities are taken out of the inputs, since 0 * NaN would carry them from
what is hidden to what is seen, and rows that see some of them are made NaN in the end.

Gradients are those of autograd, in which the part of dq along q is what remains of terms that cancel: it loses a
factor of 1 / z^2 where all scores of a row are small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..call import Call, Gradients, Result, Upstream, accumulation_dtype
from ..forms import weight as weight_of
from .dropout import kept_weights

__all__ = ["backward", "declines", "forward"]

# Beyond this |z|, f(z) is 1 and f'(z) is 0 in every dtype; z^2 is still finite in float32.
_SATURATED = 2.0**60

# How far above `bias_max` the bias of a key with score 0 may lie: its first derivatives are 0, its second are not.
_LARGEST_EXCESS = 40.0


def declines(call: Call) -> str | None:
    """The reason why this backend declines the call; None: it does not."""
    if call.log_decay is not None or call.relative_bias is not None:
        return "decays and biases by distance must be in a mask"
    return None if call.visibility.is_diagonal() else "which keys a query sees must be in a mask"


def forward(call: Call) -> Result:
    """Output, normalizer and largest biases.

    Differentiable with respect to query, key, value and a float mask, any number of times.
    """
    query, key, value, attn_mask, _, scale, form, dropout_p, *_ = call
    dtype = accumulation_dtype(query.dtype)
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    bias = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(dtype)
    visible = _visible(attn_mask, call.diagonal, q, k)
    broken = q.isnan().any(-1, keepdim=True) | k.isnan().any(-1, keepdim=True).mT
    broken_values = ~v.isfinite()
    q, k, v = q.nan_to_num(nan=0.0), k.nan_to_num(nan=0.0), v.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    y, exponent = _scores(q, k, scale, visible, form)
    # The coefficient of y^2 in the denominator of f: 4^r, or 0 where f(z) = z^2 to the last bit.
    saturation = torch.exp2(2.0 * exponent) if form == "expressive" else torch.zeros_like(exponent)
    weight = _weight(y, saturation)
    bias_max = None
    if bias is not None and visible is not None:
        broken = broken | ~bias.isfinite()
        bias = torch.where(visible & bias.isfinite(), bias, 0.0)
        bias_max = _bias_max(bias, visible & (y != 0))
        weight = weight * torch.exp((bias - bias_max).clamp(max=_LARGEST_EXCESS))
    if visible is not None:
        weight = torch.where(visible, weight, 0.0)
        broken = broken & visible

    total = weight.sum(-1, keepdim=True)
    attention = _shares(weight)
    attention = kept_weights(attention, call) if dropout_p else attention
    broken = broken.any(-1, keepdim=True)
    output = attention @ v + _nan_where(broken | _sees(visible, broken_values), v)
    normalizer = (total * torch.exp2(2.0 * exponent) + _nan_where(broken, v)).squeeze(-1)
    return Result(output.to(query.dtype), normalizer, None if bias_max is None else bias_max.squeeze(-1))


def backward(call: Call, result: Result, upstream: Upstream) -> Gradients:
    """The gradients of the call, by autograd."""
    with torch.enable_grad():
        query, key, value = leaves = [x.detach().requires_grad_() for x in call[:3]]
        mask = call.attn_mask
        if mask is not None and upstream.wants_mask:
            mask = mask.detach().requires_grad_()
            leaves.append(mask)
        again = forward(call.but(query=query, key=key, value=value, attn_mask=mask))
        pairs = [(again.output, upstream.output)]
        if upstream.normalizer is not None:
            pairs.append((again.normalizer, upstream.normalizer))
        dq, dk, dv, *dmask = torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs])
    return Gradients(dq, dk, dv, dmask[0] if dmask else None)


def _visible(attn_mask: Tensor | None, diagonal: int | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Which keys a query sees, ``(B | 1, H | 1, L | 1, S)``; None: all."""
    rows, keys = q.shape[-2], k.shape[-2]
    visible = None
    if attn_mask is not None:
        visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        visible = visible.expand(-1, -1, -1, keys)
    if diagonal is None:
        return visible
    causal = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(diagonal)
    return causal if visible is None else visible & causal


def _sees(visible: Tensor | None, broken: Tensor) -> Tensor:
    """Whether a row sees one of the `broken` numbers ``(B, H, S, Ev)`` of a column: ``(B, H, L | 1, Ev)``."""
    if visible is None:
        return broken.any(-2, keepdim=True)
    return visible.to(torch.float32) @ broken.to(torch.float32) > 0


def _nan_where(where: Tensor, like: Tensor) -> Tensor:
    """NaN where it says so, and 0 elsewhere: to be added, so that gradients pass."""
    return torch.where(where, torch.nan, 0.0).to(like.dtype)


def _bias_max(bias: Tensor, counts: Tensor) -> Tensor:
    """The largest bias of the keys of each row that count, ``(B, H, L, 1)``; 0 where none does.

    Weights are computed from ``bias - bias_max``, so that a bias means what it means for softmax (adding a constant to
    a row changes nothing) and never overflows or underflows a whole row. A key with score 0 has no weight to compare
    others with.
    """
    bias = torch.where(counts, bias.detach(), -torch.inf)
    # A key more keeps the maximum defined where there is none.
    largest = torch.nn.functional.pad(bias, (0, 1), value=-torch.inf).amax(-1, keepdim=True)
    return torch.where(largest == -torch.inf, 0.0, largest)


def _scores(q: Tensor, k: Tensor, scale: float, visible: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """y ``(B, H, L, S)`` and the exponent r ``(B, H, L, 1)`` with z = 2^r y, |y| <= 1 where r < 0."""
    mantissa, scale_exponent = math.frexp(scale)
    q, q_exponent = _unit(q)
    k, k_exponent = _unit(k)
    y = (q * mantissa) @ k.mT
    exponent = q_exponent + k_exponent.mT + scale_exponent
    lowest = -(2.0**20)  # below every exponent of a product of floats
    size = torch.where(y.detach() == 0, lowest, torch.frexp(y.detach()).exponent + exponent)
    if visible is not None:
        size = torch.where(visible, size, lowest)
    # A key more keeps the maximum defined where there is none.
    size = torch.nn.functional.pad(size, (0, 1), value=lowest)
    largest = size.amax(-1, keepdim=True)
    largest = torch.where(largest == lowest, 0.0, largest)
    if form == "expressive":
        largest = largest.clamp(max=0.0)
    limits = torch.finfo(q.dtype)
    # The shift of hidden pairs can be anything; 2^shift has to be finite, or their gradients were 0 * inf.
    shift = (exponent - largest).clamp(math.log2(limits.tiny), math.frexp(limits.max)[1] - 1)
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
    return torch.where(large, 1.0 / (t + inverse * inverse), weight_of(t * s, relative=s))


def _shares(weight: Tensor) -> Tensor:
    """w_j / sum_j w_j, or 0 where that sum is 0.

    The first division is by a constant, of which the result does not depend. After it, one key that has all the weight
    has weight 1, and its derivative is exactly 0. Small scores would magnify what rounding left of it.
    """
    weight = weight / _without_zeros(weight.sum(-1, keepdim=True)).detach()
    return weight / _without_zeros(weight.sum(-1, keepdim=True))


def _without_zeros(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1.0, total)
