"""Ways to tell positions apart, for any attention.

``"learned"`` and ``"sinusoidal"`` add a vector to the embeddings (`LearnedPositions`, `SinusoidalPositions`, used by
`Transformer`); ``"rope"`` rotates queries and keys (`RotaryPositions`); ``"alibi"`` (`alibi_bias`),
``"learned_alibi"`` (`LearnedAlibi`) and ``"relative"`` (`RelativeBias`) are biases in log-weight space: a factor on
the weights; ``"none"`` is none. Several at once are joined by a plus: ``"rope+relative"``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..overrides import takers

__all__ = [
    "POSITIONS",
    "LearnedAlibi",
    "LearnedPositions",
    "RelativeBias",
    "RotaryPositions",
    "SinusoidalPositions",
    "alibi_bias",
    "alibi_slopes",
    "distance_bias",
    "distance_index",
    "position_codes",
]

# Positions in a table that is made after the first ones.
_ROOM = 1024

POSITIONS = ("none", "learned", "sinusoidal", "rope", "alibi", "relative", "learned_alibi")


def position_codes(position: str) -> tuple[str, ...]:
    """The codes in a position such as ``"rope+relative"``, in the order of `POSITIONS`; none in ``"none"``.

    Raises:
        ValueError: One of them is not known, is there twice, or is ``"none"`` beside another.

    Example:
        >>> position_codes("relative+rope")
        ('rope', 'relative')
    """
    codes = position.split("+")
    for code in codes:
        if code not in POSITIONS:
            raise ValueError(f"position must be one of {POSITIONS}, or several joined by '+', got {position!r}")
    if len(set(codes)) < len(codes) or ("none" in codes and len(codes) > 1):
        raise ValueError(f"position must have each code once, and 'none' alone, got {position!r}")
    return tuple(code for code in POSITIONS if code in codes and code != "none")


def _check_whole() -> None:
    """Raise an error in a region of `distributed.ContextParallel`, where a rank has some of the positions."""
    if takers:
        raise NotImplementedError(
            "positions of expressive_attention.nn number the tokens of one rank; in a region of ContextParallel take "
            "position='none', or 'alibi' with expressive attention, or add codes of its position_ids"
        )


class LearnedPositions(nn.Module):
    """Adds a learned vector per position: ``x_i + table_i``.

    Args:
        max_length: Longest sequence.
        embed_dim: Width of x.

    Raises:
        ValueError: From ``forward``, for a sequence longer than `max_length`.

    Example:
        >>> LearnedPositions(max_length=32, embed_dim=16)(torch.randn(3, 7, 16)).shape
        torch.Size([3, 7, 16])
    """

    def __init__(self, max_length: int, embed_dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_length, embed_dim)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """X ``(..., L, D)`` with positions `start` to `start` + L - 1 added."""
        _check_whole()
        end = start + x.shape[-2]
        if end > self.table.num_embeddings:
            raise ValueError(f"x must have at most {self.table.num_embeddings} positions, got {end}")
        return x + self.table(torch.arange(start, end, device=x.device))


class SinusoidalPositions(nn.Module):
    """Adds fixed waves (Vaswani et al., arXiv 1706.03762, section 3.5): ``x_p + (sin(p w_i), cos(p w_i))_i``.

    w_i = base^(-2 i / D), for i = 0 to D / 2 - 1.

    Args:
        embed_dim: D, even.
        base: Ratio of the longest to the shortest wave, about.

    Raises:
        ValueError: For an odd `embed_dim` or a `base` that is not positive.

    Example:
        >>> SinusoidalPositions(embed_dim=4)(torch.zeros(1, 4))  # position 0
        tensor([[0., 1., 0., 1.]])
    """

    def __init__(self, embed_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        _check_waves("embed_dim", embed_dim, base)
        self.embed_dim = embed_dim
        self.base = base

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """X ``(..., L, D)`` with positions `start` to `start` + L - 1 added."""
        _check_whole()
        angles = _angles(start, start + x.shape[-2], self.embed_dim, self.base, x.device)
        return x + torch.stack([angles.sin(), angles.cos()], -1).flatten(-2).to(x.dtype)


class RotaryPositions(nn.Module):
    """Rotates pairs of coordinates by angles that grow with position (RoPE; Su et al., arXiv 2104.09864).

    Coordinates i and i + E/2 of the vector at position p turn by p * base^(-2 i / E), so that
    q_p . k_r depends on p and r through p - r alone.

    Args:
        head_dim: E, even.
        base: Ratio of the slowest to the fastest period, about.

    Raises:
        ValueError: For an odd `head_dim` or a `base` that is not positive.

    Example:
        >>> rope = RotaryPositions(head_dim=8)
        >>> q, k = torch.randn(2, 1, 8)
        >>> near, far = (rope(q, start) @ rope(k, start + 3).T for start in (0, 90))
        >>> torch.allclose(near, far, atol=1e-5)  # the distance alone counts
        True
    """

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        _check_waves("head_dim", head_dim, base)
        self.head_dim = head_dim
        self.base = base
        self._tables: tuple[Tensor, Tensor] | None = None
        self._begin = 0  # the first position of the tables

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """X ``(..., L, E)`` rotated, positions `start` to `start` + L - 1."""
        _check_whole()
        cos, sin = self._cos_sin(x, start)
        rotated = torch.roll(x, x.shape[-1] // 2, dims=-1)  # (x_2, x_1); the sign is in sin
        return x * cos + rotated * sin

    def _cos_sin(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin ``(L, E)``, kept from call to call."""
        end = start + x.shape[-2]
        if torch.compiler.is_compiling():
            cos, sin = self._table(x, start, end)
            return cos, sin
        kept, begin = self._tables, self._begin
        if (
            kept is None
            or start < begin
            or begin + kept[0].shape[0] < end
            or kept[0].dtype != x.dtype
            or kept[0].device != x.device
        ):
            # With room to grow: generation asks for the next position in each call, and no longer for those before.
            begin, room = start, 1 << (end - start - 1).bit_length()
            kept = self._tables = self._table(x, begin, begin + (room if start == 0 else max(room, _ROOM)))
            self._begin = begin
        cos, sin = kept
        return cos[start - begin : end - begin], sin[start - begin : end - begin]

    def _table(self, x: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        angles = _angles(start, end, self.head_dim, self.base, x.device)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(x.dtype), torch.cat([-sin, sin], -1).to(x.dtype)


def _check_waves(name: str, width: int, base: float) -> None:
    if width % 2:
        raise ValueError(f"{name} must be even for these positions, got {width}")
    if base <= 0:
        raise ValueError(f"base must be positive, got {base}")


def _angles(start: int, end: int, width: int, base: float, device: torch.device) -> Tensor:
    """p * base^(-2 i / width) in float64 for positions p from `start` to `end`, ``(end - start, width / 2)``."""
    positions = torch.arange(start, end, dtype=torch.float64, device=device)
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=device)
    return torch.outer(positions, base ** (-pairs / width))


