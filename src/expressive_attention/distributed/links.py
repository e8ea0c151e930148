"""Messages between the ranks of a mesh, and an error that says which rank did not answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Links", "Pending"]


class Links:
    """The ranks of a mesh of one dimension, as one of them sees them.

    Attributes:
        rank: Its own place among them.
        ranks: P, how many there are.

    Args:
        mesh: A DeviceMesh of one dimension, such as ``mesh["cp"]`` of a larger one.
        timeout: Seconds that a rank on the CPU waits for another; None: as long as the process group says. On GPUs the
            process group alone decides, since waiting there would hold up the host.

    Raises:
        TypeError: `mesh` is no DeviceMesh, or `timeout` no number.
        ValueError: The mesh has several dimensions, or does not have this process; `timeout` is not positive.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float | None = None) -> None:
        if not hasattr(mesh, "get_group") or not hasattr(mesh, "ndim"):
            raise TypeError(f"mesh must be a torch.distributed.DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names
            hint = f', such as mesh["{names[-1]}"]' if names else ""
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: choose one of them{hint}")
        if timeout is not None and not isinstance(timeout, (int, float)):
            raise TypeError(f"timeout must be a number of seconds or None, got {type(timeout).__name__}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive, got {timeout}")
        if mesh.get_coordinate() is None:
            raise ValueError("mesh must have this process among its ranks")
        self._group = mesh.get_group()
        self._timeout = timeout
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()

    def start(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], what: str, tag: int = 0
    ) -> Pending:
        """Begin to send contiguous tensors to ranks, and to receive some from ranks, all at once.

        Args:
            sends: Tensors, and the rank that each goes to.
            receives: Tensors, and the rank that writes each.
            what: Words for it, for errors.
            tag: A number that tells transfers apart that are on their way between the same ranks at once.
        """
        moves = [(dist.isend, x, peer) for x, peer in sends] + [(dist.irecv, x, peer) for x, peer in receives]
        moves = [(move, x, peer) for move, x, peer in moves if x.numel()]
        if not moves:
            return Pending(self, [], [], what)
        with self._explained(what, [peer for *_, peer in moves]):
            ops = [dist.P2POp(move, x, self._global(peer), self._group, tag) for move, x, peer in moves]
            works = dist.batch_isend_irecv(ops)
        return Pending(self, works, moves, what)

    def add(self, x: Tensor, what: str) -> Tensor:
        """The sum of a tensor over all ranks, in its memory."""
        return self._reduce(x, dist.ReduceOp.SUM, what)

    def largest(self, x: Tensor, what: str) -> Tensor:
        """The largest number of all ranks, for each of a tensor, in its memory."""
        return self._reduce(x, dist.ReduceOp.MAX, what)

    def gather(self, x: Tensor, sizes: Sequence[int], what: str) -> list[Tensor]:
        """The tensors of all ranks, which differ in the size of their last dimension."""
        longest = max(sizes)
        padded = torch.nn.functional.pad(x, (0, longest - x.shape[-1])).contiguous()
        found = [torch.empty_like(padded) for _ in range(self.ranks)]
        if self.ranks == 1:
            return [x]
        with self._explained(what, range(self.ranks)):
            work = dist.all_gather(found, padded, group=self._group, async_op=True)
            self.wait(work, padded)
        return [part[..., :size] for part, size in zip(found, sizes, strict=True)]

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType, what: str) -> Tensor:
        if self.ranks > 1:
            with self._explained(what, range(self.ranks)):
                self.wait(dist.all_reduce(x, op, group=self._group, async_op=True), x)
        return x

    def wait(self, work: dist.Work | None, x: Tensor) -> None:
        """Wait for the transfer of a tensor."""
        if work is not None:
            if self._timeout is None or not x.is_cpu:
                work.wait()
            else:
                work.wait(timedelta(seconds=self._timeout))

    def _global(self, peer: int) -> int:
        return dist.get_global_rank(self._group, peer)

    @contextmanager
    def _explained(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            others = sorted(set(peers) - {self.rank})
            named = f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {others}"
            seconds = "" if self._timeout is None else f", within {self._timeout:g} s each"
            raise ConnectionError(
                f"rank {self.rank} of {self.ranks} did not finish {what} with {named}{seconds}; it may have died, or "
                f"wait for something else: {error}"
            ) from error


class Pending:
    """Transfers on their way; it keeps their tensors."""

    def __init__(
        self, links: Links, works: list[dist.Work], moves: Sequence[tuple[object, Tensor, int]], what: str
    ) -> None:
        self._links, self._works, self._moves, self._what = links, works, moves, what

    def wait(self) -> None:
        """Wait until all of them are done.

        Raises:
            ConnectionError: One of them failed, or was not done in time.
        """
        each = len(self._works) == len(self._moves)  # a backend may give one piece of work for all of them
        for i, work in enumerate(self._works):
            mine = self._moves[i : i + 1] if each else self._moves
            with self._links._explained(self._what, [peer for *_, peer in mine]):
                self._links.wait(work, mine[0][1])
        self._works, self._moves = [], []
