"""Which attention weights dropout keeps: a function of seed, offset and place, the same in every backend.

Nothing of the size of the weights is stored, and neither tiles nor threads matter. Pair (b, h, i, j) is dropped if the
upper 24 bits of word ``j // 16 % 4`` of Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
SC 2011) are less than p 2^24. The key of the generator is the seed; its counter is
``(j // 64 * 16 + j % 16, i, b * Hq + h, offset)``. ``cpu/kernels/dropout.h`` has the same in C.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw", "kept", "philox", "threshold"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw(device: torch.device) -> Tensor:
    """Seed and offset for a call, ``(1, 2)`` of int64, from torch's generator of that device."""
    return torch.randint(2**63 - 1, (1, 2), device=device)


def threshold(dropout_p: float) -> int:
    """Weights are dropped whose 24 random bits are below this number."""
    return round(dropout_p * 2**24)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The four random words of each counter: int64 tensors that hold numbers of 32 bits, and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Beyond 2^63 int64 wraps: of such products all 64 bits are right.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _STEPS[0]) & _WORD, (k1 + _STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def kept(
    keys: Tensor, dropout_p: float, batch: Tensor, batches: int, heads: Tensor, all_heads: int, rows: Tensor, columns: Tensor
) -> Tensor:
    """Which weights are kept, of the pairs of some sequences, heads, queries and keys: bool, ``(b, h, l, s)``.

    Args:
        keys: ``(n, 2)`` of int64: seed and offset for each n-th part of the `batches` sequences.
        dropout_p: The probability with which a weight is dropped.
        batch: Indices of sequences, ``(b,)``.
        batches: How many sequences there are.
        heads: Indices of query heads, ``(h,)``.
        all_heads: How many of them there are.
        rows: Indices of queries, ``(l,)``.
        columns: Indices of keys, ``(s,)``.
    """
    size = batches // max(1, keys.shape[0])
    own = keys[batch // max(1, size)]
    seed, offset = own[:, 0].view(-1, 1, 1, 1), own[:, 1].view(-1, 1, 1, 1) & _WORD
    head = (batch % max(1, size)).view(-1, 1, 1, 1) * all_heads + heads.view(1, -1, 1, 1)
    lane = (columns // 64 * 16 + columns % 16).view(1, 1, 1, -1)
    words = philox((lane, rows.view(1, 1, -1, 1), head, offset), (seed & _WORD, (seed >> 32) & _WORD))
    word = (columns // 16 % 4).view(1, 1, 1, -1)
    bits = torch.where(word < 2, torch.where(word == 0, words[0], words[1]), torch.where(word == 2, words[2], words[3]))
    return (bits >> 8) >= threshold(dropout_p)
