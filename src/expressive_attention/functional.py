"""The public function: checks its arguments, brings them to one shape, picks a backend, explains errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from . import ops
from .backends import AUTOMATIC, BACKENDS, reference
from .backends.problem import Problem, check_form

__all__ = ["expressive_attention"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ALIGNMENTS = ("upper_left", "lower_right")


class Call(NamedTuple):
    """A call of `expressive_attention` that has passed the checks, in the shapes that backends take.

    Attributes:
        query: ``(B, Hq, L, E)``.
        key: ``(B, Hkv, S, E)``.
        value: ``(B, Hkv, S, Ev)``.
        attn_mask: Broadcastable to ``(B, Hq, L, S)``, bool or floating, or None.
        diagonal: With a causal mask, query i sees keys up to i + diagonal.
        scale: Of the dot product.
        form: ``"expressive"`` or ``"squared"``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    diagonal: int | None
    scale: float
    form: str


# Told of every call.
listeners: list[Callable[[Call], None]] = []


@overload
def expressive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "expressive",
    causal_alignment: str = "upper_left",
    return_normalizer: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def expressive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "expressive",
    causal_alignment: str = "upper_left",
    return_normalizer: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def expressive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "expressive",
    causal_alignment: str = "upper_left",
    return_normalizer: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Expressive attention: weights large for parallel and antiparallel query and key, zero for orthogonal.

    With z_ij = scale * q_i . k_j (Gros, arXiv 2407.18601):

        w_ij = f(z_ij) exp(bias_ij),   f(z) = z^2 / (1 + z^2)
        N_i  = sum_j w_ij,             o_i  = sum_j w_ij v_j / N_i

    The arguments are those of `torch.nn.functional.scaled_dot_product_attention`, and mean the same, so that
    replacing the name is all it takes. A row with N_i = 0 (every key masked, or every score 0) gives
    output 0 and gradient 0.

    Args:
        query: ``(..., Hq, L, E)``, float16, bfloat16, float32 or float64. Leading dimensions broadcast against
            those of key and value. A tensor of two dimensions is one head.
        key: ``(..., Hkv, S, E)``, dtype and device of query.
        value: ``(..., Hkv, S, Ev)``, likewise.
        attn_mask: Broadcastable to ``(..., Hq, L, S)``. Bool: True where the key takes part. Floating: a bias
            in log-weight space. It multiplies the weight by ``exp(attn_mask)`` and is never added to z, so
            ``-inf`` masks, and ALiBi or relative biases mean what they mean for softmax. May be combined with
            `is_causal`.
        dropout_p: Probability of dropping an attention weight, in [0, 1]. Applied whenever it is not 0.
        is_causal: Query i sees keys up to its own position.
        scale: Factor on the dot product; ``1 / sqrt(E)`` if None.
        enable_gqa: Let ``Hq`` be a multiple of ``Hkv``: query head h reads key head ``h // (Hq // Hkv)``.
        form: ``"expressive"`` for f above, ``"squared"`` for its leading order f(z) = z^2.
        causal_alignment: With `is_causal`, ``"upper_left"``: query i sees keys j <= i, as in torch;
            ``"lower_right"``: j <= i + S - L, for queries that continue a cache.
        return_normalizer: Also return N. Partial results over different keys merge exactly:
            ``o = (N1 * o1 + N2 * o2) / (N1 + N2)``.
        backend: Name of the backend; None picks the first that supports the call. One asked for by name is
            never replaced by another.

    Returns:
        Output ``(..., Hq, L, Ev)`` in the dtype of query. With `return_normalizer` also N ``(..., Hq, L)`` in
        float32 (float64 for float64 inputs); both are differentiable.

    Raises:
        TypeError: An argument is not of the type above.
        ValueError: A dtype, device, shape, number or name does not fit; the message names the argument.
        NotImplementedError: The backend asked for does not support the call.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 16, 8).unbind(0)
        >>> expressive_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 4, 16, 8])
    """
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace cannot record expressive attention; use torch.compile or torch.export"
        )
    _check_types(query=query, key=key, value=value)
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # of which "meta" has none
        query, key, value = ops.autocast_inputs(query, key, value)
    _check_tensors(query, key, value)
    _check_settings(dropout_p, scale, form, causal_alignment, backend)

    (rows, width), keys = query.shape[-2:], key.shape[-2]
    dims = max(query.ndim, key.ndim, value.ndim)
    leading = query.shape[:-2]
    if len(leading) == 2 and leading[1] and leading == key.shape[:-2] == value.shape[:-2]:
        batch, heads = leading[:1], leading[1]  # as nearly always; what follows would change nothing
    else:
        query, key, value = (_with_dims(x, max(dims, 3)) for x in (query, key, value))
        batch = _batch_shape(query, key, value)
        heads, kv_heads = _heads(query, key, value, enable_gqa)
        query = _fold_batch(query, batch, heads)
        key, value = _fold_batch(key, batch, kv_heads), _fold_batch(value, batch, kv_heads)
    mask = None
    if attn_mask is not None:
        _check_mask(attn_mask, query, (*batch, heads, rows, keys))
        mask = _fold_mask(_with_dims(attn_mask, max(dims, 3)), batch)
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    diagonal = None
    if is_causal:
        diagonal = keys - rows if causal_alignment == "lower_right" else 0

    for listener in listeners:
        listener(Call(query, key, value, mask, diagonal, scale, form))
    head_dim = max(width, value.shape[-1])
    chosen = _choose(Problem(query.device.type, query.dtype, dropout_p, _differentiated_by_func(), head_dim), backend)
    if chosen == "reference" and query.device.type != "meta":  # which has shapes alone, and those of the operator
        with torch.autocast(query.device.type, enabled=False):
            results = reference.forward(query, key, value, mask, diagonal, scale, form, dropout_p)
    else:
        results = ops.attention(query, key, value, mask, diagonal, scale, form, chosen)

    output, normalizer, peak = results
    shape = (*batch, heads, rows) if dims > 2 else (rows,)
    if dims != 4:
        output = output.reshape(*shape, value.shape[-1])
    if not return_normalizer:
        return output
    if mask is not None and mask.is_floating_point():
        normalizer = normalizer * torch.exp(peak)
    return output, normalizer.reshape(shape)


# ---- checks ----


def _check_types(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {x.device}")
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(x.shape)}")
    if query.shape[-1] == 0:
        raise ValueError(f"query must have a head dimension E of at least 1, got shape {tuple(query.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have the head dimension E = {query.shape[-1]} of query, got shape {tuple(key.shape)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have the length S = {key.shape[-2]} of key, got shape {tuple(value.shape)}")


def _check_settings(
    dropout_p: float, scale: float | None, form: str, causal_alignment: str, backend: str | None
) -> None:
    if not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    check_form(form)
    if causal_alignment not in _ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {_ALIGNMENTS}, got {causal_alignment!r}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {tuple(BACKENDS)} or None, got {backend!r}")


def _check_mask(attn_mask: Tensor, query: Tensor, scores: tuple[int, ...]) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in _DTYPES:
        raise ValueError(
            f"attn_mask must be bool (True: the key takes part) or floating (a bias in log-weight space), "
            f"got {attn_mask.dtype}"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the device of query, {query.device}, got {attn_mask.device}")
    shape = tuple(attn_mask.shape)
    fits = len(shape) <= len(scores) and all(
        size in (1, wanted) for size, wanted in zip(shape[::-1], scores[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask must be broadcastable to (..., Hq, L, S) = {scores}, got shape {shape}")


def _batch_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    shapes = [tuple(x.shape[:-3]) for x in (query, key, value)]
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(
            f"the leading dimensions of query, key and value must broadcast, got {shapes[0]}, {shapes[1]} and "
            f"{shapes[2]}"
        ) from None


def _heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, int]:
    """The numbers of heads of the call, of query and of key and value: a single head broadcasts."""
    hq, hk, hv = (x.shape[-3] for x in (query, key, value))
    if 0 in (hq, hk, hv):
        raise ValueError(f"query, key and value must have at least one head, got {hq}, {hk} and {hv}")
    if hk != hv and 1 not in (hk, hv):
        raise ValueError(f"value must have the {hk} heads of key, got {hv}")
    kv = max(hk, hv)
    if hq == kv or kv == 1:
        return hq, kv
    if hq == 1:
        return kv, kv
    if not enable_gqa:
        hint = f"; with enable_gqa=True, query may have a multiple of {kv}" if hq % kv == 0 else ""
        raise ValueError(f"key must have the {hq} heads of query, got {kv}{hint}")
    if hq % kv:
        raise ValueError(f"query must have a multiple of the {kv} heads of key with enable_gqa=True, got {hq}")
    return hq, kv


# ---- one shape: the one of backends.problem ----


def _with_dims(x: Tensor, dims: int) -> Tensor:
    return x if x.ndim >= dims else x.reshape((1,) * (dims - x.ndim) + tuple(x.shape))


def _fold_batch(x: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """``(..., H, L, E)`` as ``(B, H, L, E)``, broadcast without a copy where strides allow it."""
    if x.shape[:-2] != (*batch, heads):
        x = x.expand(*batch, heads, -1, -1)
    return x if x.ndim == 4 else x.reshape(math.prod(batch), *x.shape[-3:])


def _fold_mask(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``(..., Hq | 1, L | 1, S | 1)`` as ``(B | 1, ...)``: only its batch dimensions are ever expanded."""
    if mask.ndim == 4:
        return mask
    leading = tuple(mask.shape[:-3])
    if all(size == 1 for size in leading):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*batch, -1, -1, -1).reshape(math.prod(batch), *mask.shape[-3:])


# ---- choice of the backend ----


def _choose(problem: Problem, backend: str | None) -> str:
    if backend is not None:
        reason = BACKENDS[backend].supports(problem)
        if reason is not None:
            raise NotImplementedError(f"backend {backend!r} does not support this call: {reason}")
        return backend
    return next(name for name in AUTOMATIC if BACKENDS[name].supports(problem) is None)


def _differentiated_by_func() -> bool:
    """Whether a torch.func or forward-mode derivative is active: operators with registered gradients know neither."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = _functorch.get_interpreter_stack() or []
    return any(level.key() != _functorch.TransformType.Vmap for level in stack)
