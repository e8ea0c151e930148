"""Ways to weigh keys: expressive attention, softmax, and what lies between, to find out which part does what.

With z = q . k / sqrt(E), every mechanism gives key j the share w_j / sum_j w_j of a query, where w is

    expressive     z^2 / (1 + z^2)                (Gros, arXiv 2407.18601)
    dot_product    exp(z)                         (Vaswani et al., arXiv 1706.03762)
    squared        z^2                            two-sided, without saturation
    one_sided      f(max(z, 0)), f = expressive   saturation, without the antiparallel half
    relu_squared   max(z, 0)^2                    neither
    sigmoid        1 / (1 + exp(-z))              bounded and one-sided (weights as in Ramapuram et al.,
                                                  arXiv 2409.04431, but normalized, as all others are)
    softmax_abs    exp(|z|)                       softmax, made two-sided
    sigmoid_abs    1 / (1 + exp(-|z|))            sigmoid, made two-sided
    absolute       |z|                            two-sided, without saturation, and without the square
    relu           max(z, 0)                      its one-sided half
    quartic        z^4 / (1 + z^4)                steeper than expressive
    one_sided_quartic   the same of max(z, 0)     its one-sided half

A float mask multiplies w by exp(mask) for all of them. A query without weight gives 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forms import weight
from ..functional import expressive_attention
from ..masks import join_masks

__all__ = ["MECHANISMS", "attend", "check_mechanism", "known_mechanisms", "name_here", "register"]


def _saturated(z: Tensor) -> Tensor:
    """z^2 / (1 + z^2) of z >= 0 of any size."""
    return torch.where(z > 1e18, torch.ones_like(z), weight(z * z))


# Weights of scores (..., L, S), and logarithms of weights that may be too large or too small for a number.
_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one_sided": lambda z: _saturated(z.relu()),
    "relu_squared": lambda z: z.relu().square(),
    "absolute": torch.abs,
    "relu": torch.relu,
    "quartic": lambda z: _saturated(z * z),
    "one_sided_quartic": lambda z: _saturated(z.relu().square()),
}
_LOG_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": F.logsigmoid,
    "softmax_abs": torch.abs,
    "sigmoid_abs": lambda z: F.logsigmoid(z.abs()),
}

MECHANISMS = ("expressive", "dot_product", "squared", *_WEIGHTS, *_LOG_WEIGHTS)


def register(name: str, function: Callable[[Tensor], Tensor], *, is_log: bool = False) -> None:
    """Make a function of one's own a mechanism that `attend` and the modules know by a name.

    Args:
        name: Other than those of `MECHANISMS`; a name that was registered before gets the new function.
        function: From z ``(..., L, S)`` to weights of at least 0, element by element, of the same shape.
        is_log: It gives the logarithms of the weights, which may then be larger than a number can be.

    Raises:
        ValueError: There is a mechanism of that name in the package.
    """
    if name in MECHANISMS:
        raise ValueError(f"name must be none of {MECHANISMS}, got {name!r}")
    for table in (_WEIGHTS, _LOG_WEIGHTS):
        table.pop(name, None)
    (_LOG_WEIGHTS if is_log else _WEIGHTS)[name] = function


# Names under which users look for a mechanism.
_OTHER_NAMES = {"softmax": "dot_product", "dpa": "dot_product", "sdpa": "dot_product", "ea": "expressive"}


def check_mechanism(mechanism: str) -> None:
    """Raise ValueError if `mechanism` is none of `known_mechanisms`."""
    if mechanism not in known_mechanisms():
        raise ValueError(f"mechanism must be one of {known_mechanisms()}, got {mechanism!r}{name_here(mechanism)}")


def name_here(mechanism: str) -> str:
    """The end of an error for an unknown mechanism: ``"; 'dot_product' is its name here"`` for softmax, or nothing."""
    meant = _OTHER_NAMES.get(mechanism.lower()) if isinstance(mechanism, str) else None
    return "" if meant is None else f"; {meant!r} is its name here"


def known_mechanisms() -> tuple[str, ...]:
    """`MECHANISMS`, and what was registered."""
    return tuple(dict.fromkeys([*MECHANISMS, *_WEIGHTS, *_LOG_WEIGHTS]))


def attend(
    mechanism: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Attention ``(..., L, E), (..., S, E), (..., S, Ev) -> (..., L, Ev)`` by a mechanism, one of `known_mechanisms`.

    Args:
        mechanism: Its name.
        query: ``(..., L, E)``.
        key: ``(..., S, E)``.
        value: ``(..., S, Ev)``.
        attn_mask: Broadcastable to ``(..., L, S)``: bool (True: takes part) or a bias in log-weight space.
        dropout_p: Probability of dropping a weight.
        is_causal: A query sees its own position and what came before, in addition to the mask.


    Raises:
        ValueError: There is no mechanism of that name.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8)
        >>> [attend(mechanism, q, k, v, is_causal=True).shape for mechanism in ("expressive", "dot_product")]
        [torch.Size([2, 4, 5, 8]), torch.Size([2, 4, 5, 8])]
    """
    if mechanism == "expressive":
        return expressive_attention(query, key, value, attn_mask, dropout_p, is_causal)
    if mechanism == "squared":
        return expressive_attention(query, key, value, attn_mask, dropout_p, is_causal, form="squared")
    if mechanism == "dot_product":
        return _softmax(query, key, value, attn_mask, dropout_p, is_causal)
    check_mechanism(mechanism)
    if is_causal:
        attn_mask = _with_causal(attn_mask, query, key)
    weights = _masked_weights(mechanism, query @ key.mT * query.shape[-1] ** -0.5, attn_mask)
    total = weights.sum(-1, keepdim=True)
    shares = weights / torch.where(total == 0, torch.ones_like(total), total)
    return F.dropout(shares, dropout_p) @ value


def _masked_weights(mechanism: str, z: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Weights of scores ``(..., L, S)``, but for a factor per query."""
    if mechanism in _WEIGHTS:
        weights = _WEIGHTS[mechanism](z)
        if attn_mask is None:
            return weights
        return weights * (attn_mask if attn_mask.dtype == torch.bool else attn_mask.exp())
    logs = _LOG_WEIGHTS[mechanism](z)
    if attn_mask is not None:
        logs = logs.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logs + attn_mask
    largest = logs.amax(-1, keepdim=True).detach()  # of the keys that take part: else theirs may all be lost
    return (logs - torch.where(largest == -torch.inf, 0, largest)).exp()


def _softmax(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> Tensor:
    if attn_mask is None:
        shape = (*q.shape[:-1], v.shape[-1])
        if q.ndim > 4:  # torch's fused kernels take four dimensions
            q, k, v = (x.flatten(0, -4) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal).view(shape)
    if is_causal:  # torch takes either a mask or is_causal
        attn_mask = _with_causal(attn_mask, q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p)


def _with_causal(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return causal if attn_mask is None else join_masks(causal, attn_mask)
