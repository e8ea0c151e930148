"""Position encodings of queries and keys: what a model adds to content so that order matters.

``"learned"`` positions are a table added to the embeddings (`LearnedPositions`, used by `Transformer`);
``"rope"`` rotates queries and keys (`RotaryPositions`); ``"alibi"`` is a bias in log-weight space
(`alibi_bias`); ``"none"`` is none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["POSITIONS", "LearnedPositions", "RotaryPositions", "alibi_bias", "alibi_slopes"]

POSITIONS = ("none", "learned", "rope", "alibi")


class LearnedPositions(nn.Module):
    """Adds a learned vector per position: ``x_i + table_i``.

    Args:
        max_length: Longest sequence.
        embed_dim: Width of x.

    Raises:
        ValueError: From ``forward``, for a sequence longer than `max_length`.
    """

    def __init__(self, max_length: int, embed_dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_length, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """X ``(..., L, D)`` with positions 0 to L - 1 added."""
        length = x.shape[-2]
        if length > self.table.num_embeddings:
            raise ValueError(f"x must have at most {self.table.num_embeddings} positions, got {length}")
        return x + self.table(torch.arange(length, device=x.device))


class RotaryPositions(nn.Module):
    """Rotates pairs of coordinates by angles that grow with position (RoPE; Su et al., arXiv 2104.09864).

    Coordinates i and i + E/2 of the vector at position p turn by p * base^(-2 i / E), so that
    q_p . k_r depends on p and r through p - r alone.

    Args:
        head_dim: E, even.
        base: Ratio of the slowest to the fastest period, about.

    Raises:
        ValueError: For an odd `head_dim` or a `base` that is not positive.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        self.head_dim = head_dim
        self.base = base
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """X ``(..., L, E)`` rotated, positions 0 to L - 1."""
        cos, sin = self._cos_sin(x)
        rotated = torch.roll(x, x.shape[-1] // 2, dims=-1)  # (x_2, x_1); the sign is in sin
        return x * cos + rotated * sin

    def _cos_sin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin ``(L, E)``, kept from call to call."""
        length = x.shape[-2]
        kept = self._tables
        if kept is None or kept[0].shape[0] != length or kept[0].dtype != x.dtype or kept[0].device != x.device:
            positions = torch.arange(length, dtype=torch.float64, device=x.device)
            pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=x.device)
            angles = torch.outer(positions, self.base ** (-pairs / self.head_dim))
            cos, sin = angles.cos(), angles.sin()
            kept = torch.cat([cos, cos], -1).to(x.dtype), torch.cat([-sin, sin], -1).to(x.dtype)
            if not torch.compiler.is_compiling():
                self._tables = kept
        return kept


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes ``(H,)`` of ALiBi: 2^(-8 (h + 1) / H) (Press et al., arXiv 2108.12409)."""
    return torch.exp2(-8.0 * torch.arange(1, num_heads + 1, dtype=torch.float64) / num_heads).float()


def alibi_bias(num_heads: int, queries: int, keys: int, device: torch.device | str | None = None) -> Tensor:
    """ALiBi as a float mask ``(H, L, S)``: ``-slope * |i - j|``, queries being the last L of S positions.

    In log-weight space, for expressive and softmax attention alike: weights fall with distance.
    """
    i = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    distance = (i - torch.arange(keys, device=device)).abs()
    return -alibi_slopes(num_heads).to(device).view(-1, 1, 1) * distance