class RelativeBias(nn.Module):
    """A learned bias per head and distance, in log-weight space, as T5's without buckets (arXiv 1910.10683).

    Weights are multiplied by exp(table[h, i - j]). The table starts at 0; distances of both signs have an entry.

    Args:
        num_heads: H.
        max_length: Longest sequence T; the table is ``(H, 2 T - 1)``.

    Raises:
        ValueError: From ``forward``, for a sequence longer than `max_length`.

    Example:
        >>> RelativeBias(num_heads=2, max_length=32)(queries=3, keys=5).shape
        torch.Size([2, 3, 5])
    """

    def __init__(self, num_heads: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * max_length - 1))

    def by_distance(self, keys: int) -> Tensor:
        """`relative_bias` of `expressive_attention` for so many keys, ``(H, 2 T - 1)``; takes the place of the mask."""
        _check_whole()
        _check_keys(keys, self.max_length)
        return self.table

    def forward(self, queries: int, keys: int) -> Tensor:
        """Float mask ``(H, L, S)``, queries being the last L of S positions."""
        return self.table[:, distance_index(queries, keys, self.max_length, self.table.device)]


def distance_index(queries: int, keys: int, max_length: int, device: torch.device) -> Tensor:
    """Column i - j + T - 1 of a `RelativeBias` for query i, of the last L of S positions, and key j, ``(L, S)``."""
    _check_whole()
    _check_keys(keys, max_length)
    j = torch.arange(keys, device=device)
    return j[keys - queries :].unsqueeze(1) - j + max_length - 1


