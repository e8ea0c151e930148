"""Which tokens of a sequence each rank has.

A causal query sees the keys before it, so ranks that have one piece of a sequence each have unequal work. In zigzag
order a sequence of 2 P pieces is folded: rank r has the pieces r and 2 P - 1 - r, and all ranks have as many visible
pairs, as in torch's ``context_parallel`` and in ring-flash-attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ORDERS", "Run", "Shards"]

ORDERS = ("zigzag", "contiguous")


class Run(NamedTuple):
    """Tokens of one sequence that follow each other.

    Attributes:
        sequence: Index of the sequence.
        start: Place of the first of them in the sequence.
        stop: Place after the last.
        first: Row of the rank's tensor that holds the first of them.
        origin: Row of the whole tensor that holds the first of them.
    """

    sequence: int
    start: int
    stop: int
    first: int
    origin: int

    @property
    def rows(self) -> slice:
        """Its rows in the rank's tensor."""
        return slice(self.first, self.first + self.stop - self.start)

    @property
    def columns(self) -> slice:
        """Its rows in the whole tensor."""
        return slice(self.origin, self.origin + self.stop - self.start)


@dataclass(frozen=True)
class Shards:
    """Which tokens each rank has.

    Attributes:
        lengths: The lengths of sequences that lie one after the other in one tensor, packed; one length: all tensors of
            a batch have that many tokens. Lengths need not be multiples of anything.
        ranks: P, how many ranks share each of the sequences.
        order: ``"zigzag"``: rank r has the pieces r and 2 P - 1 - r of 2 P; ``"contiguous"``: the piece r of P.

    Raises:
        TypeError: A length is no integer.
        ValueError: A length is negative, there is no rank, or the order is none of `ORDERS`.

    Example:
        >>> Shards(8, ranks=2).places(0).tolist()
        [0, 1, 6, 7]
        >>> Shards((4, 3), ranks=2, order="contiguous").places(1).tolist()
        [2, 3, 1, 2]
    """

    lengths: tuple[int, ...]
    ranks: int
    order: str = "zigzag"

    def __init__(self, lengths: int | Sequence[int], ranks: int, order: str = "zigzag") -> None:
        lengths = tuple(lengths) if isinstance(lengths, Sequence) else (lengths,)
        for name, numbers in (("lengths", lengths), ("ranks", (ranks,))):
            if not all(isinstance(x, int) and not isinstance(x, bool) for x in numbers):
                raise TypeError(f"{name} must be integers, got {numbers if name == 'lengths' else ranks!r}")
        if not lengths or min(lengths) < 0:
            raise ValueError(f"lengths must be at least 0, one or more of them, got {lengths}")
        if ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {ranks}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "order", order)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, ranks: int, order: str = "zigzag") -> Shards:
        """Shards of packed sequences, where `cu_seqlens` ``(B + 1,)`` says where each begins and the last ends."""
        starts = cu_seqlens.tolist()
        if len(starts) < 2 or starts[0] != 0:
            raise ValueError(f"cu_seqlens must have shape (B + 1,) for B >= 1 sequences and start at 0, got {starts}")
        return cls([b - a for a, b in itertools.pairwise(starts)], ranks, order)

    @property
    def length(self) -> int:
        """How many tokens there are on all ranks."""
        return sum(self.lengths)

    def pieces(self, rank: int) -> list[Run]:
        """The pieces of a rank, of each sequence one, or two in zigzag order; some may be empty."""
        count = self.ranks if self.order == "contiguous" else 2 * self.ranks
        mine = [rank] if self.order == "contiguous" else [rank, count - 1 - rank]
        found: list[Run] = []
        first = origin = 0
        for sequence, length in enumerate(self.lengths):
            for piece in mine:
                start, stop = piece * length // count, (piece + 1) * length // count
                found.append(Run(sequence, start, stop, first, origin + start))
                first += stop - start
            origin += length
        return found

    def runs(self, rank: int) -> list[Run]:
        """Its pieces without empty ones, those that follow each other as one."""
        found: list[Run] = []
        for piece in self.pieces(rank):
            if found and found[-1].sequence == piece.sequence and found[-1].stop == piece.start:
                found[-1] = found[-1]._replace(stop=piece.stop)
            elif piece.stop > piece.start:
                found.append(piece)
        return found

    def size(self, rank: int) -> int:
        """How many tokens a rank has."""
        return sum(run.stop - run.start for run in self.runs(rank))

    def places(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """The place of each token of a rank in its sequence, ``(L_rank,)`` of int64: its position id."""
        return _joined([torch.arange(run.start, run.stop, device=device) for run in self.runs(rank)], device)

    def rows(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """The row of each token of a rank in the whole tensor, ``(L_rank,)`` of int64."""
        runs = self.runs(rank)
        return _joined([torch.arange(x.columns.start, x.columns.stop, device=device) for x in runs], device)


def _joined(parts: list[Tensor], device: torch.device | str | None) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
