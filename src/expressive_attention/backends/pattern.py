"""Which keys each query sees and how far they are: windows, ALiBi, caches filled in part, packed sequences.

A backend says by ``takes(pattern)`` whether it knows all that a pattern asks for. Where it does not, `forward` and
`backward` here say it by a mask, and run packed sequences one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import accumulation_dtype, empty_peak

__all__ = ["Pattern", "backward", "forward"]


class Pattern(NamedTuple):
    """Which keys a query sees.

    In a sequence of L queries and S keys, query i is at place ``p_i = i``, or, with `lower_right`, ``i + S - L``, and
    sees key j if and only if ``p_i - left <= j <= p_i + right``.

    Attributes:
        left: How many keys before its place a query sees; None: all.
        right: How many after it; None: all. A causal mask is `right` = 0.
        lower_right: Whether the last query is at the place of the last key.
        slopes: ALiBi: weights are multiplied by ``exp(-slope |p_i - j|)``, ``(B | 1, Hq)`` of float32; None: they
            are not.
        key_lengths: The first keys of each sequence that exist, ``(B,)`` of integers; None: all do.
        query_starts: Where each sequence begins in tensors that hold all of them, batch dimension 1, one after the
            other, and where the last ends, ``(B + 1,)`` of integers; None: each has its place in the batch.
        key_starts: The same of keys.
        longest_query: With `query_starts`, a bound on L.
        longest_key: With `query_starts`, a bound on S.
    """

    left: int | None = None
    right: int | None = None
    lower_right: bool = False
    slopes: Tensor | None = None
    key_lengths: Tensor | None = None
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None
    longest_query: int = 0
    longest_key: int = 0

    def but(self, **members: Any) -> Pattern:
        """The pattern with other `members`; the torch.compile of torch 2.6 does not trace `_replace`."""
        return Pattern(*[members.get(name, own) for name, own in zip(Pattern._fields, self, strict=True)])

    def is_diagonal(self) -> bool:
        """Whether all that it says is how far right a query sees: every backend knows that much."""
        return self.left is None and self.slopes is None and self.key_lengths is None and self.query_starts is None

    def diagonal(self, query: Tensor, key: Tensor) -> int | None:
        """Where that is all, the last key that query 0 sees, as `backends.problem` has it."""
        if self.right is None:
            return None
        return self.right + key.shape[2] - query.shape[2] if self.lower_right else self.right

    def as_mask(self, attn_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Pattern]:
        """The pattern joined to a mask, as large as ``(B | 1, Hq | 1, L, S)``, and a diagonal one, which is left of it.

        Args:
            attn_mask: ``(B | 1, Hq | 1, L | 1, S | 1)`` or None.
            query: ``(B, Hq, L, E)``.
            key: ``(B, Hkv, S, E)``.
        """
        if self.is_diagonal():
            return attn_mask, self
        same_for_all = self.key_lengths is None and self.query_starts is None
        rest = Pattern(right=self.right, lower_right=self.lower_right) if same_for_all else Pattern()
        inside = self.but(right=None) if same_for_all else self
        mask = inside.mask_of(torch.arange(query.shape[2], device=query.device), query, key)
        if attn_mask is not None:
            mask = _joined(attn_mask, mask, accumulation_dtype(query.dtype))
        return mask, rest

    def mask_of(self, rows: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """All of the pattern as a mask for the queries `rows`, ``(B | 1, Hq | 1, len(rows), S)``: bool, or a bias."""
        place, column, keep, slopes = self._places(rows, query.shape[2], key.shape[2])
        if self.right is not None:
            keep = keep & (column <= place + self.right)
        if self.left is not None:
            keep = keep & (column >= place - self.left)
        if slopes is None:
            return keep.expand(-1, -1, len(rows), -1)
        bias = -slopes.to(accumulation_dtype(query.dtype)) * (place - column).abs()
        return bias.masked_fill(~keep, -torch.inf)

    def _places(self, rows: Tensor, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Places of queries, those of keys, whether they are of one sequence, and the slopes of queries.

        Each of them broadcasts to ``(B | 1, Hq | 1, len(rows), S)``.
        """
        row = rows.view(1, 1, -1, 1)
        column = torch.arange(keys, device=rows.device).view(1, 1, 1, -1)
        slopes = None if self.slopes is None else self.slopes[:, :, None, None]
        if self.query_starts is None or self.key_starts is None:
            own_length, own_keys = length, keys
            if self.key_lengths is not None:
                own_keys = self.key_lengths.clamp(0, keys).view(-1, 1, 1, 1)
            keep = column < own_keys
        else:
            last = self.query_starts.numel() - 2
            row_sequence, row, own_length = _local(row, self.query_starts)
            key_sequence, column, _ = _local(column, self.key_starts)
            sizes = self.key_starts.diff()
            if self.key_lengths is not None:
                sizes = sizes.minimum(self.key_lengths.clamp(min=0))
            keep = (row_sequence == key_sequence) & (row_sequence <= last)
            keep = keep & (column < sizes[key_sequence.clamp(max=last)])
            row_sequence = row_sequence.clamp(max=last)
            own_keys = sizes[row_sequence]
            if self.slopes is not None and slopes is not None and len(slopes) > 1:
                slopes = self.slopes[row_sequence[0, 0, :, 0]].T[None, :, :, None]
        place = row + (own_keys - own_length) if self.lower_right else row
        return place, column, keep, slopes

    def sequences(self) -> Iterator[tuple[slice, slice, Pattern]]:
        """The rows, the keys that exist and the pattern of each of the packed sequences."""
        rows, columns = ([] if starts is None else starts.tolist() for starts in (self.query_starts, self.key_starts))
        lengths = None if self.key_lengths is None else self.key_lengths.tolist()
        for i in range(len(rows) - 1):
            slopes = self.slopes if self.slopes is None or self.slopes.shape[0] == 1 else self.slopes[i : i + 1]
            end = columns[i + 1] if lengths is None else min(columns[i] + lengths[i], columns[i + 1])
            own = Pattern(self.left, self.right, self.lower_right, slopes)
            yield slice(rows[i], rows[i + 1]), slice(columns[i], end), own


