"""Attention over sequences of different lengths that lie one after the other, without padding."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .backends import cpu
from .call import Call, Visibility, accumulation_dtype
from .checks import (
    check_dense,
    check_lengths,
    check_settings,
    check_slopes,
    check_starts,
    check_tensors,
    check_tracing,
    check_types,
    check_window,
)
from .functional import (
    cast_for_autocast,
    choose,
    expressive_attention,
    may_need_gradient,
    normalizer_of,
    run,
    with_learned_slopes,
    with_window,
)
from .overrides import listening, takers, tell

__all__ = ["expressive_attention_varlen"]


@overload
def expressive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    log_decay: Tensor | None = None,
    causal_alignment: str = "lower_right",
    form: str = "expressive",
    return_normalizer: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def expressive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    log_decay: Tensor | None = None,
    causal_alignment: str = "lower_right",
    form: str = "expressive",
    return_normalizer: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def expressive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    log_decay: Tensor | None = None,
    causal_alignment: str = "lower_right",
    form: str = "expressive",
    return_normalizer: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`expressive_attention` of B sequences of different lengths, packed one after the other without padding.

    The arguments are those of ``flash_attn_varlen_func`` of the package flash-attn, with the same names, order and
    meaning, causal masks and windows aligned to the lower right included. Query i of sequence b, of L queries and
    S keys, is at the place ``p_i = i + S - L`` among its keys. Heads of queries may be a multiple of those of keys.

    Rows that belong to no sequence, after the last one, give output 0 and gradient 0.

    Args:
        q: ``(T, Hq, E)``, float16, bfloat16, float32 or float64: the queries of all sequences.
        k: ``(U, Hkv, E)``, their keys, dtype and device of q.
        v: ``(U, Hkv, Ev)``, likewise.
        cu_seqlens_q: Where the queries of each sequence start in q, and where the last ones end: ``(B + 1,)`` of int32
            or int64, from 0 to at most T.
        cu_seqlens_k: The same for keys.
        max_seqlen_q: The most queries that a sequence has, or more.
        max_seqlen_k: The most keys that a sequence has, or more.
        dropout_p: Probability of dropping an attention weight, in [0, 1]. Applied whenever it is not 0.
        softmax_scale: Factor on the dot product; ``1 / sqrt(E)`` if None. There is no softmax: the name is the one
            that callers know.
        causal: Query i sees the keys ``j <= p_i``.
        window_size: ``(left, right)``: query i sees the keys ``p_i - left <= j <= p_i + right``; -1 is no limit.
        alibi_slopes: Weights are multiplied by ``exp(-slope |p_i - j|)``: ``(Hq,)`` or ``(B, Hq)``, float32, at least
            0. They have a gradient on the backends `cpu` and `reference`, without `log_decay`.
        seqused_k: The first keys of each sequence that exist, ``(B,)`` of int32 or int64; S above is then this number.
        log_decay: Decay of each token, as in `expressive_attention`: ``(U, Hq)`` or ``(U, Hkv)``, floating, at most 0,
            differentiable, with `causal`. Sequences then run one after the other, and starts are read by the host.
        causal_alignment: ``"lower_right"``, or ``"upper_left"`` for ``p_i = i``.
        form: ``"expressive"`` or ``"squared"``.
        return_normalizer: Also return N.
        backend: Name of the backend; None picks the first that supports the call. `cpu` and `triton` take all sequences
            at once; the other ones run them one after the other, `reference` as one with a mask of T x U.

    Returns:
        Output ``(T, Hq, Ev)``, contiguous, in the dtype of q. With `return_normalizer` also N ``(Hq, T)`` in float32
        (float64 for float64 inputs); both are differentiable.

    Raises:
        TypeError: An argument is not of the type above.
        ValueError: A dtype, device, shape, number or name does not fit; the message names the argument. Starts and
            lengths on a GPU are not read, which would wait for it: no memory beside q, k and v is touched, but rows
            that they do not describe are 0.
        NotImplementedError: The backend asked for does not support the call.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 9, 2, 8).unbind(0)  # sequences of 4 and of 5
        >>> starts = torch.tensor([0, 4, 9], dtype=torch.int32)
        >>> expressive_attention_varlen(q, k, v, starts, starts, 5, 5, causal=True).shape
        torch.Size([9, 2, 8])
    """
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seqused_k, log_decay)
    if takers or has_torch_function_variadic(*tensors):
        told = listening(tensors)
        if told or takers:
            return tell(
                expressive_attention_varlen, told, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                dropout_p, softmax_scale, causal, window_size, alibi_slopes=alibi_slopes, seqused_k=seqused_k,
                log_decay=log_decay, causal_alignment=causal_alignment, form=form,
                return_normalizer=return_normalizer, backend=backend,
            )  # fmt: skip
    check_tracing()
    check_types(q=q, k=k, v=v)
    q, k, v = cast_for_autocast(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dense(name, x)
        if x.ndim != 3:
            raise ValueError(
                f"{name} must have three dimensions, (tokens, heads, head dimension), got shape {tuple(x.shape)}"
            )
    check_tensors(q, k, v, ("q", "k", "v"), rows=0)
    check_settings(dropout_p, softmax_scale, form, causal_alignment, backend, scale_name="softmax_scale")
    check_window(window_size)
    (rows, heads, width), keys, kv_heads = q.shape, k.shape[0], k.shape[1]
    if v.shape[1] != kv_heads:
        raise ValueError(f"v must have the {kv_heads} heads of k, got {v.shape[1]}")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of the {kv_heads} heads of k, at least one, got {heads}")
    check_starts("cu_seqlens_q", cu_seqlens_q, q, rows, "max_seqlen_q", max_seqlen_q)
    check_starts("cu_seqlens_k", cu_seqlens_k, q, keys, "max_seqlen_k", max_seqlen_k)
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must have the shape {(batch + 1,)} of cu_seqlens_q, got {tuple(cu_seqlens_k.shape)}"
        )
    visibility = with_window(Visibility(None, 0 if causal else None, causal_alignment == "lower_right"), window_size)
    if seqused_k is not None:
        check_lengths("seqused_k", seqused_k, q, keys)
        if seqused_k.shape != (batch,):
            raise ValueError(f"seqused_k must have shape {(batch,)}, got {tuple(seqused_k.shape)}")
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q, heads)
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes must have shape {(heads,)} or {(batch, heads)}, got {tuple(alibi_slopes.shape)}"
            )
        alibi_slopes = alibi_slopes.reshape(-1, heads)
    visibility = visibility.but(
        slopes=alibi_slopes, key_lengths=seqused_k, query_starts=cu_seqlens_q, key_starts=cu_seqlens_k,
        longest_query=max_seqlen_q, longest_key=max_seqlen_k,
    )  # fmt: skip
    if log_decay is not None:
        check_types(log_decay=log_decay)
        shapes = dict.fromkeys([(keys, heads), (keys, kv_heads)])
        if tuple(log_decay.shape) not in shapes:
            accepted = " or ".join(map(str, shapes))
            raise ValueError(f"log_decay must have shape {accepted}, got {tuple(log_decay.shape)}")
        options = {
            "dropout_p": dropout_p, "is_causal": causal, "scale": softmax_scale, "form": form, "backend": backend,
            "causal_alignment": causal_alignment, "window_size": window_size,
        }  # fmt: skip
        output, normalizer = _one_by_one(q, k, v, visibility, log_decay, options)
        return (output, normalizer) if return_normalizer else output
    scale = 1.0 / math.sqrt(width) if softmax_scale is None else float(softmax_scale)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    call = Call(query, key, value, None, visibility, scale, form, dropout_p)
    if alibi_slopes is not None and may_need_gradient(alibi_slopes):
        call = _with_learned_slopes(call, backend)
    result = run(call, backend)
    output = result.output.squeeze(0).transpose(0, 1).contiguous()
    return (output, normalizer_of(result).squeeze(0)) if return_normalizer else output


