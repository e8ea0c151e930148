"""The state of the squared form: what all keys so far amount to, in a size that does not grow with their number.

A squared dot product is linear in the products of components,

    (q . k)^2 = sum_ab q_a q_b k_a k_b = phi(q) . phi(k),

so sum_j (q . k_j)^2 v_j = phi(q)^T sum_j phi(k_j) v_j^T, and sum_j (q . k_j)^2 = q^T (sum_j k_j k_j^T) q. E components
have E (E + 1) / 2 distinct products. This class keeps them in blocks of 16 by 16 components, formed without a gather.
A block above the diagonal counts twice, for the one below it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["State"]

_BLOCK = 16


class State:
    """Sums over pairs of vectors x ``(N, C, E)`` and y ``(N, C, D)``.

    Attributes:
        sums: sum phi(x) y^T, ``(N, |a| |b|, D)`` for each pair of blocks a <= b of components.
        moment: sum s x x^T, ``(N, E, E)`` of float64: terms of the normalizer may cancel, and it is small.
    """

    def __init__(self, batch: int, dim: int, width: int, like: Tensor) -> None:
        blocks = [slice(start, min(start + _BLOCK, dim)) for start in range(0, dim, _BLOCK)]
        self._pairs = [(a, b) for i, a in enumerate(blocks) for b in blocks[i:]]
        self.sums = [like.new_zeros(batch, (a.stop - a.start) * (b.stop - b.start), width) for a, b in self._pairs]
        self.moment = like.new_zeros(batch, dim, dim, dtype=torch.float64)

    def decay_(self, factor: Tensor) -> None:
        """Multiply by a factor ``(N, 1, 1)``."""
        for part in (*self.sums, self.moment):
            part.mul_(factor)

    def add_(self, x: Tensor, y: Tensor, s: Tensor | None = None) -> None:
        """Add phi(x) y^T and s x x^T, s ``(N, C, 1)``; None: 1."""
        wide = x.double()
        self.moment.baddbmm_(wide.mT, wide if s is None else wide * s)
        for (a, b), part in zip(self._pairs, self.sums, strict=True):
            part.baddbmm_(_products(x, a, b).mT, y)

    def values(self, x: Tensor) -> Tensor:
        """phi(x)^T sums, ``(N, C, D)``."""
        found = x.new_zeros(*x.shape[:2], self.sums[0].shape[2])
        for (a, b), part in zip(self._pairs, self.sums, strict=True):
            found.baddbmm_(_products(x, a, b), part, alpha=1.0 if a == b else 2.0)
        return found

    def squares(self, x: Tensor) -> Tensor:
        """x^T moment x, ``(N, C, 1)``."""
        wide = x.double()
        return (torch.bmm(wide, self.moment) * wide).sum(-1, keepdim=True).to(x.dtype)

    def trace(self) -> Tensor:
        """The sum of s |x|^2, ``(N, 1, 1)``."""
        return self.moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].to(self.sums[0].dtype)

    def gradient(self, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        """The gradient of phi(x)^T sums y - s x^T moment x with respect to x, over 2, ``(N, C, E)``."""
        found = torch.bmm(x, self.moment.to(x.dtype)) * -s
        for (a, b), part in zip(self._pairs, self.sums, strict=True):
            matrix = torch.bmm(y, part.mT).unflatten(-1, (a.stop - a.start, b.stop - b.start))
            found[..., a] += (matrix * x[..., None, b]).sum(-1)
            if a != b:
                found[..., b] += (matrix * x[..., a, None]).sum(-2)
        return found

    def distinct(self) -> Tensor:
        """The sums of the distinct products a <= b, row by row of the upper triangle, ``(N, E (E + 1) / 2, D)``."""
        dim = self.moment.shape[-1]
        whole = self.sums[0].new_zeros(self.moment.shape[0], dim, dim, self.sums[0].shape[2])
        for (a, b), part in zip(self._pairs, self.sums, strict=True):
            whole[:, a, b] = part.unflatten(1, (a.stop - a.start, b.stop - b.start))
        rows, columns = torch.triu_indices(dim, dim, device=whole.device)
        return whole[:, rows, columns]


def _products(x: Tensor, a: slice, b: slice) -> Tensor:
    return (x[..., a, None] * x[..., None, b]).flatten(-2)
