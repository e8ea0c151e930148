"""Near and far: exact expressive attention within a window, the squared form beyond, one normalizer for both.

    w_ij = f(z_ij) exp(-slope (i - j))  for 0 <= i - j < window,   f(z) = z^2 / (1 + z^2)
    w_ij = z_ij^2  exp(-slope (i - j))  for i - j >= window
    N_i  = sum_j w_ij,                  o_i = sum_j w_ij v_j / N_i

z^2 is the leading order of f, and factorizes: the far keys cost a state of constant size, the near ones a window.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .checks import check_types
from .functional import expressive_attention
from .overrides import takers

__all__ = ["check_near", "join", "near_far_attention"]

# A factor below exp(-600) times any number of float32 is nothing beside any other, and still a number in float64.
_SMALLEST = -600.0


@overload
def near_far_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    enable_gqa: bool = False,
    return_normalizer: Literal[False] = False,
) -> Tensor: ...


@overload
def near_far_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    enable_gqa: bool = False,
    return_normalizer: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def near_far_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    enable_gqa: bool = False,
    return_normalizer: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention, expressive for the last keys and squared for those before: time and memory linear in length.

    With z_ij = scale * q_i . k_j, and p_i = i + S - L, the place of query i among the keys:

        w_ij = exp(-slope (p_i - j)) * (z_ij^2 / (1 + z_ij^2)  if p_i - j < window,  else  z_ij^2)
        N_i  = sum_{j <= p_i} w_ij,    o_i = sum_j w_ij v_j / N_i

    Queries are the last of the keys, as in decoding. A row with N_i = 0 gives output 0 and gradient 0. Both parts are
    calls of `expressive_attention`, whose backend is chosen for each; far keys take linear time where that is faster.

    Args:
        query: ``(..., Hq, L, E)``, as in `expressive_attention`.
        key: ``(..., Hkv, S, E)``, dtype and device of query.
        value: ``(..., Hkv, S, Ev)``, likewise.
        window: Number of keys with the weight f, at least 1: the query's own and those right before it.
        scale: Factor on the dot product; ``1 / sqrt(E)`` if None. The size of z decides on the shares of near and far.
        alibi_slopes: ``(Hq,)`` or broadcastable to ``(..., Hq)``, float32, at least 0, differentiable.
        enable_gqa: Let ``Hq`` be a multiple of ``Hkv``.
        return_normalizer: Also return N.

    Returns:
        Output ``(..., Hq, L, Ev)`` in the dtype of query. With `return_normalizer` also N ``(..., Hq, L)`` in float32
        (float64 for float64 inputs), infinite where squares leave its range; both are differentiable.

    Raises:
        TypeError: An argument is not of the type above.
        ValueError: A dtype, device, shape or number does not fit; the message names the argument.
        NotImplementedError: In a region of `distributed.ContextParallel`, where a rank has some of the keys.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 16, 8).unbind(0)
        >>> near_far_attention(q, k, v, window=4).shape
        torch.Size([2, 4, 16, 8])
    """
    check_near(window)
    check_types(query=query, key=key, value=value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be dense, got layout {x.layout}")
    near = expressive_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa, causal_alignment="lower_right",
        window_size=(window - 1, -1), alibi_slopes=alibi_slopes, return_normalizer=True,
    )  # fmt: skip
    rows, keys = query.shape[-2], key.shape[-2]
    first = min(rows, max(0, rows - keys + window))  # the first row that sees beyond the window
    if first == rows:
        return near if return_normalizer else near[0]
    far = expressive_attention(
        query[..., first:, :], key[..., : keys - window, :], value[..., : keys - window, :], is_causal=True,
        scale=scale, enable_gqa=enable_gqa, form="squared", causal_alignment="lower_right", alibi_slopes=alibi_slopes,
        return_normalizer=True,
    )  # fmt: skip
    output, normalizer = join(near, far, None if alibi_slopes is None else alibi_slopes.to(torch.float64) * -window)
    return (output, normalizer) if return_normalizer else output


def check_near(window: int) -> None:
    """Raise an error unless the window is one, and this is a place where all keys are."""
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"window must be an integer, got {window!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if takers:
        raise NotImplementedError("near and far keys are not split over ranks: leave the region of ContextParallel")


def join(
    near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], log_factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and N of two attentions over different keys, of which the second has the last rows of the first.

    Args:
        near: Output ``(..., H, L, Ev)`` and N ``(..., H, L)``.
        far: The same of the last rows, whose N may be infinite. In such rows it is all there is.
        log_factor: Logarithm of a factor on the weights of `far`, broadcastable to ``(..., H)``.

    Returns:
        Both, in the dtypes of `near`.
    """
    (output, normalizer), (far_output, far_normalizer) = near, far
    rows = far_normalizer.shape[-1]
    own = normalizer[..., normalizer.shape[-1] - rows :].to(torch.float64)
    own_output = output[..., output.shape[-2] - rows :, :]
    other = far_normalizer.to(torch.float64)
    factor = None
    if log_factor is not None:
        factor = log_factor.to(torch.float64).clamp(min=_SMALLEST).exp()
        factor = factor.unsqueeze(-1) if other.ndim > 1 else factor
    weight = other.clamp(max=torch.finfo(normalizer.dtype).max)  # infinity over infinity is no share
    if factor is not None:
        weight, other = weight * factor, other * factor
    total = own + weight
    total = torch.where(total == 0, 1.0, total)
    share, far_share = ((x / total).to(normalizer.dtype).unsqueeze(-1) for x in (own, weight))
    joined = torch.addcmul(own_output * share, far_output.to(share.dtype), far_share)
    found = joined.to(output.dtype), (own + other).to(normalizer.dtype)
    if rows == normalizer.shape[-1]:
        return found
    first = normalizer.shape[-1] - rows
    return torch.cat([output[..., :first, :], found[0]], -2), torch.cat([normalizer[..., :first], found[1]], -1)
