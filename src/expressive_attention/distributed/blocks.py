"""Attention of the queries of one rank and the keys of another: blocks of pairs, and how partial results merge.

A block is one run of queries against one run of keys. Which keys a query sees depends on the distance of the two runs
alone, so a block is a call like any other, with a diagonal or a window that is moved by that distance.

Weights have no maximum: two partial results over different keys are sums, and sums add,

    o = (N_1 o_1 + N_2 o_2) / (N_1 + N_2).

Where weights are multiplied by the exponential of a bias, backends leave out the largest bias of each row, and partial
results are brought to a common one.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import call as calls
from ..backends import BACKENDS
from ..call import Backend, Call, Gradients, Result, Upstream, Visibility, accumulation_dtype
from ..functional import choose
from ..masks import join_masks
from .orders import Run, Shards

__all__ = ["Block", "Derivative", "Problem", "Sums", "blocks"]


class Problem(NamedTuple):
    """A call without its tensors of tokens.

    Attributes:
        shards: Which tokens each rank has.
        left: How many keys before its place a query sees; None: all.
        right: How many after it; None: all.
        slopes: ALiBi's, ``(B | 1, Hq)``, or None.
        key_lengths: How many keys of each sequence of the batch exist, ``(B,)``, or None.
        scale: Factor on the dot product.
        form: The weight function.
        dropout_p: Probability with which weights are dropped.
        seeds: The seeds of dropout, ``(1, 3)``, or None.
        backend: Name of the backend, or None.
    """

    shards: Shards
    left: int | None
    right: int | None
    slopes: Tensor | None
    key_lengths: Tensor | None
    scale: float
    form: str
    dropout_p: float
    seeds: Tensor | None
    backend: str | None


class Block(NamedTuple):
    """Some queries of a rank against some keys of another.

    Attributes:
        rows: The queries, in the tensor of their rank.
        keys: The keys, in the tensor of theirs.
        columns: The keys, in the whole tensor.
        queries_start: Place of the first query in its sequence.
        keys_start: Place of the first key.
        left: As in `Visibility`, for query i and key j of the block; None: all.
        right: Likewise.
    """

    rows: slice
    keys: slice
    columns: slice
    queries_start: int
    keys_start: int
    left: int | None
    right: int | None


def blocks(problem: Problem, rank: int, other: int, masked: bool) -> list[Block]:
    """The blocks with visible pairs, of the queries of `rank` and the keys of `other`; the fewer, the better.

    With a mask (`masked`), ALiBi or lengths, places of keys matter, and each block is of one run of keys.
    """
    runs = itertools.product(problem.shards.runs(rank), problem.shards.runs(other))
    found = [_block(problem, rows, keys) for rows, keys in runs if rows.sequence == keys.sequence]
    seen = [block for block in found if block is not None]
    if masked or problem.slopes is not None or problem.key_lengths is not None:
        return seen
    return _merged(_merged(seen, "rows"), "keys")


def _block(problem: Problem, rows: Run, keys: Run) -> Block | None:
    distance = rows.start - keys.start
    first, last = rows.stop - rows.start - 1, keys.stop - keys.start - 1
    right = None if problem.right is None else distance + problem.right
    left = None if problem.left is None else problem.left - distance
    if (right is not None and right < -first) or (left is not None and left < -last):
        return None
    right = None if right is None or right >= last else right
    left = None if left is None or left >= first else left
    return Block(rows.rows, keys.rows, keys.columns, rows.start, keys.start, left, right)


def _merged(blocks: list[Block], along: str) -> list[Block]:
    """Blocks that are wholly visible and lie next to each other, as one; `columns` of such are those of the first."""
    across = "keys" if along == "rows" else "rows"
    found: list[Block] = []
    for block in blocks:
        for i, other in enumerate(found):
            one, two = getattr(other, along), getattr(block, along)
            whole = all(x.left is None and x.right is None for x in (block, other))
            if whole and getattr(other, across) == getattr(block, across) and one.stop == two.start:
                found[i] = other._replace(**{along: slice(one.start, two.stop)})
                break
        else:
            found.append(block)
    return found


# Query, key, value and mask.
Tensors = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


class _Part(NamedTuple):
    """A block as a call, the backend that takes it, and the logarithm of a factor of its rows, ``(B, H, l)``."""

    call: Call
    backend: Backend
    log_factor: Tensor | None


def _part(problem: Problem, block: Block, tensors: Tensors, number: int) -> _Part:
    query, key, value, attn_mask = tensors
    query, key, value = query[:, :, block.rows], key[:, :, block.keys], value[:, :, block.keys]
    mask = attn_mask
    if mask is not None:
        mask = mask if mask.shape[2] == 1 else mask[:, :, block.rows]
        mask = mask if mask.shape[3] == 1 else mask[..., block.columns]
    visibility = Visibility(block.left, block.right)
    if problem.key_lengths is not None:
        lengths = (problem.key_lengths - block.keys_start).clamp(0, key.shape[2])
        visibility = visibility.but(key_lengths=lengths)
    log_factor = None
    if problem.slopes is not None and block.queries_start == block.keys_start:
        visibility = visibility.but(slopes=problem.slopes)
    elif problem.slopes is not None:
        bias, log_factor = _slopes(problem.slopes, block, query, key)
        mask = bias if mask is None else join_masks(mask, bias, accumulation_dtype(query.dtype))
    # Another pattern for each pair of ranks and runs, the same in both passes.
    seeds = None if problem.seeds is None else problem.seeds + problem.seeds.new_tensor([0, number, 0])
    call = Call(query, key, value, mask, visibility, problem.scale, problem.form, problem.dropout_p, seeds)
    return _Part(call, BACKENDS[choose(call, problem.backend)], log_factor)


def _slopes(slopes: Tensor, block: Block, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """ALiBi of keys that are all before or all after the queries: a bias of keys, at most 0, and one of rows."""
    slopes = slopes.to(accumulation_dtype(query.dtype))[:, :, None]
    place = torch.arange(query.shape[2], device=query.device) + block.queries_start
    column = torch.arange(key.shape[2], device=query.device) + block.keys_start
    nearest = block.keys_start
    if block.keys_start < block.queries_start:
        nearest += key.shape[2] - 1
    of_keys = -slopes * (column - nearest).abs()
    of_rows = -slopes * (place - nearest).abs()
    return of_keys.unsqueeze(2), of_rows


class Sums:
    """The sums of partial results of a rank's queries.

    Attributes:
        output: sum w v, ``(B, Hq, L, Ev)``; without the factor ``exp(top)``.
        normalizer: sum w, ``(B, Hq, L)``; likewise.
        top: The largest bias of each row so far, ``(B, Hq, L)``; None: there are no biases.
    """

    def __init__(self, query: Tensor, width: int, biased: bool) -> None:
        dtype = accumulation_dtype(query.dtype)
        self.output = query.new_zeros((*query.shape[:3], width), dtype=dtype)
        self.normalizer = query.new_zeros(query.shape[:3], dtype=dtype)
        self.top = torch.full_like(self.normalizer, -torch.inf) if biased else None

    def add(self, problem: Problem, block: Block, tensors: Tensors, number: int) -> None:
        """Add the pairs of a block of query, key, value and mask; `number` tells it from others of the call."""
        part = _part(problem, block, tensors, number)
        result = calls.forward(part.backend, part.call)
        output, normalizer = self.output[:, :, block.rows], self.normalizer[:, :, block.rows]
        weight = result.normalizer
        if self.top is not None:
            top = self.top[:, :, block.rows]
            bias = torch.where(weight == 0, -torch.inf, _bias(result, part))
            larger = torch.maximum(top, bias)
            common = torch.where(larger == -torch.inf, 0.0, larger)
            before = torch.exp(top - common)
            output.mul_(before.unsqueeze(-1))
            normalizer.mul_(before)
            weight = weight * torch.exp(bias - common)
            top.copy_(larger)
        output += weight.unsqueeze(-1) * result.output
        normalizer += weight

    def whole(self, dtype: torch.dtype) -> Result:
        """The merged result, with an output of that dtype; its `bias_max` is 0 where a row has no weight."""
        total = torch.where(self.normalizer == 0, 1.0, self.normalizer)
        top = None if self.top is None else torch.where(self.top == -torch.inf, 0.0, self.top)
        return Result((self.output / total.unsqueeze(-1)).to(dtype), self.normalizer, top)


def _bias(result: Result, part: _Part) -> Tensor:
    """The logarithm of what is left out of a block's normalizer."""
    bias = torch.zeros_like(result.normalizer) if result.bias_max is None else result.bias_max
    return bias if part.log_factor is None else bias + part.log_factor