def _check_keys(keys: int, max_length: int) -> None:
    if keys > max_length:
        raise ValueError(f"keys must be at most {max_length}, got {keys}")


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes ``(H,)`` of ALiBi: 2^(-8 (h + 1) / H) (Press et al., arXiv 2108.12409).

    Example:
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    return torch.exp2(-8.0 * torch.arange(1, num_heads + 1, dtype=torch.float64) / num_heads).float()


def alibi_bias(
    num_heads: int,
    queries: int,
    keys: int,
    device: torch.device | str | None = None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """ALiBi as a float mask ``(H, L, S)``: ``-slope * |i - j|``, queries being the last L of S positions.

    In log-weight space, for expressive and softmax attention alike: weights fall with distance.

    Args:
        num_heads: H.
        queries: L.
        keys: S.
        device: Device of the mask.
        is_causal: The attention is causal. Then -slope * (i - j) does as well, in which -slope * i is common to a row
            and cancels: the mask is ``(H, 1, S)``, and nothing of the size of L x S is made. To be kept in float32.

    Example:
        >>> alibi_bias(1, queries=2, keys=3) / alibi_slopes(1)
        tensor([[[-1., -0., -1.],
                 [-2., -1., -0.]]])
    """
    return distance_bias(alibi_slopes(num_heads).to(device), queries, keys, is_causal=is_causal)


def distance_bias(slopes: Tensor, queries: int, keys: int, *, is_causal: bool = False) -> Tensor:
    """``-slope * |i - j|`` for slopes ``(..., H)``: ``(..., H, L, S)``, or ``(..., H, 1, S)``, as `alibi_bias`."""
    _check_whole()
    slopes = slopes[..., None, None]
    if is_causal:
        return -slopes * (keys - 1 - torch.arange(keys, device=slopes.device))
    i = torch.arange(keys - queries, keys, device=slopes.device).unsqueeze(1)
    distance = (i - torch.arange(keys, device=slopes.device)).abs()
    return -slopes * distance


class LearnedAlibi(nn.Module):
    """ALiBi whose slopes are trained: weights fall by a factor exp(-slope_h) from one position to the next.

    A slope is exp of its parameter, so that it stays positive. Slopes start as ALiBi's, `alibi_slopes`, and serve
    sequences of any length. Expressive attention with z^2 in the place of z^2 / (1 + z^2) keeps its form of linear time
    under such a decay.

    Args:
        num_heads: H.

    Example:
        >>> LearnedAlibi(num_heads=2)(queries=3, keys=5).shape
        torch.Size([2, 3, 5])
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.log_slopes = nn.Parameter(alibi_slopes(num_heads).log())

    def forward(self, queries: int, keys: int, *, is_causal: bool = False) -> Tensor:
        """Float mask ``(H, L, S)``, or ``(H, 1, S)`` for causal attention, as `alibi_bias`."""
        return distance_bias(self.slopes(), queries, keys, is_causal=is_causal)

    def slopes(self) -> Tensor:
        """The slopes ``(H,)``, positive."""
        return self.log_slopes.exp()