def _with_learned_slopes(call: Call, backend: str | None) -> Call:
    """The call with slopes in what has a gradient."""
    chosen = choose(call, backend)
    if chosen == "reference":  # plain torch, of which autograd sees all
        return call
    if backend is None and cpu.declines(call) is None:
        chosen = "cpu"
    if chosen != "cpu":
        raise ValueError(
            f"alibi_slopes must not require a gradient: backend {chosen!r} has none of them for packed sequences"
        )
    return with_learned_slopes(call, chosen)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, log_decay: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output ``(T, Hq, Ev)`` and normalizer ``(Hq, T)`` of sequences that are calls of their own."""
    outputs, normalizers, end = [], [], 0
    for rows, columns, own in visibility.sequences():
        query, key, value = (x[part].transpose(0, 1) for x, part in ((q, rows), (k, columns), (v, columns)))
        slopes = None if own.slopes is None else own.slopes[0]
        output, normalizer = expressive_attention(
            query, key, value, enable_gqa=True, alibi_slopes=slopes, log_decay=log_decay[columns].transpose(0, 1),
            return_normalizer=True, **options,
        )  # fmt: skip
        outputs.append(output.transpose(0, 1))
        normalizers.append(normalizer)
        end = rows.stop
    rest = q.shape[0] - end
    dtype = accumulation_dtype(q.dtype)
    outputs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    normalizers.append(q.new_zeros(q.shape[1], rest, dtype=dtype))
    return torch.cat(outputs), torch.cat(normalizers, 1)
