"""Multi-head self-attention by either mechanism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import expressive_attention
from ..masks import join_masks
from .cache import Cache, KeyValueCache, NearFarCache, SquaredCache
from .mechanisms import attend, check_mechanism
from .positions import LearnedAlibi, RelativeBias, RotaryPositions, alibi_bias, alibi_slopes, position_codes

__all__ = ["HeadGain", "SelfAttention", "check_choice"]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


class HeadGain(nn.Module):
    """One learnable factor per head: ``x_h * gain_h``.

    Args:
        num_heads: H.
        initial: Its value at the start.
    """

    def __init__(self, num_heads: int, initial: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_heads,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        """X ``(..., H, L, E)`` times the gain of its head."""
        return x * self.weight[:, None, None]


class SelfAttention(nn.Module):
    """Causal or full multi-head self-attention whose weights are expressive, softmax, or others of `MECHANISMS`.

    With z = g_h q . k / sqrt(E) for all mechanisms, weights are proportional to z^2 / (1 + z^2)
    (``"expressive"``, Gros, arXiv 2407.18601), to exp(z) (``"dot_product"``, torch's own
    `scaled_dot_product_attention`), or to what `nn.mechanisms` says of the others. Everything else is the same, so
    that two modules of the same seed differ in the mechanism alone.

    Args:
        embed_dim: Width D of the input, a multiple of `num_heads`.
        num_heads: H; head dimension E = D / H.
        mechanism: One of `MECHANISMS`.
        position: ``"rope"``, ``"alibi"``, ``"relative"``, ``"learned_alibi"`` or ``"none"``, or several joined by a
            plus, such as ``"rope+relative"``: their biases add. Learned and sinusoidal positions are added to the
            input, by the `Transformer`: here they are the same as ``"none"``.
        max_length: Longest sequence; sizes the table of ``"relative"``, which needs it.
        gain: Learn a factor g per head on z.
        initial_gain: Its value at the start.
        qk_norm: Divide queries and keys by their root mean square, before positions and gain
            (Henry et al., arXiv 2010.04245; there with a norm of 1).
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
        max_length: int | None = None,
        gain: bool = False,
        initial_gain: float = 1.0,
        qk_norm: bool = False,
        bias: bool = True,
        qkv_bias: bool = True,
        is_causal: bool = True,
        dropout_p: float = 0.0,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        check_mechanism(mechanism)
        codes = position_codes(position)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if "relative" in codes and max_length is None:
            raise ValueError("max_length must be given for relative positions, got None")
        self.num_heads = num_heads
        self.mechanism = mechanism
        self.position = position
        self.is_causal = is_causal
        self.dropout_p = dropout_p
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.rope = RotaryPositions(embed_dim // num_heads, rope_base) if "rope" in codes else None
        self.relative = RelativeBias(num_heads, max_length) if "relative" in codes and max_length else None
        self.alibi = LearnedAlibi(num_heads) if "learned_alibi" in codes else None
        self.gain = HeadGain(num_heads, initial_gain) if gain else None
        self.qk_norm = qk_norm

    def extra_repr(self) -> str:
        """Heads, mechanism, positions and causality."""
        return (
            f"num_heads={self.num_heads}, mechanism={self.mechanism!r}, position={self.position!r}, "
            f"is_causal={self.is_causal}"
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """X ``(..., L, D)`` to ``(..., L, D)``.

        Args:
            x: Input ``(..., L, D)``.
            attn_mask: Broadcastable to ``(..., H, L, S)``: bool (True: takes part) or a bias in log-weight
                space, together with causality.
            cache: Keys and values of the positions before x, or the state that these amount to; those of x are added
                to it. Then S = ``cache.length`` + L; without one, S = L.

        Raises:
            ValueError: A cache is given to attention that is not causal, or is full, or is a `NearFarCache`; or a
                `SquaredCache` to attention that has no constant state, or with a mask, or while weights are dropped.
        """
        if isinstance(cache, NearFarCache):
            raise ValueError("cache must be a KeyValueCache or a SquaredCache, got a NearFarCache")
        if cache is not None and not self.is_causal:
            raise ValueError("cache must be None for attention that is not causal")
        past = 0 if cache is None else cache.length
        if isinstance(cache, SquaredCache):
            self._check_state(attn_mask)
            y = cache.attend(*self.heads(x, past), self._log_decay())
            return self.out(y.transpose(-3, -2).flatten(-2))
        q, k, v = self.heads(x, past)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout_p = self.dropout_p if self.training else 0.0
        if self.mechanism in ("expressive", "squared") and self._takes_slopes(q):
            y = self._expressive(q, k, v, attn_mask, dropout_p)
        else:
            for bias in (self.position_bias(x, past), self._causal(past, x)):
                attn_mask = _joined(attn_mask, bias)
            y = attend(self.mechanism, q, k, v, attn_mask, dropout_p, self.is_causal and past == 0)
        return self.out(y.transpose(-3, -2).flatten(-2))

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for at most so many positions: the smaller one of those that it can have.

        A `SquaredCache` takes the mechanism ``"squared"``, causality, and no relative positions.

        Args:
            capacity: Largest number of positions.
        """
        weight = self.qkv.weight
        is_smaller = SquaredCache.saves_memory(weight.shape[1] // self.num_heads, capacity, weight.dtype)
        return SquaredCache() if is_smaller and self._why_no_state() is None else KeyValueCache(capacity)

    def _why_no_state(self) -> str | None:
        """The reason why no state of constant size tells all that it has seen; None: one does."""
        if self.mechanism != "squared":
            return f"mechanism='squared', got {self.mechanism!r}"
        if self.relative is not None:
            return f"positions that decay from one to the next or turn vectors, got {self.position!r}"
        return None if self.is_causal else "is_causal=True"

    def _check_state(self, attn_mask: Tensor | None) -> None:
        if (reason := self._why_no_state()) is not None:
            raise ValueError(f"a SquaredCache needs {reason}")
        if attn_mask is not None:
            raise ValueError("attn_mask must be None with a SquaredCache, which does not keep single keys")
        if self.training and self.dropout_p:
            raise ValueError("a SquaredCache cannot drop weights; call eval() first")

    def _log_decay(self) -> Tensor | None:
        """The log decay ``(H,)`` of weights from one position to the next; None: they do not decay."""
        slopes = self._slopes()
        return None if slopes is None else -slopes

    def _slopes(self) -> Tensor | None:
        """The sum of the slopes ``(H,)`` of ALiBi, fixed and learned; None without either."""
        slopes = []
        if "alibi" in position_codes(self.position):
            slopes.append(alibi_slopes(self.num_heads).to(self.qkv.weight.device))
        if self.alibi is not None:
            slopes.append(self.alibi.slopes())
        return sum(slopes[1:], slopes[0]) if slopes else None

    def _takes_slopes(self, q: Tensor) -> bool:
        """Whether slopes serve as they are: they are float32, and GPUs spread learned ones out to L x S."""
        return q.dtype != torch.float64 and (self.alibi is None or q.device.type == "cpu")

    def _expressive(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> Tensor:
        """Expressive attention, which takes positions as they are: no mask of them is spread out, where it can be."""
        slopes, relative = self._slopes(), None
        if isinstance(self.relative, RelativeBias):
            relative = self.relative.by_distance(k.shape[-2])
        elif self.relative is not None:  # one table for each member of an ensemble
            attn_mask = _joined(attn_mask, self.relative(q.shape[-2], k.shape[-2]))
        return expressive_attention(
            q, k, v, attn_mask, dropout_p, self.is_causal, form=self.mechanism, causal_alignment="lower_right",
            alibi_slopes=None if slopes is None else slopes.float(), relative_bias=relative,
        )  # fmt: skip

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(..., H, L, E)`` of X ``(..., L, D)``: normalized, turned and with the gain.

        Args:
            x: Input ``(..., L, D)``.
            start: Position of its first vector.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)
        if self.qk_norm:
            q, k = (F.rms_norm(vectors, vectors.shape[-1:]) for vectors in (q, k))
        if self.rope is not None:
            q, k = self.rope(q, start), self.rope(k, start)
        if self.gain is not None:
            q = self.gain(q)
        return q, k, v

    def position_bias(self, x: Tensor, past: int = 0) -> Tensor | None:
        """The positions' float mask, broadcastable to ``(..., H, L, S)``; None without one.

        Args:
            x: Input ``(..., L, D)``.
            past: Number of keys before it: S = `past` + L.
        """
        queries, wide = x.shape[-2], x.dtype.itemsize >= 4  # less than float32 is too coarse for large numbers
        keys, is_causal, biases = past + queries, self.is_causal and wide, []
        if "alibi" in position_codes(self.position):
            biases.append(alibi_bias(self.num_heads, queries, keys, x.device, is_causal=is_causal).to(x.dtype))
        if self.alibi is not None:
            biases.append(self.alibi(queries, keys, is_causal=is_causal))
        if self.relative is not None:
            biases.append(self.relative(queries, keys))
        return sum(biases[1:], biases[0]) if biases else None

    @staticmethod
    def _causal(past: int, x: Tensor) -> Tensor | None:
        """Which keys several queries see that come after others, ``(L, S)``; one sees all."""
        queries = x.shape[-2]
        if past == 0 or queries == 1:
            return None
        return torch.ones(queries, past + queries, dtype=torch.bool, device=x.device).tril(past)


def _joined(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    return join_masks(mask, bias)
