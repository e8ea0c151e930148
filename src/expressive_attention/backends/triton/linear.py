"""Runs the kernels of the squared form in linear time: chunks, decays between them, and the order of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call import Call, Upstream
from . import launch, tuning
from .launch import on_device, precision_of
from .linear_pass import linear_forward_kernel, linear_key_value_kernel, linear_query_kernel
from .linear_state import scan_kernel, sum_kernel
from .tiles import Tile, ceil_div, padded

__all__ = ["backward", "forward"]

# As in `linear.chunks`: a row whose N is a smaller share of |q|^2 sum_j |k_j|^2 than that of random vectors times this,
# or below the least sum, is not read from a state of float32.
_LEAST_SHARE_OF_RANDOM = 0.25
_LEAST_SUM = 2.0**-80


def forward(call: Call, decays: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and normalizer; N is NaN where float32 does not hold a row.

    Args:
        call: A call that `linear_declines` does not decline.
        decays: Cumulative log decays ``(B, Hq | Hkv, S)`` of float64, or None.
    """
    problem = _Problem(call, decays)
    with on_device(call.query.device):
        return _forward(problem, problem.states_of_keys(), call.query.dtype)


def backward(
    call: Call, decays: Tensor | None, upstream: Upstream
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Gradients of query, key, value and decays, as keys have them; None: float32 does not hold all rows.

    Args:
        call: As in `forward`.
        decays: As in `forward`.
        upstream: The gradients of what `forward` returned.
    """
    problem = _Problem(call, decays)
    with on_device(call.query.device):
        states = problem.states_of_keys()
        output, normalizer = _forward(problem, states, torch.float32)
        if normalizer.isnan().any():
            return None
        grad_output, grad_normalizer, *_ = upstream
        u = grad_output.to(torch.float32) / torch.where(normalizer == 0, torch.inf, normalizer).unsqueeze(-1)
        shifts, along = (u * output).sum(-1), torch.zeros_like(normalizer)
        if grad_normalizer is not None:
            shifts, along = shifts - grad_normalizer, grad_normalizer * normalizer
        rows = {"upstream": u.contiguous(), "shifts": shifts.contiguous(), "along": along.contiguous()}
        dq = _query_gradient(problem, states, {**rows, "normalizers": normalizer})
        del states, output
        return dq, *_key_value_gradients(problem, rows)


class _Problem:
    """A call in chunks of keys, with a state for each head of keys, or, with other decays, of queries.

    Attributes:
        chunks: The number of chunks of keys.
        read: How many of them are read from a state, by rows in later chunks.
        diagonal: The place of the first query; of one that sees all keys, after the last chunk.
        first_chunk: The first with rows.
        row_chunks: Chunks from that one on, up to the last with rows.
    """

    def __init__(self, call: Call, decays: Tensor | None) -> None:
        query, key, value = call[:3]
        self.call, self.decays = call, None if decays is None else decays.contiguous()
        batch, query_heads, self.length, width = query.shape
        _, kv_heads, self.keys, value_width = value.shape
        self.heads = kv_heads if decays is None else decays.shape[1]
        self.states, self.groups = batch * self.heads, query_heads // self.heads
        widest = max(padded(width), padded(value_width))
        self.tiles = {
            kernel: tuning.linear_tile(kernel, query.dtype, widest, tuning.capability_of(query.device))
            for kernel in ("sum", "rows", "key_value")
        }
        self.chunk = tuning.linear_chunk(padded(width))
        self.chunks = ceil_div(self.keys, self.chunk)
        behind = self.chunks * self.chunk
        self.diagonal = behind if call.diagonal is None else min(call.diagonal, behind)
        last = self.length - 1 + self.diagonal
        self.read = min(max(0, last // self.chunk), self.chunks)
        self.first_chunk = max(0, self.diagonal // self.chunk)
        self.row_chunks = max(0, last // self.chunk + 1 - self.first_chunk) if last >= 0 else 0
        self.arguments: dict[str, Any] = {
            "query": query,
            "key": key,
            "value": value,
            "query_strides": query.stride(),
            "key_strides": key.stride(),
            "value_strides": value.stride(),
            "scale": call.scale,
            "diagonal": self.diagonal,
            "length": self.length,
            "keys": self.keys,
            "chunks": self.chunks,
            "first_chunk": self.first_chunk,
            "heads": self.heads,
            "share": self.heads // kv_heads,
            "width": width,
            "value_width": value_width,
            "GROUPS": self.groups,
            "CHUNK": self.chunk,
            "PRECISION": precision_of(query),
            "BLOCK_E": padded(width),
            "BLOCK_EV": padded(value_width),
            "row_decays": None,
            "key_decays": None,
            "since": None,
        }
        if self.decays is not None:
            self._find_decays(self.decays)

    def _find_decays(self, decays: Tensor) -> None:
        """Decays of rows since the last key before their chunk, and of rows and keys since the first of it."""
        place = torch.arange(self.length, device=decays.device) + self.diagonal
        chunk = (place // self.chunk).clamp(min=0)
        at, first = place.clamp(0, self.keys - 1), (chunk * self.chunk).clamp(max=self.keys - 1)
        of_rows = decays[..., at]
        key = torch.arange(self.keys, device=decays.device)
        self.arguments["since"] = _factor(of_rows - decays[..., self.ends(chunk)])
        self.arguments["row_decays"] = _in_two_parts(of_rows - decays[..., first])
        self.arguments["key_decays"] = _in_two_parts(decays - decays[..., key // self.chunk * self.chunk])

    def ends(self, chunk: Tensor) -> Tensor:
        """The last key before chunks; of the first, the first key, which nobody asks for."""
        return (chunk * self.chunk).clamp(max=self.keys).sub(1).clamp(min=0)

    def until(self, chunk: Tensor) -> Tensor | None:
        """The decays of keys until the last key before chunks ``(S,)`` of theirs, ``(B, H, S)`` of float32."""
        return None if self.decays is None else _factor(self.decays[..., self.ends(chunk)] - self.decays)

    def factors(self, first: int, count: int) -> Tensor | None:
        """The decays of chunks, from the last key before each to its own last one."""
        if self.decays is None:
            return None
        chunk = torch.arange(first, first + count, device=self.decays.device)
        return _factor(self.decays[..., self.ends(chunk + 1)] - self.decays[..., self.ends(chunk)])

    def states_of_keys(self) -> dict[str, Any]:
        """For each chunk that is read, what all keys up to its end amount to."""
        given = self.arguments
        chunk = torch.arange(self.keys, device=self.call.key.device) // self.chunk
        of_keys = {
            "x": given["key"], "x_strides": given["key_strides"], "y": given["value"],
            "y_strides": given["value_strides"], "weights": self.until(chunk + 1), "shifts": None, "scale": 1.0,
            "start": 0, "length": self.keys, "chunks": self.read, "GROUPS": 1,
        }  # fmt: skip
        return self._states(of_keys, self.factors(0, self.read), reverse=False)

    def states_of_rows(self, first: int, rows: dict[str, Any]) -> dict[str, Any]:
        """For each chunk from `first` on, what all rows from its beginning amount to."""
        given = self.arguments
        count = max(0, self.first_chunk + self.row_chunks - first)
        u = rows["upstream"]
        of_rows = {
            "x": given["query"], "x_strides": given["query_strides"], "y": u, "y_strides": u.stride(),
            "weights": given["since"], "shifts": rows["shifts"], "start": first * self.chunk - self.diagonal,
            "chunks": count, "share": 1,
        }  # fmt: skip
        return self._states(of_rows, self.factors(first, count), reverse=True)

    def _states(self, given: dict[str, Any], factors: Tensor | None, *, reverse: bool) -> dict[str, Any]:
        count, device = given["chunks"], self.call.query.device
        width, columns, rows = (self.arguments[name] for name in ("width", "BLOCK_EV", "BLOCK_E"))
        sums = torch.empty((self.states, count, width, columns, rows), device=device, dtype=torch.float32)
        moments = torch.empty((self.states, count, width, rows), device=device, dtype=torch.float64)
        if count:
            more = {"sums": sums, "moments": moments}
            launch._run(
                sum_kernel, (self.states * count * width,), self.tiles["sum"], {**self.arguments, **given}, **more
            )
        if count > 1:
            tile = Tile(1, 1024, 4, 1)
            for states in (sums, moments):
                size = states[0, 0].numel()
                grid = (self.states * ceil_div(size, tile.keys),)
                numbers = {"states": states, "factors": factors, "chunks": count, "size": size}
                launch._run(scan_kernel, grid, tile, numbers, REVERSE=reverse)
        return {"sums": sums, "moments": moments, "state_chunks": count}

    def run_over_rows(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """Launch a program for each tile of rows of each state."""
        tile = self.tiles["rows"]
        tiles = self.row_chunks * (self.chunk * self.groups // tile.rows)
        if tiles:
            launch._run(kernel, (self.states * tiles,), tile, {**self.arguments, **arguments}, tiles=tiles)


def _factor(exponent: Tensor) -> Tensor:
    return exponent.exp().to(torch.float32).contiguous()


def _in_two_parts(x: Tensor) -> Tensor:
    """Numbers of float64 as sums of two of float32, ``(..., 2)``."""
    high = x.to(torch.float32)
    return torch.stack([high, (x - high).to(torch.float32)], -1)


def _forward(problem: _Problem, states: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    query, key, value = problem.call[:3]
    new = torch.zeros if problem.diagonal < 0 else torch.empty  # rows before the first key are in no chunk
    output = new((*query.shape[:3], value.shape[3]), dtype=dtype, device=query.device)
    normalizer = new(query.shape[:3], dtype=torch.float32, device=query.device)
    is_zero = torch.linalg.vector_norm(key, torch.inf, -1) == 0
    place = torch.arange(problem.keys, device=key.device)
    first = torch.where(is_zero, problem.keys, place).amin(-1).to(torch.int32)
    first = first.repeat_interleave(problem.heads // key.shape[1], 1).contiguous()
    arguments = {**states, "first_keys": first, "outputs": output, "normalizers": normalizer}
    arguments |= {"least_share": _LEAST_SHARE_OF_RANDOM / query.shape[3], "least_sum": _LEAST_SUM}
    problem.run_over_rows(linear_forward_kernel, arguments)
    return output, normalizer


def _query_gradient(problem: _Problem, states: dict[str, Any], rows: dict[str, Any]) -> Tensor:
    query = problem.call.query
    new = torch.zeros if problem.diagonal < 0 else torch.empty
    dq = new(query.shape, dtype=query.dtype, device=query.device)
    problem.run_over_rows(linear_query_kernel, {**states, **rows, "grad_query": dq})
    return dq


def _key_value_gradients(problem: _Problem, rows: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    key, value = problem.call.key, problem.call.value
    first = max(1, problem.first_chunk)  # no key is before chunk 0
    states = problem.states_of_rows(first, rows)
    shape, dtype = (key.shape[0], problem.heads, problem.keys), key.dtype
    own = dtype if problem.heads == key.shape[1] else torch.float32
    dk, dv = (torch.empty((*shape, x.shape[3]), dtype=own, device=key.device) for x in (key, value))
    dc = None if problem.decays is None else torch.empty(shape, dtype=torch.float32, device=key.device)
    chunk = torch.arange(problem.keys, device=key.device) // problem.chunk + 1
    given = {**problem.arguments, **states, **rows, "grad_key": dk, "grad_value": dv, "grad_decay": dc}
    given |= {
        "row_chunks": states["state_chunks"],
        "first_row_chunk": first,
        "until": problem.until(chunk.clamp(min=first)),
    }
    tile = problem.tiles["key_value"]
    tiles = ceil_div(problem.keys, tile.keys)
    launch._run(linear_key_value_kernel, (problem.states * tiles,), tile, given, tiles=tiles)
    if problem.heads != key.shape[1]:  # heads that share keys, but no state
        dk, dv = (x.unflatten(1, (key.shape[1], -1)).sum(2).to(dtype) for x in (dk, dv))
    return dk, dv, None if dc is None else dc.to(torch.float64)
