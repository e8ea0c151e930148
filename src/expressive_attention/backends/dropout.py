"""Which attention weights dropout keeps: a function of seed, offset and place, the same in every backend.

Nothing of the size of the weights is stored, and neither tiles nor threads matter. Pair (b, h, i, j) is dropped if the
upper 24 bits of word ``j // 16 % 4`` of Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
SC 2011) are less than p 2^24. The key of the generator is the seed; its counter is
``(j // 64 * 16 + j % 16, first + i, b * Hq + h, offset)``. ``cpu/kernels/dropout.h`` has the same in C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..call import Call

__all__ = ["draw", "keep_share", "kept", "kept_weights", "philox", "threshold"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw(query: Tensor) -> Tensor:
    """Seed, offset and first row (0) of a call, ``(1, 3)`` of int64, from torch's generator of the device of its query.

    The one place in which dropout draws random numbers, so that `torch.manual_seed`, checkpoints that restore the state
    of the generator, `torch.compile` and the modes of randomness of `torch.vmap` mean for it what they mean for torch.
    """
    return torch.nn.functional.pad(torch.randint(2**63 - 1, (1, 2), device=query.device), (0, 1))


def threshold(dropout_p: float) -> int:
    """Weights are dropped whose 24 random bits are below this number."""
    return math.ceil(dropout_p * 2**24)


def keep_share(dropout_p: float) -> float:
    """1 - p, by which weights that are kept are divided; where none is, 1."""
    return 1.0 if dropout_p == 1.0 else 1.0 - dropout_p


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


def kept(call: Call, batch: Tensor, heads: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Which weights of some sequences, heads, queries and keys of a call are kept: bool, ``(b, h, l, s)``.

    Args:
        call: One with seeds.
        batch: Indices of sequences, ``(b,)``.
        heads: Indices of query heads, ``(h,)``.
        rows: Indices of queries, ``(l,)``.
        columns: Indices of keys, ``(s,)``.
    """
    seeds = call.dropout_seeds
    assert seeds is not None
    share = max(1, call.query.shape[0] // seeds.shape[0])
    seed, offset, first = (x.view(-1, 1, 1, 1) for x in seeds[batch // share].unbind(-1))
    head = (batch % share).view(-1, 1, 1, 1) * call.query.shape[1] + heads.view(1, -1, 1, 1)
    row, lane = rows.view(1, 1, -1, 1) + first, (columns // 64 * 16 + columns % 16).view(1, 1, 1, -1)
    words = philox((lane, row & _WORD, head, offset & _WORD), (seed & _WORD, (seed >> 32) & _WORD))
    word = (columns // 16 % 4).view(1, 1, 1, -1)
    bits = torch.where(word < 2, torch.where(word == 0, words[0], words[1]), torch.where(word == 2, words[2], words[3]))
    # In float64: under torch.compile, the probability may be a number that is not known yet, of which there is no ceil.
    return (bits >> 8).to(torch.float64) >= call.dropout_p * 2**24


def kept_weights(weights: Tensor, call: Call) -> Tensor:
    """The weights ``(B, Hq, L, S)`` of a call after dropout."""
    whole = [torch.arange(size, device=weights.device) for size in weights.shape]
    return torch.where(kept(call, *whole), weights, 0.0) / keep_share(call.dropout_p)
