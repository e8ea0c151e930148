"""Tensors of tokens from whole to sharded and back, and from sharded by tokens to sharded by heads and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .links import Links
from .orders import Shards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Heads", "by_heads", "by_tokens", "shard", "unshard"]


def shard(x: Tensor, mesh: DeviceMesh, shards: Shards, dim: int = 1) -> Tensor:
    """The part of a tensor that this rank has, without communication.

    Tokens, labels, position ids ``(B, L)``, vectors ``(B, L, D)``, queries, keys and values ``(B, H, L, E)`` with
    ``dim=2``, the rows of a mask ``(..., L, S)`` with ``dim=-2``, log decays ``(B, H, L)`` with ``dim=-1``, tensors of
    packed sequences: whatever has one row for each token. Lengths (`key_lengths`) and slopes stay whole.

    Args:
        x: A tensor that every rank has whole.
        mesh: A DeviceMesh of one dimension.
        shards: Which tokens each rank has.
        dim: The dimension of tokens.

    Returns:
        The tokens of this rank in the order of ``shards.places(rank)``; differentiable.

    Raises:
        TypeError: `mesh` is no DeviceMesh.
        ValueError: `dim` does not have the length of `shards`, or the mesh does not have its ranks.
    """
    links = _links(mesh, shards)
    if x.shape[dim] != shards.length:
        raise ValueError(f"x must have the {shards.length} tokens of shards in dimension {dim}, got {tuple(x.shape)}")
    return x.index_select(dim, shards.rows(links.rank, x.device))


def unshard(x: Tensor, mesh: DeviceMesh, shards: Shards, dim: int = 1, *, timeout: float | None = None) -> Tensor:
    """The whole tensor, on every rank, in the order of the sequence: the inverse of `shard`.

    Differentiable: the gradient of a part is the sum of what all ranks have for it. Where all ranks compute the same
    loss from the whole tensor, divide it by their number.

    Args:
        x: The part of this rank.
        mesh: A DeviceMesh of one dimension.
        shards: Which tokens each rank has.
        dim: The dimension of tokens.
        timeout: Seconds to wait for other ranks, on the CPU; None: as long as the process group says.

    Returns:
        A tensor with ``shards.length`` tokens in dimension `dim`.

    Raises:
        TypeError: `mesh` is no DeviceMesh.
        ValueError: `dim` does not have this rank's number of tokens, or the mesh does not have its ranks.
        ConnectionError: Another rank did not answer.
    """
    links = _links(mesh, shards, timeout)
    size = shards.size(links.rank)
    if x.shape[dim] != size:
        raise ValueError(f"x must have the {size} tokens of this rank in dimension {dim}, got {tuple(x.shape)}")
    return _Unshard.apply(x.movedim(dim, -1), links, shards).movedim(-1, dim)


def _links(mesh: DeviceMesh, shards: Shards, timeout: float | None = None) -> Links:
    links = Links(mesh, timeout)
    if shards.ranks != links.ranks:
        raise ValueError(f"shards must be of the {links.ranks} ranks of mesh, got {shards.ranks}")
    return links


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, links: Links, shards: Shards) -> Tensor:
        ctx.links, ctx.shards = links, shards
        parts = links.gather(x, [shards.size(rank) for rank in range(links.ranks)], "the gathering of a tensor")
        whole = x.new_empty((*x.shape[:-1], shards.length))
        for rank, part in enumerate(parts):
            whole[..., shards.rows(rank, x.device)] = part
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = ctx.links.add(grad.clone(memory_format=torch.contiguous_format), "the gradient of a gathered tensor")
        return whole[..., ctx.shards.rows(ctx.links.rank, grad.device)], None, None


class Heads(NamedTuple):
    """Heads that each rank takes: from, to. Ranks may share heads of keys."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of_queries(cls, heads: int, ranks: int) -> Heads:
        """As even as can be."""
        return cls(tuple((rank * heads // ranks, (rank + 1) * heads // ranks) for rank in range(ranks)))

    def of_keys(self, heads: int, kv_heads: int) -> Heads:
        """The heads of keys that these heads of queries read."""
        groups = heads // kv_heads
        return Heads(tuple((start // groups, (stop - 1) // groups + 1) for start, stop in self.ranges))


def by_heads(links: Links, shards: Shards, tensors: list[Tensor], heads: list[Heads]) -> list[Tensor]:
    """All tokens of this rank's heads, ``(B, H_rank, L, D)``, of tensors with this rank's tokens of all heads."""
    return list(_ByHeads.apply(links, shards, tuple(heads), *tensors))


def by_tokens(links: Links, shards: Shards, tensors: list[Tensor], heads: list[Heads]) -> list[Tensor]:
    """The inverse of `by_heads`, where no head is on two ranks: ``(B, H, L_rank, D)``."""
    return list(_ByTokens.apply(links, shards, tuple(heads), *tensors))


class _ByHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, links: Links, shards: Shards, heads: tuple[Heads, ...], *tensors: Tensor) -> Any:
        ctx.links, ctx.shards, ctx.heads, ctx.sizes = links, shards, heads, [x.shape[1] for x in tensors]
        return tuple(_gather_tokens(links, shards, tensors, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = _wanted(ctx)
        heads, sizes = [ctx.heads[i] for i in wanted], [ctx.sizes[i] for i in wanted]
        found = _gather_heads(ctx.links, ctx.shards, [grads[i] for i in wanted], heads, sizes)
        return None, None, None, *_where_wanted(wanted, found, len(grads))


class _ByTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, links: Links, shards: Shards, heads: tuple[Heads, ...], *tensors: Tensor) -> Any:
        ctx.links, ctx.shards, ctx.heads = links, shards, heads
        return tuple(_gather_heads(links, shards, tensors, heads, [own.ranges[-1][1] for own in heads]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = _wanted(ctx)
        found = _gather_tokens(ctx.links, ctx.shards, [grads[i] for i in wanted], [ctx.heads[i] for i in wanted])
        return None, None, None, *_where_wanted(wanted, found, len(grads))


def _wanted(ctx: Any) -> list[int]:
    """Indices of the tensors that want a gradient: the same on all ranks."""
    return [i for i, wants in enumerate(ctx.needs_input_grad[3:]) if wants]


def _where_wanted(wanted: list[int], found: list[Tensor], count: int) -> list[Tensor | None]:
    by_index = dict(zip(wanted, found, strict=True))
    return [by_index.get(i) for i in range(count)]


_WHAT = "the exchange of heads"


def _gather_tokens(links: Links, shards: Shards, tensors: Any, heads: Any) -> list[Tensor]:
    moves, found = [], []
    for x, own in zip(tensors, heads, strict=True):
        start, stop = own.ranges[links.rank]
        sends = [(x[:, a:b].contiguous(), rank) for rank, (a, b) in enumerate(own.ranges)]
        shape = (x.shape[0], stop - start, -1, x.shape[3])
        receives = [(x.new_empty((*shape[:2], shards.size(rank), shape[3])), rank) for rank in range(links.ranks)]
        moves.append((links.start(_others(links, sends), _others(links, receives), _WHAT), sends, receives))
    for (pending, sends, receives), x in zip(moves, tensors, strict=True):
        pending.wait()
        parts = [part for part, _ in receives]
        parts[links.rank] = sends[links.rank][0]
        whole = x.new_empty((*parts[0].shape[:2], shards.length, x.shape[3]))
        for rank, part in enumerate(parts):
            whole[:, :, shards.rows(rank, x.device)] = part
        found.append(whole)
    return found


def _gather_heads(links: Links, shards: Shards, tensors: Any, heads: Any, counts: list[int]) -> list[Tensor]:
    moves, found = [], []
    size = shards.size(links.rank)
    for x, own in zip(tensors, heads, strict=True):
        sends = [(x[:, :, shards.rows(rank, x.device)].contiguous(), rank) for rank in range(links.ranks)]
        receives = [(x.new_empty((x.shape[0], b - a, size, x.shape[3])), i) for i, (a, b) in enumerate(own.ranges)]
        moves.append((links.start(_others(links, sends), _others(links, receives), _WHAT), sends, receives))
    for (pending, sends, receives), x, own, count in zip(moves, tensors, heads, counts, strict=True):
        pending.wait()
        whole = x.new_zeros((x.shape[0], count, size, x.shape[3]))
        for rank, (a, b) in enumerate(own.ranges):  # parts of a gradient where ranks read the same head of keys
            whole[:, a:b] += sends[rank][0] if rank == links.rank else receives[rank][0]
        found.append(whole)
    return found


def _others(links: Links, moves: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    return [(x, rank) for x, rank in moves if rank != links.rank]
