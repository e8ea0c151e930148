"""Multi-head self-attention by either mechanism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import expressive_attention
from .positions import POSITIONS, RotaryPositions, alibi_bias

__all__ = ["MECHANISMS", "HeadGain", "SelfAttention", "check_choice"]

MECHANISMS = ("expressive", "dot_product")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


class HeadGain(nn.Module):
    """One learnable factor per head, starting at 1: ``x_h * gain_h``.

    Args:
        num_heads: H.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """X ``(..., H, L, E)`` times the gain of its head."""
        return x * self.weight[:, None, None]


class SelfAttention(nn.Module):
    """Causal or full multi-head self-attention whose weights are expressive or softmax.

    With z = g_h q . k / sqrt(E) for both mechanisms, weights are proportional to z^2 / (1 + z^2)
    (``"expressive"``, Gros, arXiv 2407.18601) or to exp(z) (``"dot_product"``,
    torch's own `scaled_dot_product_attention`). Everything else is the same, so that two modules of the same
    seed differ in the mechanism alone.

    Args:
        embed_dim: Width D of the input, a multiple of `num_heads`.
        num_heads: H; head dimension E = D / H.
        mechanism: ``"expressive"`` or ``"dot_product"``.
        position: ``"none"``, ``"rope"`` or ``"alibi"``. Learned positions are added to the input, by
            `LearnedPositions`; ``"learned"`` here is the same as ``"none"``.
        gain: Learn a factor g per head on z, from 1.
        bias: Bias of the output projection.
        qkv_bias: Bias of the projections to query, key and value.
        is_causal: A position sees itself and what came before.
        dropout_p: Probability of dropping an attention weight, in training.
        rope_base: Base of the rotary positions.

    Raises:
        ValueError: A number or name does not fit.

    Example:
        >>> attention = SelfAttention(16, 2, mechanism="expressive", position="rope")
        >>> attention(torch.randn(3, 7, 16)).shape
        torch.Size([3, 7, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mechanism: str = "expressive",
        *,
        position: str = "none",
        gain: bool = False,
        bias: bool = True,
        qkv_bias: bool = True,
        is_causal: bool = True,
        dropout_p: float = 0.0,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        check_choice("mechanism", mechanism, MECHANISMS)
        check_choice("position", position, POSITIONS)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.num_heads = num_heads
        self.mechanism = mechanism
        self.position = position
        self.is_causal = is_causal
        self.dropout_p = dropout_p
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.rope = RotaryPositions(embed_dim // num_heads, rope_base) if position == "rope" else None
        self.gain = HeadGain(num_heads) if gain else None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """X ``(..., L, D)`` to ``(..., L, D)``.

        Args:
            x: Input ``(..., L, D)``.
            attn_mask: Broadcastable to ``(..., H, L, L)``: bool (True: takes part) or a bias in log-weight
                space, together with causality.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        if self.gain is not None:
            q = self.gain(q)
        if self.position == "alibi":
            bias = alibi_bias(self.num_heads, x.shape[-2], x.shape[-2], x.device).to(x.dtype)
            attn_mask = bias if attn_mask is None else _joined(attn_mask, bias)
        y = self._attend(q, k, v, attn_mask)
        return self.out(y.transpose(-3, -2).flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        if self.mechanism == "expressive":
            return expressive_attention(q, k, v, attn_mask, dropout_p, self.is_causal)
        if attn_mask is None:
            shape = q.shape
            if q.ndim > 4:  # torch's fused kernels take four dimensions
                q, k, v = (x.flatten(0, -4) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, None, dropout_p, self.is_causal).view(shape)
        if self.is_causal:  # torch takes either a mask or is_causal
            causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            attn_mask = _joined(causal, attn_mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p)


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """One mask that does what two do, of which either may be bool or a bias."""
    if a.dtype == b.dtype == torch.bool:
        return a & b
    if a.dtype == torch.bool:
        return torch.where(a, b, -torch.inf)
    if b.dtype == torch.bool:
        return torch.where(b, a, -torch.inf)
    return a + b
