"""Keys and values of the positions that an attention has seen, so that generation computes each once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import accumulation_dtype
from ..recurrent import SquaredState

__all__ = ["KeyValueCache", "SquaredCache"]


class KeyValueCache:
    """Keys and values ``(..., H, length, E)`` of the positions that a causal `SelfAttention` has seen.

    Memory is made once, at the first use, for `capacity` positions.

    Args:
        capacity: Largest number of positions T.

    Attributes:
        length: Number of positions seen.

    Raises:
        ValueError: `capacity` is below 1; from ``append``, for more positions than that.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.length = 0
        self._memory: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values ``(..., H, L, E)`` of the next positions; returns those of all positions so far."""
        end = self.length + key.shape[-2]
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} positions, got {end}")
        if self._memory is None:
            shape = (*key.shape[:-2], self.capacity, key.shape[-1])
            self._memory = key.new_empty(shape), value.new_empty(shape)
        for memory, x in zip(self._memory, (key, value), strict=True):
            memory[..., self.length : end, :] = x
        self.length = end
        keys, values = (memory[..., :end, :] for memory in self._memory)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the positions seen."""
        return sum(memory[..., : self.length, :].nbytes for memory in self._memory or ())


class SquaredCache:
    """The cache of constant size of a causal `SelfAttention` whose mechanism is ``"squared"``.

    In the place of keys and values it keeps a `SquaredState`, of E (E + 1) / 2 times Ev numbers for each head, in
    float32, or float64 for float64. It takes less memory than keys and values of more than (E + 1)^2 / 4 positions.
    No gradient goes through it to earlier positions.

    Attributes:
        length: Number of positions seen.
        state: Its `SquaredState` ``(B, H)``, with all leading dimensions in B; None before the first use.
    """

    def __init__(self) -> None:
        self.length = 0
        self.state: SquaredState | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> Tensor:
        """Causal attention of the next positions, whose keys and values are added.

        Args:
            query: ``(..., H, L, E)``.
            key: ``(..., H, L, E)``.
            value: ``(..., H, L, Ev)``.
            log_decay: ``(H,)``: from one position to the next, weights are multiplied by its exponential.

        Returns:
            ``(..., H, L, Ev)``.

        Raises:
            ValueError: A shape does not fit what was seen before.
        """
        batch = query.shape[:-3]
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        if self.state is None:
            dtype = accumulation_dtype(q.dtype)
            sizes = k.shape[0], k.shape[1], k.shape[3], v.shape[3]
            self.state = SquaredState(*sizes, device=k.device, dtype=dtype)
        if log_decay is not None:
            log_decay = log_decay.unsqueeze(-1).expand(*k.shape[:3])
        output = self.state.extend(q, k, v, log_decay)
        self.length += k.shape[2]
        return output.reshape(*batch, *output.shape[-3:])

    @staticmethod
    def saves_memory(dim: int, positions: int, dtype: torch.dtype) -> bool:
        """Whether it is smaller than a `KeyValueCache` of so many positions, of heads of width `dim`."""
        numbers = dim * (dim + 1) // 2 * (dim * accumulation_dtype(dtype).itemsize + torch.float64.itemsize)
        return numbers < 2 * positions * dim * dtype.itemsize
