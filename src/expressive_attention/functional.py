"""The public function: checks its arguments, brings them to one shape, picks a backend and runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import call_log, ops, sharding
from .backends import AUTOMATIC, BACKENDS, cpu, dropout, linear
from .blocks import list_blocks
from .call import Call, Result, Visibility, accumulation_dtype, lower_whole, outline, reason_to_decline
from .checks import (
    ALIGNMENTS,
    check_blocks,
    check_lengths,
    check_log_decay,
    check_mask,
    check_relative,
    check_settings,
    check_slopes,
    check_tensors,
    check_tracing,
    check_types,
    check_window,
)
from .overrides import as_causality, listening, takers, tell

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["choose", "expressive_attention", "match_heads", "may_need_gradient", "run", "with_learned_slopes"]


# The visibilities of calls without a window are made once: a small call takes not much longer than they do.
_VISIBILITIES = {
    (causal, alignment): Visibility(None, 0 if causal else None, alignment == "lower_right")
    for causal in (False, True)
    for alignment in ALIGNMENTS
}

_NO_WINDOW = (-1, -1)

# No sequence is as long.
_LONGEST = 2**30

# Run with every call, before it is computed.
call_hooks: list[Callable[[Call], None]] = []


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
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    log_decay: Tensor | None = None,
    relative_bias: Tensor | None = None,
    block_mask: BlockMask | None = None,
    tolerance: float | None = None,
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
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    log_decay: Tensor | None = None,
    relative_bias: Tensor | None = None,
    block_mask: BlockMask | None = None,
    tolerance: float | None = None,
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
    window_size: tuple[int, int] = _NO_WINDOW,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    log_decay: Tensor | None = None,
    relative_bias: Tensor | None = None,
    block_mask: BlockMask | None = None,
    tolerance: float | None = None,
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
        dropout_p: Probability of dropping an attention weight, in [0, 1]. Applied whenever it is not 0. Kept weights
            are divided by 1 - dropout_p. The generator of torch for the device decides which weights are dropped.
        is_causal: Query i sees keys up to its own position.
        scale: Factor on the dot product; ``1 / sqrt(E)`` if None.
        enable_gqa: Let ``Hq`` be a multiple of ``Hkv``: query head h reads key head ``h // (Hq // Hkv)``.
        form: ``"expressive"`` for f above, ``"squared"`` for its leading order f(z) = z^2.
        causal_alignment: With `is_causal`, ``"upper_left"``: query i sees keys j <= i, as in torch;
            ``"lower_right"``: j <= i + S - L, for queries that continue a cache. It also says what the place p_i of
            query i is among the keys for the two arguments that follow: i, or i + S - L.
        window_size: ``(left, right)``: query i sees the keys ``p_i - left <= j <= p_i + right``; -1 is no limit. With
            `is_causal`, none after its place.
        alibi_slopes: ALiBi (Press et al., arXiv 2108.12409): weights are multiplied by ``exp(-slope |p_i - j|)``.
            ``(Hq,)`` or broadcastable to ``(..., Hq)``, float32, at least 0. Where they are learned, and on a GPU with
            a mask, they are a float mask of L x S, but for the C kernels.
        key_lengths: How many of the keys of each sequence exist, in a cache that is filled in part: broadcastable to
            ``(...)``, int32 or int64, from 0 to S. Then S above is this number.
        log_decay: Decay of each token, as in gated linear attention (arXiv 2312.06635): the weight of key j for query i
            is multiplied by ``exp(sum of log_decay over the keys after j, up to p_i)``. Broadcastable to
            ``(..., Hq, S)``, or of the heads of key, ``(..., Hkv, S)``, floating, at most 0, differentiable, with
            `is_causal`. Except in linear time (form "squared"), it is a float mask of L x S.
        relative_bias: Bias by distance, as T5 and `nn.RelativeBias` have it: the weight of key j for query i is
            multiplied by ``exp(relative_bias[..., h, p_i - j + M - 1])``. ``(Hq, 2 M - 1)``, or broadcastable to
            ``(..., Hq, 2 M - 1)``, with M at least L and S, floating, differentiable. Except in the C kernels, it is a
            float mask of L x S.
        block_mask: A `torch.nn.attention.flex_attention.BlockMask`: queries see the keys of the blocks that it lists
            for them, in those listed in part as far as its `mask_mod` says. The kernels in C and in Triton read no
            other blocks. For tensors ``(..., H, L, E)``, its B is 1 or the product of the leading dimensions.
            May be combined with all of the above; a key then has to pass everything.
        tolerance: Leave blocks of keys out whose weights together are, by proof, at most this share of N in each row;
            in (0, 1). The output changes by at most ``2 * tolerance * max |v|``, see `expressive_attention.sparse`.
            Not together with weights that a mask, a bias, a window or dropout changes.
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
    tensors = (query, key, value, attn_mask, alibi_slopes, key_lengths, log_decay, relative_bias)
    if takers or has_torch_function_variadic(*tensors):
        told = listening(tensors)
        if told or takers:
            return tell(
                expressive_attention, told, query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa, form=form, causal_alignment=causal_alignment, window_size=window_size,
                alibi_slopes=alibi_slopes, key_lengths=key_lengths, log_decay=log_decay, relative_bias=relative_bias,
                block_mask=block_mask, tolerance=tolerance, return_normalizer=return_normalizer, backend=backend,
            )  # fmt: skip
    check_tracing()
    check_types(query=query, key=key, value=value)
    if torch.jagged in (query.layout, key.layout, value.layout):
        from .nested import nested_attention  # which needs this module

        of_dense = {"log_decay": log_decay, "relative_bias": relative_bias, "block_mask": block_mask}
        for name, x in {**of_dense, "tolerance": tolerance}.items():
            if x is not None:
                raise ValueError(f"{name} must be None for nested tensors")

        return nested_attention(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa, form=form, causal_alignment=causal_alignment, window_size=window_size,
            alibi_slopes=alibi_slopes, key_lengths=key_lengths, return_normalizer=return_normalizer, backend=backend,
        )  # fmt: skip
    query, key, value = cast_for_autocast(query, key, value)
    check_tensors(query, key, value)
    check_settings(dropout_p, scale, form, causal_alignment, backend)

    q, k, v = query.shape, key.shape, value.shape
    rows, width, keys = q[-2], q[-1], k[-2]
    dims = max(len(q), len(k), len(v))
    if len(q) == len(k) == len(v) == 4 and q[1] and q[0] == k[0] == v[0] and q[1] == k[1] == v[1]:
        batch, heads, kv_heads = q[:1], q[1], q[1]  # as nearly always; what follows would change nothing
    else:
        query, key, value = (with_dims(x, max(dims, 3)) for x in (query, key, value))
        batch = _batch_shape(query, key, value)
        heads, kv_heads = match_heads(query, key, value, enable_gqa)
        query = fold_batch(query, batch, heads)
        key, value = fold_batch(key, batch, kv_heads), fold_batch(value, batch, kv_heads)
    mask = None
    if attn_mask is not None:
        alone = not is_causal and window_size is _NO_WINDOW and alibi_slopes is None and key_lengths is None
        attn_mask, alignment = as_causality(attn_mask, rows, keys, query.device, alone)
        is_causal, causal_alignment = (True, alignment) if alignment else (is_causal, causal_alignment)
    if attn_mask is not None:
        check_mask(attn_mask, query, (*batch, heads, rows, keys))
        mask = fold_mask(with_dims(attn_mask, max(dims, 3)), batch)
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    visibility = _VISIBILITIES[bool(is_causal), causal_alignment]
    if window_size is not _NO_WINDOW:
        check_window(window_size)
        visibility = with_window(visibility, window_size)
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, query, keys)
        visibility = visibility.but(key_lengths=_expanded("key_lengths", key_lengths, batch).reshape(-1))
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, query, heads)
        slopes = alibi_slopes.unsqueeze(0)
        if alibi_slopes.ndim > 1:
            slopes = _expanded("alibi_slopes", alibi_slopes, (*batch, heads)).reshape(math.prod(batch), heads)
        visibility = visibility.but(slopes=slopes)
    call = Call(query, key, value, mask, visibility, scale, form, dropout_p)
    if log_decay is not None:
        check_log_decay(log_decay, query, (*batch, heads, rows, keys), kv_heads, bool(is_causal))
        call = call.but(log_decay=_fold_decay(log_decay, batch, kv_heads, keys))
    if relative_bias is not None:
        check_relative(relative_bias, query, (*batch, heads, rows, keys))
        call = call.but(relative_bias=_fold_relative(relative_bias, batch, heads, query.dtype))
    if block_mask is not None:
        check_blocks(block_mask, query, (*batch, heads, rows, keys))
        listed, tiles = list_blocks(block_mask, rows, keys)
        block_rows, block_keys = block_mask.BLOCK_SIZE
        visibility = visibility.but(listed=listed, tiles=tiles, block_rows=block_rows, block_keys=block_keys)
        call = call.but(visibility=visibility)
    if tolerance is not None:
        call = _within_tolerance(call, tolerance)
    if visibility.slopes is not None and may_need_gradient(visibility.slopes):
        call = with_learned_slopes(call, backend)

    result = run(call, backend)
    output = result.output
    if dims == 4 and not return_normalizer:
        return output
    shape = (*batch, heads, rows) if dims > 2 else (rows,)
    if dims != 4:
        output = output.reshape(*shape, value.shape[-1])
    return (output, normalizer_of(result).reshape(shape)) if return_normalizer else output


def _within_tolerance(call: Call, tolerance: float) -> Call:
    """The call with the blocks of keys that prove to be enough."""
    from . import sparse  # which is not needed otherwise

    sparse.check_tolerance(tolerance)
    seen = call.visibility
    others = {
        "attn_mask": call.attn_mask,
        "block_mask": seen.listed,
        "alibi_slopes": seen.slopes,
        "log_decay": call.log_decay,
        "relative_bias": call.relative_bias,
        "window_size": None if seen.left is None and seen.right in (0, None) else seen,
        "dropout_p": call.dropout_p or None,
    }
    for name, x in others.items():
        if x is not None:
            raise ValueError(
                f"tolerance must be None beside {name}: it bounds the weights of is_causal and key_lengths"
            )
    block_rows, block_keys = sparse.BLOCK_SIZE
    rows, keys = call.query.shape[2], call.key.shape[2]
    pattern = sparse.Seen(rows, keys, seen.right == 0, seen.lower_right, seen.key_lengths, call.scale, call.form)
    chosen = sparse.choose_blocks(call.query, call.key, pattern, tolerance, sparse.BLOCK_SIZE)
    return call.but(visibility=seen.but(listed=chosen.listed, block_rows=block_rows, block_keys=block_keys))


def run(call: Call, backend: str | None) -> Result:
    """The result of a call by the backend of that name; None: by the first that does not decline it."""
    for hook in call_hooks:
        hook(call)
    if call.dropout_p:
        call = call.but(dropout_seeds=sharding.replicated(dropout.draw(call.query), call.query))
    chosen = choose(call, backend)
    if call_log.ENABLED and not torch.compiler.is_compiling():
        call_log.log_call(call, chosen, backend)
    if call.log_decay is not None or call.relative_bias is not None:
        call = lower_whole(call, BACKENDS[chosen])  # here, where autograd sees the mask
    if chosen == "reference" and not call.query.is_meta:  # meta tensors carry only shapes: those of the operator
        with torch.autocast(call.query.device.type, enabled=False):
            return ops.reference_forward(call)
    return ops.attention(call, chosen)


def cast_for_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the dtype of the autocast region, if they are in one."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return query, key, value
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # of which "meta" has none
        query, key, value = ops.autocast_inputs(query, key, value)
    return query, key, value


def normalizer_of(result: Result) -> Tensor:
    """N: the normalizer of weights with their whole bias; backends leave out the largest."""
    return result.normalizer if result.bias_max is None else result.normalizer * torch.exp(result.bias_max)


# ---- shapes ----


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


def match_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, int]:
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


# ---- one shape: the one of call.Call ----


def with_dims(x: Tensor, dims: int) -> Tensor:
    """With leading dimensions of one, so that there are `dims`."""
    return x if x.ndim >= dims else x.reshape((1,) * (dims - x.ndim) + tuple(x.shape))


def fold_batch(x: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """``(..., H, L, E)`` as ``(B, H, L, E)``, broadcast without a copy where strides allow it."""
    if x.shape[:-2] != (*batch, heads):
        x = x.expand(*batch, heads, -1, -1)
    return x if x.ndim == 4 else x.reshape(math.prod(batch), *x.shape[-3:])


def fold_mask(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``(..., Hq | 1, L | 1, S | 1)`` as ``(B | 1, ...)``: only its batch dimensions are ever expanded."""
    if mask.ndim == 4:
        return mask
    leading = tuple(mask.shape[:-3])
    if all(size == 1 for size in leading):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*batch, -1, -1, -1).reshape(math.prod(batch), *mask.shape[-3:])


