"""Keys and values go round the ranks; each rank adds up what its queries see of them.

At each step a rank sends the keys and values that it has to the next one, and computes with them while they travel. In
the backward pass their gradients travel with them, one step behind, and come home with the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..call import Result, accumulation_dtype
from .blocks import Derivative, Problem, Sums, blocks
from .links import Links, Pending

__all__ = ["ring"]

_GRADIENTS = 1  # the tag of their transfers


class _Keys(NamedTuple):
    """Keys and values of a rank in one piece of memory."""

    memory: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def empty(cls, key: Tensor, value: Tensor, count: int, dtype: torch.dtype | None = None) -> _Keys:
        """Room for `count` keys and values, of such heads and widths."""
        batch, heads, _, width = key.shape
        split = batch * heads * count * width
        memory = key.new_empty(split + batch * heads * count * value.shape[3], dtype=dtype)
        parts = (memory[:split], memory[split:])
        shapes = ((batch, heads, count, width), (batch, heads, count, value.shape[3]))
        return cls(memory, *(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> _Keys:
        """A copy of keys and values."""
        found = cls.empty(key, value, key.shape[2])
        found.key.copy_(key)
        found.value.copy_(value)
        return found


class _Turn:
    """Keys and values on their way round: at each step, those of one rank are here, and the next ones come."""

    def __init__(self, links: Links, problem: Problem, key: Tensor, value: Tensor) -> None:
        self._links, self._problem = links, problem
        self.here = _Keys.of(key, value)
        self.owner = links.rank
        self._coming: tuple[_Keys, Pending] | None = None

    def start(self) -> None:
        """Begin to pass on what is here."""
        links, owner = self._links, (self.owner - 1) % self._links.ranks
        coming = _Keys.empty(self.here.key, self.here.value, self._problem.shards.size(owner))
        pending = links.start(
            [(self.here.memory, (links.rank + 1) % links.ranks)],
            [(coming.memory, (links.rank - 1) % links.ranks)],
            "a step of the ring",
        )
        self._coming = coming, pending

    def finish(self) -> None:
        """Wait for what comes; from then on, it is here."""
        assert self._coming is not None
        coming, pending = self._coming
        pending.wait()
        self.here, self.owner = coming, (self.owner - 1) % self._links.ranks


def ring(links: Links, problem: Problem, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Result:
    """Output, normalizer and largest biases of the queries of this rank over the keys of all."""
    return Result(*_Ring.apply(query, key, value, attn_mask, links, problem))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        links: Links,
        problem: Problem,
    ) -> Result:
        biased = problem.slopes is not None or (attn_mask is not None and attn_mask.dtype != torch.bool)
        sums = Sums(query, value.shape[3], biased)
        turn = _Turn(links, problem, key, value)
        for step in range(links.ranks):
            if step < links.ranks - 1:
                turn.start()
            for i, block in enumerate(blocks(problem, links.rank, turn.owner, attn_mask is not None)):
                tensors = (query, turn.here.key, turn.here.value, attn_mask)
                sums.add(problem, block, tensors, _number(links, turn.owner, i))
            if step < links.ranks - 1:
                turn.finish()
        result = sums.whole(query.dtype)
        ctx.save_for_backward(query, key, value, attn_mask, *result)
        ctx.links, ctx.problem = links, problem
        ctx.set_materialize_grads(False)
        if result.bias_max is not None:
            ctx.mark_non_differentiable(result.bias_max)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dn: Tensor | None, _: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, mask, *result = ctx.saved_tensors
        links, problem = ctx.links, ctx.problem
        result = Result(*result)
        do = torch.zeros_like(result.output) if do is None else do
        derivative = Derivative(result, do, dn, ctx.needs_input_grad[3])
        dtype = accumulation_dtype(query.dtype)
        dq = torch.zeros_like(query, dtype=dtype, memory_format=torch.contiguous_format)
        dmask = torch.zeros_like(mask, dtype=accumulation_dtype(mask.dtype)) if ctx.needs_input_grad[3] else None
        turn = _Turn(links, problem, key, value)
        coming: tuple[_Keys, Pending] | None = None
        own = turn.here
        for step in range(links.ranks):
            if step < links.ranks - 1:
                turn.start()
            own = _Keys.empty(key, value, problem.shards.size(turn.owner), dtype)
            own.memory.zero_()
            for i, block in enumerate(blocks(problem, links.rank, turn.owner, mask is not None)):
                tensors = (query, turn.here.key, turn.here.value, mask)
                found = derivative.of(problem, block, tensors, _number(links, turn.owner, i))
                dq[:, :, block.rows] += found.query
                own.key[:, :, block.keys] += found.key
                own.value[:, :, block.keys] += found.value
                if dmask is not None and found.attn_mask is not None:
                    part = dmask if dmask.shape[2] == 1 else dmask[:, :, block.rows]
                    part = part if part.shape[3] == 1 else part[..., block.columns]
                    part += found.attn_mask.sum_to_size(part.shape)
            if coming is not None:  # from those that had these keys before
                coming[1].wait()
                own.memory.add_(coming[0].memory)
            if links.ranks > 1:
                is_last = step == links.ranks - 1
                after = links.rank if is_last else (turn.owner - 1) % links.ranks
                room = _Keys.empty(key, value, problem.shards.size(after), dtype)
                pending = links.start(
                    [(own.memory, (links.rank + 1) % links.ranks)],
                    [(room.memory, (links.rank - 1) % links.ranks)],
                    "a step of the ring, backward",
                    _GRADIENTS,
                )
                coming = room, pending
                if not is_last:
                    turn.finish()
        if coming is not None:
            own = coming[0]
            coming[1].wait()
        dmask = None if dmask is None else dmask.to(mask.dtype)
        return dq.to(query.dtype), own.key.to(key.dtype), own.value.to(value.dtype), dmask, None, None


def _number(links: Links, owner: int, block: int) -> int:
    """A number for each block of the call, for dropout."""
    return (links.rank * links.ranks + owner) * (1 << 16) + block
