"""Keys and values of the positions that an attention has seen, so that generation computes each once."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from ..call import accumulation_dtype
from ..functional import expressive_attention
from ..near_far import check_near, join
from ..recurrent import SquaredState

__all__ = ["Cache", "KeyValueCache", "NearFarCache", "SquaredCache"]


class KeyValueCache:
    """Keys and values ``(..., H, length, E)`` of the positions that a causal `SelfAttention` has seen.

    Memory is made once, at the first use, for `capacity` positions.

    Args:
        capacity: Largest number of positions T.

    Attributes:
        length: Number of positions seen.

    Raises:
        ValueError: `capacity` is below 1; from ``append``, for more positions than that.

    Example:
        >>> cache = KeyValueCache(capacity=100)
        >>> keys, values = cache.append(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
        >>> keys, values = cache.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        >>> keys.shape, cache.length
        (torch.Size([1, 2, 6, 8]), 6)
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

    Example:
        >>> cache = SquaredCache()
        >>> for length in (5, 1):  # a prompt, then a token
        ...     output = cache.attend(*torch.randn(3, 1, 2, length, 8))
        >>> output.shape, cache.length
        (torch.Size([1, 2, 1, 8]), 6)
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


class NearFarCache:
    """The cache of constant size of a `NearFarAttention`: the keys and values of a window, and a state of those before.

    It has room for twice the window, so that keys and values are moved once in as many positions. No gradient goes
    through it to earlier positions.

    Args:
        window: Number of keys that are near.

    Attributes:
        length: Number of positions seen.
        state: `SquaredState` ``(B, H)`` of the keys and values that have left the window, with all leading dimensions
            in B; None as long as none has.

    Raises:
        TypeError: `window` is no integer.
        ValueError: It is below 1.
    """

    def __init__(self, window: int) -> None:
        check_near(window)
        self.window = window
        self.length = 0
        self.state: SquaredState | None = None
        self._memory: tuple[Tensor, Tensor] | None = None
        self._held = slice(0, 0)  # the places of the window in memory

    def attend(self, query: Tensor, key: Tensor, value: Tensor, alibi_slopes: Tensor | None = None) -> Tensor:
        """Attention of the next positions, as `near_far_attention`; their keys and values are added.

        Args:
            query: ``(..., H, L, E)``.
            key: ``(..., H, L, E)``.
            value: ``(..., H, L, Ev)``.
            alibi_slopes: ``(H,)``, float32.

        Returns:
            ``(..., H, L, Ev)``.

        Raises:
            ValueError: A shape does not fit what was seen before.
        """
        batch = query.shape[:-3]
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        keys, values = self._append(k, v)
        output, normalizer = expressive_attention(
            q, keys, values, is_causal=True, causal_alignment="lower_right", window_size=(self.window - 1, -1),
            alibi_slopes=alibi_slopes, return_normalizer=True,
        )  # fmt: skip
        leaving = keys.shape[2] - self.window  # at most one for each query
        if leaving > 0:
            far = self._far(q[:, :, -leaving:], keys[:, :, :leaving], values[:, :, :leaving], alibi_slopes)
            log_factor = normalizer.new_tensor(-math.log(q.shape[-1]), dtype=torch.float64)  # the square of the scale
            if alibi_slopes is not None:
                log_factor = log_factor - self.window * alibi_slopes.to(torch.float64)
            output, _ = join((output, normalizer), far, log_factor)
        self.length += k.shape[2]
        return output.reshape(*batch, *output.shape[-3:])

    def _far(self, query: Tensor, key: Tensor, value: Tensor, alibi_slopes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and N, of a scale of 1, of keys that have left; each query sees those up to the one beside it."""
        if self.state is None:
            sizes = key.shape[0], key.shape[1], key.shape[3], value.shape[3]
            self.state = SquaredState(*sizes, device=key.device, dtype=accumulation_dtype(key.dtype))
        log_decay = None if alibi_slopes is None else -alibi_slopes.unsqueeze(-1).expand(key.shape[:3])
        return self.state.extend(query, key, value, log_decay, return_normalizer=True)

    def _append(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keys and values of the window so far and those that are added, ``(B, H, at most window + L, E)``."""
        new = key.shape[2]
        if self._memory is None:
            shape = (*key.shape[:2], 2 * self.window)
            self._memory = key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3])
        pairs = list(zip(self._memory, (key, value), strict=True))
        begin, end = self._held.start, self._held.stop + new
        has_gradient = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        if end > 2 * self.window or has_gradient:
            whole = [torch.cat([memory[:, :, self._held], x], 2) for memory, x in pairs]
            begin, end = 0, min(self.window, whole[0].shape[2])
            for memory, x in zip(self._memory, whole, strict=True):
                memory[:, :, :end] = x[:, :, x.shape[2] - end :].detach()
        else:
            for memory, x in pairs:
                memory[:, :, end - new : end] = x
            whole = [memory[:, :, begin:end] for memory in self._memory]
        self._held = slice(max(begin, end - self.window), end)
        return whole

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, which grow no more once a key has left the window."""
        return sum(x.nbytes for x in self._memory or ()) + (0 if self.state is None else self.state.nbytes)

    @staticmethod
    def saves_memory(window: int, dim: int, positions: int, dtype: torch.dtype) -> bool:
        """Whether it is smaller than a `KeyValueCache` of so many positions, of heads of width `dim`."""
        return SquaredCache.saves_memory(dim, positions - 2 * window, dtype)


Cache: TypeAlias = KeyValueCache | SquaredCache | NearFarCache
