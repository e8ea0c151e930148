"""Keys and values of the positions that an attention has seen, so that generation computes each once."""

from __future__ import annotations

from torch import Tensor

__all__ = ["KeyValueCache"]


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