def _local(row: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence in which each row lies (their number: in none), its index there, and the length of that one."""
    starts = starts.to(row.dtype)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    inside = sequence.clamp(max=starts.numel() - 2)
    return sequence, row - starts[inside], starts.diff()[inside]


def _joined(attn_mask: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Two masks in one. A float mask leaves 16 bits: its gradient is summed to the one of attn_mask."""
    if attn_mask.dtype == mask.dtype == torch.bool:
        return attn_mask & mask
    if attn_mask.dtype == torch.bool:
        return mask.masked_fill(~attn_mask, -torch.inf)
    if mask.dtype == torch.bool:
        return attn_mask.to(dtype).masked_fill(~mask, -torch.inf)
    # A hidden pair stays hidden, whatever bias it has.
    return torch.where(mask == -torch.inf, mask, mask + attn_mask)


def forward(
    backend: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    pattern: Pattern,
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalizer and peak by a backend, whatever it knows of patterns."""
    if backend.takes(pattern):
        return backend.forward(query, key, value, attn_mask, pattern, scale, form)
    if pattern.query_starts is None:
        mask, rest = pattern.as_mask(attn_mask, query, key)
        return backend.forward(query, key, value, mask, rest, scale, form)
    output = query.new_zeros((*query.shape[:3], value.shape[3]))
    normalizer = query.new_zeros(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    peak = empty_peak(normalizer, attn_mask, pattern.slopes).zero_()
    for rows, columns, own in pattern.sequences():
        inputs = (query[:, :, rows], key[:, :, columns], value[:, :, columns])
        parts = forward(backend, *inputs, None, own, scale, form)
        for whole, part in zip((output, normalizer, peak), parts, strict=True):
            if part.numel():
                whole[:, :, rows] = part
    return output, normalizer, peak


def backward(
    backend: ModuleType,
    grad_output: Tensor,
    grad_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    normalizer: Tensor,
    pattern: Pattern,
    scale: float,
    form: str,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, where `mask_gradient`, of the float mask, by such a backend."""
    if backend.takes(pattern):
        return backend.backward(
            grad_output, grad_normalizer, query, key, value, attn_mask, output, normalizer, pattern, scale, form,
            mask_gradient,
        )  # fmt: skip
    if pattern.query_starts is None:
        mask, rest = pattern.as_mask(attn_mask, query, key)
        *gradients, dmask = backend.backward(
            grad_output, grad_normalizer, query, key, value, mask, output, normalizer, rest, scale, form,
            mask_gradient,
        )  # fmt: skip
        if dmask is not None and attn_mask is not None and dmask.shape != attn_mask.shape:
            dmask = dmask.sum_to_size(attn_mask.shape)
        return *gradients, dmask if dmask is None or attn_mask is None else dmask.to(attn_mask.dtype)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (query, key, value))
    for rows, columns, own in pattern.sequences():
        dn = None if grad_normalizer is None else grad_normalizer[:, :, rows]
        parts = backward(
            backend, grad_output[:, :, rows], dn, query[:, :, rows], key[:, :, columns], value[:, :, columns], None,
            output[:, :, rows], normalizer[:, :, rows], own, scale, form, False,
        )  # fmt: skip
        dq[:, :, rows], dk[:, :, columns], dv[:, :, columns] = parts[:3]
    return dq, dk, dv, None
