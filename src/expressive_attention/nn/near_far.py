"""Self-attention that is expressive for near keys and squared for far ones, at linear cost."""

from __future__ import annotations

from torch import Tensor

from ..near_far import check_near, near_far_attention
from .attention import SelfAttention
from .cache import Cache, KeyValueCache, NearFarCache, SquaredCache
from .positions import position_codes

__all__ = ["NearFarAttention"]


class NearFarAttention(SelfAttention):
    """Causal multi-head self-attention with the weights of `near_far_attention`, z^2 / (1 + z^2) near and z^2 far.

    Its parameters are those of a `SelfAttention` with the mechanism ``"expressive"``, whose state dict it takes. Where
    all abs(z) are small, both compute the same. Time and memory are linear in the length.

    Args:
        embed_dim: Width D of the input, a multiple of `num_heads`.
        num_heads: H; head dimension E = D / H.
        window: Number of keys that are near, at least 1: a position's own and those right before it.
        position: ``"rope"``, ``"alibi"``, ``"learned_alibi"`` or ``"none"``, or several joined by a plus. Learned and
            sinusoidal positions are the same as ``"none"`` here, as in `SelfAttention`.
        gain: Learn a factor g per head on z: how much near and far keys count beside each other follows from it.
        initial_gain: Its value at the start.
        qk_norm: Divide queries and keys by their root mean square, before positions and gain.
        bias: Bias of the output projection.
        qkv_bias: Bias of the projections to query, key and value.
        rope_base: Base of the rotary positions.

    Raises:
        TypeError: `window` is no integer.
        ValueError: A number or name does not fit, or positions are ``"relative"``, which have no linear form.

    Example:
        >>> import torch
        >>> attention = NearFarAttention(16, 2, window=4, position="rope")
        >>> attention(torch.randn(3, 7, 16)).shape
        torch.Size([3, 7, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int,
        *,
        position: str = "none",
        gain: bool = False,
        initial_gain: float = 1.0,
        qk_norm: bool = False,
        bias: bool = True,
        qkv_bias: bool = True,
        rope_base: float = 10_000.0,
    ) -> None:
        check_near(window)
        if "relative" in position_codes(position):
            raise ValueError(f"position must be without 'relative', which has no linear form, got {position!r}")
        super().__init__(
            embed_dim, num_heads, position=position, gain=gain, initial_gain=initial_gain, qk_norm=qk_norm, bias=bias,
            qkv_bias=qkv_bias, rope_base=rope_base,
        )  # fmt: skip
        self.mechanism = "near_far"  # none of MECHANISMS: nothing takes it for one of them
        self.window = window

    def extra_repr(self) -> str:
        """Heads, window and positions."""
        return f"num_heads={self.num_heads}, window={self.window}, position={self.position!r}"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """X ``(..., L, D)`` to ``(..., L, D)``.

        Args:
            x: Input ``(..., L, D)``.
            attn_mask: None; single keys cannot be masked in a state.
            cache: Keys and values of the positions before x, or what they amount to; those of x are added.

        Raises:
            ValueError: A mask is given, or a `SquaredCache`, or a `NearFarCache` of another window.
        """
        if attn_mask is not None:
            raise ValueError("attn_mask must be None: far keys cannot be masked one by one")
        if isinstance(cache, SquaredCache):
            raise ValueError("cache must be a NearFarCache or a KeyValueCache, got a SquaredCache")
        if isinstance(cache, NearFarCache) and cache.window != self.window:
            raise ValueError(f"cache must have the window of the attention, {self.window}, got {cache.window}")
        q, k, v = self.heads(x, 0 if cache is None else cache.length)
        log_decay = self._log_decay()
        slopes = None if log_decay is None else -log_decay.float()
        if isinstance(cache, NearFarCache):
            y = cache.attend(q, k, v, slopes)
        else:
            if cache is not None:
                k, v = cache.append(k, v)
            y = near_far_attention(q, k, v, self.window, alibi_slopes=slopes)
        return self.out(y.transpose(-3, -2).flatten(-2))

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for at most so many positions: the smaller one of a `NearFarCache` and a `KeyValueCache`.

        Args:
            capacity: Largest number of positions.
        """
        weight = self.qkv.weight
        dim = weight.shape[1] // self.num_heads
        if NearFarCache.saves_memory(self.window, dim, capacity, weight.dtype):
            return NearFarCache(self.window)
        return KeyValueCache(capacity)