class Derivative(NamedTuple):
    """The merged result of all blocks, and its upstream gradients.

    Attributes:
        result: The result.
        output: The gradient of the output, ``(B, Hq, L, Ev)``.
        normalizer: The gradient of the normalizer in the result, ``(B, Hq, L)``; None: it is 0.
        wants_mask: Whether the gradient of the float mask is asked for.
    """

    result: Result
    output: Tensor
    normalizer: Tensor | None
    wants_mask: bool

    def of(self, problem: Problem, block: Block, tensors: Tensors, number: int) -> Gradients:
        """The gradients of a block's query, key, value and mask, by the derivative of the merged sums.

            d o / d o_p = N_p / N,   d o / d N_p = (o_p - o) / N

        The block's own result is computed anew: to keep those of all ranks would take the memory of the whole sequence.
        """
        part = _part(problem, block, tensors, number)
        own = calls.forward(part.backend, part.call)
        rows = block.rows
        total = self.result.normalizer[:, :, rows]
        factor = torch.ones_like(total)
        if self.result.bias_max is not None:
            bias = _bias(own, part) - self.result.bias_max[:, :, rows]
            factor = torch.exp(torch.where(own.normalizer == 0, 0.0, bias))
        weight = own.normalizer * factor
        per_total = factor / torch.where(total == 0, torch.inf, total)
        do = self.output[:, :, rows].to(total.dtype)
        change = own.output.to(total.dtype) - self.result.output[:, :, rows].to(total.dtype)
        # It is 0 for a row that this block alone has. A difference of roundings would be magnified by 1 / N.
        of_normalizer = torch.where(weight == total, 0.0, per_total * (do * change).sum(-1))
        if self.normalizer is not None:
            of_normalizer = of_normalizer + factor * self.normalizer[:, :, rows]
        share = torch.where(total == 0, 0.0, weight / torch.where(total == 0, 1.0, total)).unsqueeze(-1)
        upstream = Upstream((do * share).to(self.output.dtype), of_normalizer, self.wants_mask)
        return calls.backward(part.backend, part.call, own, upstream)
