"""torch's multi-head attention, its masks and its state dict, with expressive weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forms import check_form
from ..functional import expressive_attention
from ..masks import join_masks

__all__ = ["MultiheadAttention", "multi_head_attention_forward"]


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with expressive attention in the place of softmax (Gros, arXiv 2407.18601).

    Constructor, parameters, state dict and masks are torch's: in a bool mask **True means blocked**, unlike in
    `expressive_attention`. A float mask multiplies the weight by its exponential, which for softmax is the same as to
    add it to the score. So `-inf` blocks in both.

    It stands for torch's class inside `torch.nn.TransformerEncoderLayer`, `TransformerDecoderLayer` and
    `Transformer`, whose fused inference path would compute softmax without calling it: this class keeps them from
    it. To go on with the weights of a model that exists, load its state dict or use `integrations.convert`.

    Differences: a query whose keys are all blocked gives 0 before the output projection, where torch gives NaN;
    `add_zero_attn` adds a key of zeros, which expressive weights never choose; `is_causal` works without a mask, too.
    Nested tensors are an error.

    Args:
        embed_dim: Width D of the model.
        num_heads: Heads H; D must be a multiple.
        dropout: Probability of dropping an attention weight, in training.
        bias: Bias of the input and output projections.
        add_bias_kv: Learn a key and a value that are appended to each sequence.
        add_zero_attn: Append a key and a value of zeros to each sequence.
        kdim: Width of keys; D if None.
        vdim: Width of values; D if None.
        batch_first: Input and output are ``(N, L, D)``, not ``(L, N, D)``.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        form: ``"expressive"`` or ``"squared"``, as in `expressive_attention`.

    Example:
        >>> attention = MultiheadAttention(16, 2, batch_first=True)
        >>> x = torch.randn(3, 7, 16)
        >>> output, weights = attention(x, x, x)
        >>> output.shape, weights.shape
        (torch.Size([3, 7, 16]), torch.Size([3, 7, 7]))
    """

    form = "expressive"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        form: str = "expressive",
    ) -> None:
        check_form(form)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.form = form

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Whether keys and values are as wide as queries; False for torch's layers, whose fused path computes softmax.

        They take it only where this is True. Torch's own code of this class and PEFT, which adapts no others, are told
        how it is; not so PEFT's attribute of this name, which passes it on to torch's layers.
        """
        if torch.compiler.is_compiling():
            return False
        asked_by = sys._getframe(1)
        room = asked_by.f_globals.get("__name__", "")
        is_told = room == nn.MultiheadAttention.__module__ or room.startswith("peft.")
        return is_told and asked_by.f_code.co_name != "_qkv_same_embed_dim" and self._has_same_widths

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, same: bool) -> None:
        self._has_same_widths = same

    def extra_repr(self) -> str:
        """Heads, mechanism and form."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, mechanism='expressive', form={self.form!r}"

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(
            "torch.jit.script cannot compile expressive attention; use torch.compile or torch.export"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention from queries to keys, and the weights if asked for.

        Args:
            query: ``(L, N, D)``, ``(N, L, D)`` with `batch_first`, or ``(L, D)``.
            key: ``(S, N, kdim)``, ``(N, S, kdim)`` or ``(S, kdim)``.
            value: ``(S, N, vdim)``, ``(N, S, vdim)`` or ``(S, vdim)``.
            key_padding_mask: ``(N, S)`` or ``(S,)``: bool (True: blocked) or a bias in log-weight space.
            need_weights: Return the weights, too. Without them it is faster and needs memory linear in S.
            attn_mask: ``(L, S)`` or ``(N H, L, S)``: bool (True: blocked) or a bias in log-weight space.
            average_attn_weights: Return the mean weights over heads.
            is_causal: `attn_mask`, if given, is the causal mask, and need not be looked at.

        Returns:
            Output, shaped like query; weights ``(N, L, S)``, or ``(N, H, L, S)`` of each head, without N where query
            has none, or None.

        Raises:
            ValueError: A shape or dtype does not fit; the message names the argument.
        """
        _check_inputs(query, key, value)
        batch_first = self.batch_first and query.ndim == 3
        if batch_first:
            query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        output, weights = multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k,
            self.bias_v, self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias, self.training,
            key_padding_mask, need_weights, attn_mask, self.in_proj_weight is None, self.q_proj_weight,
            self.k_proj_weight, self.v_proj_weight, average_attn_weights=average_attn_weights, is_causal=is_causal,
            form=self.form, gain=getattr(self, "expressive_gain", None),
        )  # fmt: skip
        return output.transpose(0, 1) if batch_first else output, weights


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    form: str = "expressive",
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward` with expressive weights: same arguments, same masks.

    Sequence first: query ``(L, N, D)`` or ``(L, D)``, key and value ``(S, N, ...)`` or ``(S, ...)``; see
    `MultiheadAttention` for masks and for what is returned. `static_k` and `static_v` are ``(N H, S, E)``; `gain` is a
    factor ``(H,)`` on the queries of each head.

    Raises:
        ValueError: A shape or dtype does not fit; the message names the argument.
    """
    _check_inputs(query, key, value)
    if query.shape[-1] != embed_dim_to_check:
        raise ValueError(f"query must have the width {embed_dim_to_check}, got {tuple(query.shape)}")
    unbatched = query.ndim == 2
    if unbatched:
        query, key, value = _each(lambda x: x.unsqueeze(1), query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    (length, batch, width), keys = query.shape, key.shape[0]
    keep = _merged(attn_mask, key_padding_mask, is_causal, (batch, num_heads, length, keys))
    weights_in = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    q, k, v = _projected(query, key, value, weights_in, in_proj_bias)
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, extra.expand(1, batch, -1)]) for x, extra in ((k, bias_k), (v, bias_v)))
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))  # (N, H, L, E)
    q = q if gain is None else q * gain[:, None, None]
    if static_k is not None:
        k = static_k.unflatten(0, (batch, num_heads))
    if static_v is not None:
        v = static_v.unflatten(0, (batch, num_heads))
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    if (appended := k.shape[-2] - keys) > 0 and (keep is not None or is_causal):
        # Everyone may see what is appended. For is_causal, which speaks of positions, that takes a mask.
        if is_causal:
            causal = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril()
            keep, is_causal = causal if keep is None else join_masks(causal, keep), False
        assert keep is not None
        keep = F.pad(keep.expand(*keep.shape[:-1], keys), (0, appended), value=keep.dtype == torch.bool)

    dropout_p = dropout_p if training else 0.0
    weights = None
    if need_weights:
        every_key = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:-1], k.shape[-2])
        weights = expressive_attention(q, k, every_key, keep, is_causal=is_causal, form=form)
        weights = F.dropout(weights, dropout_p)
        heads = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights.squeeze(0) if unbatched else weights
    else:
        heads = expressive_attention(q, k, v, keep, dropout_p, is_causal, form=form)
    output = F.linear(heads.permute(2, 0, 1, 3).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    return output.squeeze(1) if unbatched else output, weights


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested:
            raise ValueError(
                f"{name} must not be a nested tensor; build torch.nn.TransformerEncoder with enable_nested_tensor=False"
            )
        if x.ndim != query.ndim or x.ndim not in (2, 3):
            raise ValueError(f"query, key and value must all have 2 or all 3 dimensions, got {name} {tuple(x.shape)}")


def _each(
    change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All three changed; what was the same tensor stays so."""
    changed = {id(x): change(x) for x in (query, key, value)}
    return changed[id(query)], changed[id(key)], changed[id(value)]


def _projected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | tuple[Tensor | None, ...] | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``(L, N, D)``, keys and values ``(S, N, D)``; in one product where all three come from one tensor."""
    if isinstance(weights, Tensor) and query is key and key is value:
        q, k, v = F.linear(query, weights, bias).chunk(3, -1)
        return q, k, v
    parts = weights.chunk(3) if isinstance(weights, Tensor) else weights
    if parts is None or any(part is None for part in parts):
        raise ValueError("in_proj_weight must be given, or with use_separate_proj_weight those of query, key and value")
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True) if w is not None)
    return q, k, v


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, shape: tuple[int, int, int, int]
) -> Tensor | None:
    """Both of torch's masks as one of `expressive_attention`, broadcastable to ``(N, H, L, S)``.

    With `is_causal`, `attn_mask` is the causal mask and is left out.
    """
    batch, heads, length, keys = shape
    keep = None
    if attn_mask is not None:
        if attn_mask.shape not in {(length, keys), (batch * heads, length, keys)}:
            raise ValueError(
                f"attn_mask must have the shape {(length, keys)} or {(batch * heads, length, keys)}, "
                f"got {tuple(attn_mask.shape)}"
            )
        if not is_causal:
            keep = _kept("attn_mask", attn_mask)
            keep = keep.unflatten(0, (batch, heads)) if keep.ndim == 3 else keep
    if key_padding_mask is not None:
        if key_padding_mask.shape != (batch, keys):
            raise ValueError(
                f"key_padding_mask must have the shape {(batch, keys)}, got {tuple(key_padding_mask.shape)}"
            )
        padding = _kept("key_padding_mask", key_padding_mask)[:, None, None, :]
        keep = padding if keep is None else join_masks(keep, padding)
    return keep


def _kept(name: str, mask: Tensor) -> Tensor:
    """A mask of torch's modules, in which True is blocked, as `expressive_attention` takes it."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise ValueError(f"{name} must be of dtype bool or floating point, got {mask.dtype}")
    return mask
