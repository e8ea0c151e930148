"""The squared form in linear time: chunks of keys in turn, of which a state remembers all that came before.

A chunk multiplies its own pairs one by one, and takes the sum over earlier chunks from `state.State`. A pair has the
weight

    w_ij = (q_i . k_j)^2 exp(c_p - c_j)

with cumulative log decays c, which never rise, and p the place of query i among the keys, so no factor exceeds 1. A
place after the last key counts as the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...call import Call, Upstream, accumulation_dtype
from .state import State

__all__ = ["backward", "forward"]

# Keys of a chunk: sums of longer ones lose more digits.
_CHUNK = 128

# As LEAST_SHARE in kernels/linear.h: rows whose N is a smaller share of |q|^2 sum_j |k_j|^2 are unsafe. Random
# vectors have a share of 1 / E.
_LEAST_SHARE_OF_RANDOM = 0.25
_LEAST_SHARE_IN_DOUBLE = 2.0**-28
_LEAST_SUM = {torch.float32: 2.0**-80, torch.float64: 2.0**-900}


class _Problem(NamedTuple):
    """Query ``(N, G, L, E)`` times the scale, key ``(N, S, E)``, value ``(N, S, Ev)`` and c ``(N, S)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    cumulative: Tensor | None
    diagonal: int | None
    dtype: torch.dtype
    least_share: float

    @classmethod
    def of(cls, call: Call, decays: Tensor | None, dtype: torch.dtype) -> _Problem:
        """The problem of a call, with a state for each head of keys, or, with other decays, of queries."""
        query, key, value = call[:3]
        heads = key.shape[1] if decays is None else decays.shape[1]
        if heads != key.shape[1]:
            key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
        own = dtype == accumulation_dtype(call.query.dtype)
        least = _LEAST_SHARE_OF_RANDOM / query.shape[-1] if own else _LEAST_SHARE_IN_DOUBLE
        return cls(
            (query.to(dtype) * call.scale).unflatten(1, (heads, -1)).flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            None if decays is None else decays.flatten(0, 1),
            call.diagonal,
            dtype,
            least,
        )

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
        return factor.to(self.dtype).repeat(1, self.query.shape[1]).unsqueeze(-1)

    def of_keys(self, columns: slice) -> Tensor | None:
        """exp(c_end - c_j) of keys, ``(N, s, 1)``."""
        if self.cumulative is None:
            return None
        end = columns.stop - 1
        return (self.cumulative[:, end : end + 1] - self.cumulative[:, columns]).exp().to(self.dtype).unsqueeze(-1)

    def factor(self, later: int, earlier: int) -> Tensor | None:
        """exp(c_later - c_earlier), ``(N, 1, 1)``."""
        if self.cumulative is None:
            return None
        return (self.cumulative[:, later] - self.cumulative[:, earlier]).exp().to(self.dtype)[:, None, None]

    def inside(self, rows: slice, columns: slice) -> Tensor:
        """exp(c_p - c_j) of the pairs of a chunk that are visible, 0 of the others, ``(N | 1, G l, s)``."""
        places = torch.arange(rows.start, rows.stop, device=self.query.device) + (self.diagonal or 0)
        column = torch.arange(columns.start, columns.stop, device=self.query.device)
        visible = (column <= places.unsqueeze(1)).unsqueeze(0)
        if self.cumulative is None:
            found = visible.to(self.dtype)
        else:
            exponent = self.cumulative[:, self.places(rows), None] - self.cumulative[:, None, columns]
            found = torch.where(visible, exponent.clamp(max=0.0).exp().to(self.dtype), 0.0)
        return found.repeat(1, self.query.shape[1], 1)

    def is_unsafe(self, q: Tensor, total: Tensor, trace: Tensor | float, rows: slice) -> Tensor:
        """Which of the sums N ``(N, G l, 1)`` of rows lost what counts; `trace`: sum_j |k_j|^2 of the state."""
        some = (self.key != 0).any(-1).cummax(-1)[0][:, self.places(rows).clamp(min=0)]
        some = some.repeat(1, self.query.shape[1]).unsqueeze(-1) & (q != 0).any(-1, keepdim=True)
        share = self.least_share * q.square().sum(-1, keepdim=True) * trace
        safe = (total > _LEAST_SUM[self.dtype]) & (total < torch.inf) & (total >= share)
        return torch.where(some, ~safe, total != 0)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def forward(call: Call, decays: Tensor | None, first: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Output and normalizer of a call that `backends.linear` does not decline.

    N is NaN where float64 does not hold a row.

    Args:
        call: The call.
        decays: Cumulative log decays ``(B, Hq | Hkv, S)`` of float64, or None.
        first: The dtype that is tried first; None: that of the device.
    """
    if call.visibility.key_lengths is not None:
        outputs, normalizers = zip(*[forward(*own, first) for own in _one_by_one(call, decays)], strict=True)
        return torch.cat(outputs), torch.cat(normalizers)
    found = _forward_of(call, decays, first)[1]
    output, normalizer = (x.view(*call.query.shape[:2], *x.shape[2:]) for x in found)
    return output.to(call.query.dtype), normalizer.to(accumulation_dtype(call.query.dtype))


def _first_dtype(query: Tensor) -> torch.dtype:
    """float64 on the CPU; elsewhere, where float64 can be 64 times slower, only what float32 does not hold is in it.

    Where all pairs are alike, the reference makes nearly no error, and sums of products make several roundings.
    """
    return torch.float64 if query.is_cpu else accumulation_dtype(query.dtype)


def _forward_of(call: Call, decays: Tensor | None, first: torch.dtype | None) -> tuple[_Problem, tuple[Tensor, Tensor]]:
    """The problem in a dtype that holds all rows, or else in float64, and its output and normalizer."""
    problem = _Problem.of(call, decays, _first_dtype(call.query) if first is None else first)
    found = _forward(problem)
    if problem.dtype != torch.float64 and found[1].isnan().any():
        problem = _Problem.of(call, decays, torch.float64)
        found = _forward(problem)
    return problem, found


def _one_by_one(call: Call, decays: Tensor | None) -> Iterator[tuple[Call, Tensor | None]]:
    """The calls of the examples of a batch, with the keys that exist."""
    assert call.visibility.key_lengths is not None
    for b, n in enumerate(call.visibility.key_lengths.tolist()):
        one = slice(b, b + 1)
        slopes = call.visibility.slopes
        slopes = slopes if slopes is None or slopes.shape[0] == 1 else slopes[one]
        visibility = call.visibility.but(key_lengths=None, slopes=slopes)
        own = call.but(
            query=call.query[one], key=call.key[one, :, :n], value=call.value[one, :, :n], visibility=visibility
        )
        yield own, None if decays is None else decays[one, :, :n]


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Output and normalizer ``(N, G, L, ...)``; N is NaN where the dtype does not hold a row."""
    query, key, value, *_ = problem
    dtype = problem.dtype
    batch, groups, length, dim = query.shape
    output = query.new_zeros((batch, groups, length, value.shape[-1]), dtype=dtype)
    normalizer = query.new_zeros((batch, groups, length), dtype=dtype)
    if key.shape[1] == 0:
        return output, normalizer
    state = State(batch, dim, value.shape[-1], output)
    for rows, columns in problem.chunks():
        if rows.stop > rows.start:
            q = problem.rows_of(query, rows)
            if columns.start:
                factor = problem.of_rows(rows, columns.start - 1)
                out, total = _times(state.values(q), factor), _times(state.squares(q), factor)
                trace = _times(state.trace(), factor)
            else:
                out = total = trace = q.new_zeros(())
            if columns.stop > columns.start:
                weight = torch.bmm(q, problem.keys_of(key, columns).mT).square_().mul_(problem.inside(rows, columns))
                out = out + torch.bmm(weight, problem.keys_of(value, columns))
                total = total + weight.sum(-1, keepdim=True)
            total = total.expand(*q.shape[:2], 1)
            out = out / torch.where(total == 0, torch.inf, total)
            unsafe = problem.is_unsafe(q, total, trace, rows) | ~out.isfinite().all(-1, keepdim=True)
            total = total.masked_fill(unsafe, torch.nan)
            output[:, :, rows] = out.unflatten(1, (groups, -1))
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
    call: Call, decays: Tensor | None, upstream: Upstream, first: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and decays, as keys have them.

    Rows that float64 does not hold have NaN for the gradient of their query, and give nothing to those of keys.
    """
    do, dn, *_ = upstream
    if call.visibility.key_lengths is not None:
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in call[:3])
        dc = None if decays is None else torch.zeros_like(decays)
        for b, own in enumerate(_one_by_one(call, decays)):
            one = slice(b, b + 1)
            n = own[0].key.shape[2]
            found = backward(*own, Upstream(do[one], None if dn is None else dn[one], False), first)
            dq[one], dk[one, :, :n], dv[one, :, :n], of_decays = found
            if dc is not None and of_decays is not None:
                dc[one, :, :n] = of_decays
        return dq, dk, dv, dc
    if call.key.shape[2] == 0:
        return torch.zeros_like(call.query), torch.zeros_like(call.key), torch.zeros_like(call.value), decays
    problem, (output, normalizer) = _forward_of(call, decays, first)
    dtype = problem.dtype
    heads = problem.key.shape[0] // call.key.shape[0]
    unsafe = normalizer.isnan()
    total = torch.where((normalizer == 0) | unsafe, torch.inf, normalizer)
    u = do.to(dtype).unflatten(1, (heads, -1)).flatten(0, 1) / total.unsqueeze(-1)
    mean = (u * output.masked_fill(unsafe.unsqueeze(-1), 0.0)).sum(-1)
    of_row = torch.zeros_like(mean)
    if dn is not None:
        of_row = dn.to(dtype).unflatten(1, (heads, -1)).flatten(0, 1).masked_fill(unsafe, 0.0)
    dq, dk, dv, dc = _backward(problem, u, mean - of_row)
    along = of_row * torch.where(unsafe, 0.0, normalizer)
    _set_along_(dq, problem.query, 2.0 * along, normalizer != 0)
    dq = (dq * call.scale).masked_fill(unsafe.unsqueeze(-1), torch.nan)
    dq = dq.reshape(call.query.shape).to(call.query.dtype)
    of_keys = [x.view(call.key.shape[0], call.key.shape[1], -1, *x.shape[1:]).sum(2) for x in (dk, dv)]
    dk, dv = (x.to(call.query.dtype) for x in of_keys)
    return dq, dk, dv, None if dc is None else dc.view(call.key.shape[0], heads, -1)


def _set_along_(dq: Tensor, q: Tensor, product: Tensor, where: Tensor) -> None:
    """Have q . dq be `product`, where it says so: it is what is left of terms that cancel."""
    size = q.abs().amax(-1, keepdim=True)
    size = torch.where(size == 0, 1.0, size)
    unit = q / size
    square = unit.square().sum(-1, keepdim=True)
    change = (product.unsqueeze(-1) / size - (unit * dq).sum(-1, keepdim=True)) / torch.where(square == 0, 1.0, square)
    dq.add_(unit * torch.where(where.unsqueeze(-1), change, 0.0))


def _backward(problem: _Problem, upstream: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of sum_ij w_ij (u_i . v_j - m_i), with respect to query (scaled), key, value and cumulative log decays.

    Args:
        problem: The problem.
        upstream: u ``(N, G, L, Ev)``, the gradient of the output over N.
        mean: m ``(N, G, L)``.
    """
    query, key, value, cumulative, _, dtype, _ = problem
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
    return dq.mul_(2.0), dk.mul_(2.0), dv, dc
