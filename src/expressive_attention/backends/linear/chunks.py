"""The squared form in linear time: chunks of keys in turn, of which a state remembers all that came before.

A chunk multiplies its own pairs one by one, and takes the sum over earlier chunks from `state.State`. A pair has the weight

    w_ij = (q_i . k_j)^2 exp(c_p - c_j)

with cumulative log decays c, which never rise, and p the place of query i among the keys, so no factor exceeds 1. A place
after the last key counts as the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .state import State

__all__ = ["Gradients", "backward", "forward"]

_CHUNK = 256


class Gradients(NamedTuple):
    """Gradients of query ``(N, G, L, E)``, key ``(N, S, E)``, value ``(N, S, Ev)`` and, if given, c ``(N, S)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    cumulative: Tensor | None


class _Problem(NamedTuple):
    """Query ``(N, G, L, E)`` times the scale, key ``(N, S, E)``, value ``(N, S, Ev)`` and c ``(N, S)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    cumulative: Tensor | None
    diagonal: int | None
    dtype: torch.dtype

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Ranges of rows and of keys, so that the last key that a row sees is among these, or before them all."""
        rows, keys = self.query.shape[2], self.key.shape[1]
        ends = rows if self.diagonal is None else max(0, min(rows, keys - self.diagonal))
        for start in range(0, keys, _CHUNK):
            stop = min(start + _CHUNK, keys)
            if self.diagonal is None:
                yield slice(0, 0), slice(start, stop)
            else:
                yield (
                    slice(max(0, min(rows, start - self.diagonal)), max(0, min(rows, stop - self.diagonal))),
                    slice(start, stop),
                )
        for start in range(0 if self.diagonal is None else ends, rows, _CHUNK):
            yield slice(start, min(start + _CHUNK, rows)), slice(keys, keys)

    def rows_of(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of ``(N, G, L, D)`` as ``(N, G l, D)``."""
        return x[:, :, rows].flatten(1, 2).to(self.dtype)

    def keys_of(self, x: Tensor, columns: slice) -> Tensor:
        return x[:, columns].to(self.dtype)

    def places(self, rows: slice) -> Tensor:
        """The place of each row among the keys."""
        row = torch.arange(rows.start, rows.stop, device=self.query.device)
        return (row + (self.diagonal or 0)).clamp(max=self.key.shape[1] - 1)

    def of_rows(self, rows: slice, since: int) -> Tensor | None:
        """exp(c_p - c_since) of rows, ``(N, G l, 1)``."""
        if self.cumulative is None:
            return None
        factor = (self.cumulative[:, self.places(rows)] - self.cumulative[:, since : since + 1]).exp()
        return factor.repeat(1, self.query.shape[1]).unsqueeze(-1)

    def of_keys(self, columns: slice) -> Tensor | None:
        """exp(c_end - c_j) of keys, ``(N, s, 1)``."""
        if self.cumulative is None:
            return None
        end = columns.stop - 1
        return (self.cumulative[:, end : end + 1] - self.cumulative[:, columns]).exp().unsqueeze(-1)

    def factor(self, later: int, earlier: int) -> Tensor | None:
        """exp(c_later - c_earlier), ``(N, 1, 1)``."""
        if self.cumulative is None:
            return None
        return (self.cumulative[:, later] - self.cumulative[:, earlier]).exp()[:, None, None]

    def inside(self, rows: slice, columns: slice) -> Tensor:
        """exp(c_p - c_j) of the pairs of a chunk that are visible, 0 of the others, ``(N | 1, G l, s)``."""
        places = torch.arange(rows.start, rows.stop, device=self.query.device) + (self.diagonal or 0)
        column = torch.arange(columns.start, columns.stop, device=self.query.device)
        visible = (column <= places.unsqueeze(1)).unsqueeze(0)
        if self.cumulative is None:
            found = visible.to(self.dtype)
        else:
            exponent = self.cumulative[:, self.places(rows), None] - self.cumulative[:, None, columns]
            found = torch.where(visible, exponent.clamp(max=0.0).exp(), 0.0)
        return found.repeat(1, self.query.shape[1], 1)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def forward(
    query: Tensor, key: Tensor, value: Tensor, cumulative: Tensor | None, diagonal: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum_j w_ij v_j over N ``(N, G, L, Ev)`` and N ``(N, G, L)``, in `dtype`."""
    problem = _Problem(query, key, value, cumulative, diagonal, dtype)
    batch, groups, length, dim = query.shape
    output = query.new_zeros((batch, groups, length, value.shape[-1]), dtype=dtype)
    normalizer = query.new_zeros((batch, groups, length), dtype=dtype)
    state = State(batch, dim, value.shape[-1], output)
    for rows, columns in problem.chunks():
        if rows.stop > rows.start:
            q = problem.rows_of(query, rows)
            if columns.start:
                factor = problem.of_rows(rows, columns.start - 1)
                out, total = _times(state.values(q), factor), _times(state.squares(q), factor)
            else:
                out = total = q.new_zeros(())
            if columns.stop > columns.start:
                weight = torch.bmm(q, problem.keys_of(key, columns).mT).square_().mul_(problem.inside(rows, columns))
                out = out + torch.bmm(weight, problem.keys_of(value, columns))
                total = total + weight.sum(-1, keepdim=True)
            total = total.expand(*q.shape[:2], 1)
            output[:, :, rows] = (out / torch.where(total == 0, torch.inf, total)).unflatten(1, (groups, -1))
            normalizer[:, :, rows] = total.squeeze(-1).unflatten(1, (groups, -1))
        if columns.stop > columns.start:
            _remember(state, problem, key, value, columns)
    return output, normalizer


def _remember(state: State, problem: _Problem, key: Tensor, value: Tensor, columns: slice) -> None:
    """Move the state from before the keys `columns` to their end."""
    k, decay = problem.keys_of(key, columns), problem.of_keys(columns)
    if decay is not None and columns.start:
        factor = problem.factor(columns.stop - 1, columns.start - 1)
        assert factor is not None
        state.decay_(factor)
    state.add_(k, _times(problem.keys_of(value, columns), decay), decay)


def backward(
    upstream: Tensor,
    mean: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative: Tensor | None,
    diagonal: int | None,
    dtype: torch.dtype,
) -> Gradients:
    """Gradients of sum_ij w_ij (u_i . v_j - m_i), with respect to query (scaled), key, value and cumulative log decays.

    Args:
        upstream: u ``(N, G, L, Ev)``, the gradient of the output over N.
        mean: m ``(N, G, L)``.
        query: ``(N, G, L, E)``, times the scale.
        key: ``(N, S, E)``.
        value: ``(N, S, Ev)``.
        cumulative: c ``(N, S)`` or None.
        diagonal: As in `backends.problem`.
        dtype: Dtype of all sums.
    """
    problem = _Problem(query, key, value, cumulative, diagonal, dtype)
    batch, groups, _, dim = query.shape
    dq = torch.zeros_like(query, dtype=dtype, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (key, value))
    dc = None if cumulative is None else torch.zeros_like(cumulative)
    m = mean.unsqueeze(-1)
    state = State(batch, dim, value.shape[-1], dk)
    chunks = list(problem.chunks())
    for rows, columns in chunks:
        if rows.stop > rows.start and columns.start:
            q, u, s = (problem.rows_of(x, rows) for x in (query, upstream, m))
            found = _times(state.gradient(q, u, s), problem.of_rows(rows, columns.start - 1))
            dq[:, :, rows] += found.unflatten(1, (groups, -1))
        if rows.stop > rows.start and columns.stop > columns.start:
            q, u, s = (problem.rows_of(x, rows) for x in (query, upstream, m))
            k, v = problem.keys_of(key, columns), problem.keys_of(value, columns)
            z, factor = torch.bmm(q, k.mT), problem.inside(rows, columns)
            weight = z * z * factor
            g = torch.bmm(u, v.mT) - s
            ds = z.mul_(factor).mul_(g)
            dq[:, :, rows] += torch.bmm(ds, k).unflatten(1, (groups, -1))
            dk[:, columns] += torch.bmm(ds.mT, q)
            dv[:, columns] += torch.bmm(weight.mT, u)
            if dc is not None:
                dc[:, columns] -= weight.mul_(g).sum(-2)
        if columns.stop > columns.start:
            _remember(state, problem, key, value, columns)

    # The other way round, queries take the part of keys.
    state = State(batch, dim, value.shape[-1], dk)
    keys = key.shape[1]
    end = keys - 1
    for rows, columns in reversed(chunks):
        if columns.stop > columns.start:
            if columns.stop - 1 < end:
                factor = problem.factor(end, columns.stop - 1)
                if factor is not None:
                    state.decay_(factor)
                end = columns.stop - 1
            k, v, decay = problem.keys_of(key, columns), problem.keys_of(value, columns), problem.of_keys(columns)
            one = k.new_ones(()).expand(*k.shape[:2], 1)
            values = _times(state.values(k), decay)
            dk[:, columns] += _times(state.gradient(k, v, one), decay)
            dv[:, columns] += values
            if dc is not None:
                dc[:, columns] -= (values * v).sum(-1) - _times(state.squares(k), decay).squeeze(-1)
        if rows.stop > rows.start and columns.start:
            q, u, s = (problem.rows_of(x, rows) for x in (query, upstream, m))
            at = columns.start - 1
            if at < end:
                factor = problem.factor(end, at)
                if factor is not None:
                    state.decay_(factor)
                end = at
            decay = problem.of_rows(rows, at)
            state.add_(q, _times(u, decay), _times(s, decay))
    return Gradients(dq.mul_(2.0), dk.mul_(2.0), dv, dc)