def _fold_decay(log_decay: Tensor, batch: tuple[int, ...], kv_heads: int, keys: int) -> Tensor:
    """``(..., H | 1, S | 1)`` as ``(B, H, S)``; heads of one number are heads of keys."""
    log_decay = with_dims(log_decay, 2)
    heads = log_decay.shape[-2]
    log_decay = log_decay.expand(*batch, kv_heads if heads == 1 else heads, keys)
    return log_decay.reshape(math.prod(batch), *log_decay.shape[-2:])


def _fold_relative(relative_bias: Tensor, batch: tuple[int, ...], heads: int, dtype: torch.dtype) -> Tensor:
    """``(..., Hq | 1, 2 M - 1)`` as ``(B | 1, Hq, 2 M - 1)``: of several dimensions of the batch, B."""
    relative_bias = with_dims(relative_bias, 3).to(accumulation_dtype(dtype))
    if all(size == 1 for size in relative_bias.shape[:-2]):
        return relative_bias.reshape(1, *relative_bias.shape[-2:]).expand(-1, heads, -1)
    size = relative_bias.shape[-1]
    return relative_bias.expand(*batch, heads, size).reshape(math.prod(batch), heads, size)


def with_learned_slopes(call: Call, backend: str | None) -> Call:
    """The call with slopes in what has a gradient: decays in linear time, in C biases by distance, or else a mask."""
    seen = call.visibility
    slopes, rows, keys = seen.slopes, call.query.shape[2], call.key.shape[2]
    assert slopes is not None
    if choose(call, backend) == "linear" and seen.key_lengths is None and (seen.lower_right or rows <= keys):
        log_decay = -slopes.unsqueeze(-1).expand(call.query.shape[0], -1, keys)
        if call.log_decay is not None:
            log_decay = log_decay + call.log_decay.repeat_interleave(slopes.shape[1] // call.log_decay.shape[1], 1)
        return call.but(visibility=seen.but(slopes=None), log_decay=log_decay)
    if backend in (None, "cpu") and call.log_decay is None and cpu.declines(outline(call)) is None:
        if seen.query_starts is not None:
            rows, keys = min(rows, seen.longest_query), min(keys, seen.longest_key)
        reach = max(rows, keys, 1)
        distance = torch.arange(1 - reach, reach, device=slopes.device).abs()
        relative = -slopes.to(accumulation_dtype(call.query.dtype)).unsqueeze(-1) * distance
        if call.relative_bias is not None:
            more = call.relative_bias.shape[-1] // 2 + 1 - reach
            relative = call.relative_bias + torch.nn.functional.pad(relative, (more, more))
        return call.but(visibility=seen.but(slopes=None), relative_bias=relative)
    mask, _ = seen.but(left=None, right=None).as_mask(call.attn_mask, call.query, call.key)
    return call.but(attn_mask=mask, visibility=seen.but(slopes=None))


def may_need_gradient(x: Tensor) -> bool:
    """Whether there may be a gradient of x to compute; tensors inside of torch.func and vmap do not tell."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return x.requires_grad and torch.is_grad_enabled()


def with_window(visibility: Visibility, window_size: tuple[int, int]) -> Visibility:
    """The visibility within the window, and within a causal mask, if it has one."""
    left, right = (None if size == -1 or size >= _LONGEST else size for size in window_size)
    if visibility.right is not None or right is not None:
        right = min(size for size in (visibility.right, right) if size is not None)
    return visibility.but(left=left, right=right)


def _expanded(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return x.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must be broadcastable to {shape}, got shape {tuple(x.shape)}") from None


# ---- choice of the backend ----


def choose(call: Call, backend: str | None) -> str:
    """The backend of that name, or the first that does not decline the call.

    Raises NotImplementedError if the one of that name declines it.
    """
    if backend is not None:
        reason = reason_to_decline(call, BACKENDS[backend])
        if reason is not None:
            raise NotImplementedError(f"backend {backend!r} does not support this call: {reason}")
        return backend
    if call.form == "squared" and linear.pays(call) and reason_to_decline(call, linear) is None:
        return "linear"
    call = outline(call)
    for name in AUTOMATIC:
        if BACKENDS[name].declines(call) is None:
            break
    else:
        raise AssertionError("the reference declines no call")
    if name == "blockwise" and call.query.is_cpu and not torch.compiler.is_compiling():
        cpu.warn_of_fallback()
    return name
