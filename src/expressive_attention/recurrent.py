"""The squared form as a recurrence: what all keys so far amount to, in a size that does not grow with their number.

    w_ij = (q_i . k_j)^2 exp(sum of the log decays of tokens after j),    o_i = sum_j w_ij v_j / sum_j w_ij

A squared dot product is linear in the E (E + 1) / 2 distinct products of components: it is phi(q) . phi(k). So
sum_j w_ij v_j = phi(q_i)^T sum_j phi(k_j) v_j^T, and a decoder has to keep no more than these sums. The scale cancels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from .backends import cpu
from .backends.cpu import library
from .backends.linear.state import State
from .call import differentiated_by_func
from .functional import expressive_attention

__all__ = ["SquaredState"]

# Keys that are added, and queries that are answered, at a time: their products are in memory together.
_CHUNK = 256

_MAGIC = "expressive_attention.SquaredState"


class SquaredState:
    """Sums over the keys and values that attention in the squared form has seen so far.

    Attributes:
        sums: sum_j phi(k_j) v_j^T, ``(B, H, E (E + 1) / 2, Ev)``: products k_a k_b with a <= b, row by row of the upper
            triangle.
        moment: sum_j phi(k_j), ``(B, H, E (E + 1) / 2)`` of float64: terms of the normalizer may cancel.
        dim: E.

    Sums are float32, or float64 where `dtype` says so. A head of 64 by 64 takes 0.55 MB in float32. An output has the
    relative error of its sums times |q|^2 sum_j |k_j|^2 / sum_j (q . k_j)^2, which is E for random vectors; it is large
    where a query is nearly orthogonal to all keys. Keys are not kept, so no backend can help out there.

    Args:
        batch: B.
        heads: H, heads of keys and values.
        dim: E.
        value_dim: Ev; default: E.
        device: Where the sums are.
        dtype: float32 or float64.

    Raises:
        ValueError: A size is not positive, or `dtype` is another one.

    Example:
        >>> from expressive_attention import expressive_attention
        >>> q, k, v = torch.randn(3, 1, 2, 6, 8)
        >>> state = SquaredState(batch=1, heads=2, dim=8)
        >>> _ = state.update(k[:, :, :5], v[:, :, :5])
        >>> last = state.extend(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:])
        >>> whole = expressive_attention(q, k, v, is_causal=True, form="squared")
        >>> torch.allclose(last, whole[:, :, 5:], atol=1e-4)
        True
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        value_dim = dim if value_dim is None else value_dim
        for name, size in (("batch", batch), ("heads", heads), ("dim", dim), ("value_dim", value_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.dim = dim
        products = dim * (dim + 1) // 2
        self._pairs = _triangle(dim, device)
        self.sums = torch.zeros(batch, heads, products, value_dim, device=device, dtype=dtype)
        self.moment = torch.zeros(batch, heads, products, device=device, dtype=torch.float64)

    def update(self, key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> SquaredState:
        """Add T keys and values, the earlier ones first.

        Args:
            key: ``(B, H, T, E)``, floating; computed in the dtype of the sums.
            value: ``(B, H, T, Ev)``.
            log_decay: ``(B, H, T)``, at most 0: before token t is added, all earlier ones are multiplied by
                ``exp(log_decay_t)``. None: nothing decays.

        Returns:
            The state itself.

        Raises:
            ValueError: A shape does not fit.
        """
        tokens = self._check_tokens(key, value, log_decay)
        if tokens == 1 and self._in_c(key, value, log_decay):
            self._step(key[:, :0], (key, value), log_decay)
            return self
        with torch.no_grad():
            for start in range(0, tokens, _CHUNK):
                part = slice(start, start + _CHUNK)
                self._add(key[:, :, part], value[:, :, part], None if log_decay is None else log_decay[:, :, part])
        return self

    def _add(self, key: Tensor, value: Tensor, log_decay: Tensor | None) -> None:
        key, value = key.to(self.sums.dtype), value.to(self.sums.dtype)
        weight = None
        if log_decay is not None:
            since = log_decay.to(torch.float64).cumsum(-1)
            self.decay(since[..., -1])
            weight = (since[..., -1:] - since).exp().to(self.sums.dtype).unsqueeze(-1)
            value = value * weight
        batch, heads, tokens, _ = key.shape
        if tokens == 1:  # faster than by blocks
            wide = self._products(key.double())
            products = wide.to(self.sums.dtype).flatten(0, 1)
            self.sums.view(batch * heads, *self.sums.shape[2:]).baddbmm_(products.mT, value.flatten(0, 1))
            self.moment += (wide if weight is None else wide * weight).squeeze(2)
            return
        state = State(batch * heads, self.dim, value.shape[-1], self.sums)
        state.add_(key.flatten(0, 1), value.flatten(0, 1), None if weight is None else weight.flatten(0, 1))
        self.sums += state.distinct().unflatten(0, (batch, heads))
        rows, columns = self._pairs
        self.moment += state.moment[:, rows, columns].unflatten(0, (batch, heads))

    @overload
    def attend(self, query: Tensor, *, return_normalizer: Literal[False] = False) -> Tensor: ...

    @overload
    def attend(self, query: Tensor, *, return_normalizer: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def attend(self, query: Tensor, *, return_normalizer: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The output of queries that see all keys so far: sum_j w_ij v_j / sum_j w_ij, 0 where no key has weight.

        Args:
            query: ``(B, Hq, L, E)``, Hq a multiple of H.
            return_normalizer: Also return N = sum_j w_ij, of the weights above, whose scale is 1.

        Returns:
            ``(B, Hq, L, Ev)`` in the dtype of `query`; with `return_normalizer` also N ``(B, Hq, L)`` in float64.

        Raises:
            ValueError: The shape does not fit.
        """
        self._check_query(query)
        if query.shape[2] == 1 and self._in_c(query):
            result = self._step(query)
        else:
            size, unit = _unit(query, self.sums.dtype)
            result = _result(query, size, *self._read(unit))
        return result if return_normalizer else result[0]

    @overload
    def extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None = None,
        *,
        return_normalizer: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None = None,
        *,
        return_normalizer: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None = None,
        *,
        return_normalizer: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Causal attention of T tokens that follow those so far, whose keys and values are then added.

        Token t sees all keys so far, and those of the T tokens up to its own.

        Args:
            query: ``(B, Hq, T, E)``, Hq a multiple of H.
            key: ``(B, H, T, E)``, dtype of `query`.
            value: ``(B, H, T, Ev)``, likewise.
            log_decay: ``(B, H, T)``, as in `update`.
            return_normalizer: Also return N, as `attend` does.

        Returns:
            ``(B, Hq, T, Ev)`` in the dtype of `query`; with `return_normalizer` also N ``(B, Hq, T)`` in float64. No
            gradient goes through the state to earlier tokens.

        Raises:
            ValueError: A shape or dtype does not fit.
        """
        self._check_query(query)
        tokens = self._check_tokens(key, value, log_decay)
        if query.shape[2] != tokens:
            raise ValueError(f"query and key must be of the same tokens, got {query.shape[2]} and {tokens}")
        if tokens == 1 and self._in_c(query, key, value, log_decay):
            result = self._step(query, (key, value), log_decay)
        elif tokens == 1:
            result = self.update(key, value, log_decay).attend(query, return_normalizer=True)
        elif return_normalizer or self.moment.any():
            result = self._extend(query, key, value, log_decay)
        else:
            self.update(key, value, log_decay)
            return expressive_attention(
                query, key, value, is_causal=True, enable_gqa=True, form="squared", log_decay=log_decay
            )
        return result if return_normalizer else result[0]

    def _extend(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and N of several tokens."""
        size, unit = _unit(query, self.sums.dtype)
        keeps_graph = torch.is_grad_enabled() and query.requires_grad  # the update must not change what it has saved
        past = (self.copy() if keeps_graph else self)._past(unit, log_decay)
        self.update(key, value, log_decay)
        own, weight = expressive_attention(
            unit, key.to(unit.dtype), value.to(unit.dtype), is_causal=True, scale=1.0, enable_gqa=True, form="squared",
            log_decay=log_decay, return_normalizer=True,
        )  # fmt: skip
        weight = weight.unsqueeze(-1).to(torch.float64)
        if past is None:
            return own.to(query.dtype), _with_size(weight, size)
        found, total = past
        return _result(query, size, found + weight.to(own.dtype) * own, total + weight)

    def _in_c(self, *tensors: Tensor | None) -> bool:
        """Whether the C kernel takes one token: it gives no gradient, and reads the memory of plain tensors."""
        own = (self.sums, self.moment, *(x for x in tensors if x is not None))
        return (
            library.MISSING is None
            and not torch.compiler.is_compiling()
            and not differentiated_by_func()
            and not torch._C._are_functorch_transforms_active()
            and all(type(x) is Tensor and x.is_cpu for x in own)
            and not (torch.is_grad_enabled() and any(x.requires_grad for x in own))
            and self.sums.is_contiguous()
            and self.moment.is_contiguous()
        )

    def _step(
        self, query: Tensor, pair: tuple[Tensor, Tensor] | None = None, log_decay: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add the key and value of one token, if there are any, and give output and N of queries, by the C kernel."""
        pair = None if pair is None else (pair[0].squeeze(2), pair[1].squeeze(2))
        factor = None if log_decay is None else log_decay.to(torch.float64).exp()
        output, normalizer = cpu.step(self.sums, self.moment, query.squeeze(2), pair, factor)
        return output.unsqueeze(2).to(query.dtype), normalizer.unsqueeze(2)

    def _past(self, query: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The sums of `_read` for tokens ``(B, Hq, T, E)``, with their decay; None: there are no keys so far."""
        if not self.moment.any():
            return None
        found, total = self._read(query)
        if log_decay is not None:
            groups = query.shape[1] // self.sums.shape[1]
            factor = log_decay.to(torch.float64).cumsum(-1).exp()
            factor = factor.repeat_interleave(groups, 1).unsqueeze(-1)
            found, total = found * factor.to(self.sums.dtype), total * factor
        return found, total

    def _read(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """sum_j w_ij v_j ``(B, Hq, L, Ev)`` in the dtype of the sums, and sum_j w_ij ``(B, Hq, L, 1)`` in float64."""
        rows, columns = self._pairs
        twice = 2 - (rows == columns).long()  # of different components
        groups, heads = query.shape[1] // self.sums.shape[1], self.sums.shape[1]
        parts = []
        for own in query.split(_CHUNK, 2):
            wide = self._products(own.double().unflatten(1, (heads, groups)).flatten(2, 3)) * twice
            total = wide @ self.moment.unsqueeze(-1)
            found = wide.to(self.sums.dtype) @ self.sums
            parts.append([x.unflatten(2, (groups, -1)).flatten(1, 2) for x in (found, total)])
        found, total = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        return found, total

    def _products(self, x: Tensor) -> Tensor:
        """The distinct products of the components of x ``(..., E)``."""
        rows, columns = self._pairs
        return x[..., rows] * x[..., columns]

    def _check_tokens(self, key: Tensor, value: Tensor, log_decay: Tensor | None) -> int:
        batch, heads, _, width = self.sums.shape
        tokens = key.shape[2] if key.ndim == 4 else 0
        _check("key", key, (batch, heads, tokens, self.dim))
        _check("value", value, (batch, heads, tokens, width))
        if log_decay is not None:
            _check("log_decay", log_decay, (batch, heads, tokens))
        return tokens

    def _check_query(self, query: Tensor) -> None:
        batch, heads, _, _ = self.sums.shape
        if query.ndim != 4 or query.shape[0] != batch or query.shape[1] % heads or query.shape[3] != self.dim:
            raise ValueError(
                f"query must have shape ({batch}, a multiple of {heads}, L, {self.dim}), got {tuple(query.shape)}"
            )

    def decay(self, log_factor: Tensor) -> SquaredState:
        """Multiply all weights so far by ``exp(log_factor)``, ``(B, H)``.

        Raises:
            ValueError: The shape does not fit.
        """
        _check("log_factor", log_factor, tuple(self.sums.shape[:2]))
        factor = log_factor.to(torch.float64).exp().unsqueeze(-1)
        self.moment *= factor
        self.sums *= factor.unsqueeze(-1).to(self.sums.dtype)
        return self

    def __add__(self, other: SquaredState) -> SquaredState:
        """The state of the keys of both. Call `decay` of the earlier one before, if later keys make it decay."""
        if not isinstance(other, SquaredState):
            return NotImplemented
        if self.sums.shape != other.sums.shape or self.dim != other.dim:
            raise ValueError(
                f"states of the same shape can be added, got {tuple(self.sums.shape)} and {tuple(other.sums.shape)}"
            )
        return self._of(self.sums + other.sums, self.moment + other.moment, self.dim)

    def copy(self) -> SquaredState:
        """A state that further updates of this one do not change."""
        return self._of(self.sums.clone(), self.moment.clone(), self.dim)

    def reorder(self, examples: Tensor) -> SquaredState:
        """The state of these examples of the batch, ``(B',)`` of integers, as beam search asks for it."""
        return self._of(self.sums[examples], self.moment[examples], self.dim)

    @classmethod
    def _of(cls, sums: Tensor, moment: Tensor, dim: int) -> SquaredState:
        state = cls.__new__(cls)
        state.sums, state.moment, state.dim = sums, moment, dim
        state._pairs = _triangle(dim, sums.device)
        return state

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, however many keys it has seen."""
        return self.sums.nbytes + self.moment.nbytes

    def save(self, path: str | Path) -> None:
        """Write it as safetensors (extra `geometry` or `study`).

        Raises:
            OSError: The file cannot be written.
        """
        from safetensors.torch import save

        tensors = {"sums": self.sums.contiguous(), "moment": self.moment.contiguous()}
        Path(path).write_bytes(save(tensors, {_MAGIC: str(self.dim)}))

    @classmethod
    def load(cls, path: str | Path) -> SquaredState:
        """Read what `save` has written.

        Raises:
            ValueError: The file is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                dim = (file.metadata() or {}).get(_MAGIC)
                if dim is None:
                    raise ValueError(f"path must be a file that SquaredState.save has written, got {str(path)!r}")
                return cls._of(file.get_tensor("sums"), file.get_tensor("moment"), int(dim))
        except SafetensorError as error:
            raise ValueError(
                f"path must be a file that SquaredState.save has written, got {str(path)!r}: {error}"
            ) from None

    def __repr__(self) -> str:
        batch, heads, _, width = self.sums.shape
        return (
            f"SquaredState(batch={batch}, heads={heads}, dim={self.dim}, value_dim={width}, "
            f"dtype={self.sums.dtype}, {self.nbytes / 1e6:.2f} MB)"
        )


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def _unit(query: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest entries of queries, and the queries over them, whose squares do not leave the range of the sums."""
    size = query.detach().abs().amax(-1, keepdim=True).to(dtype)
    size = torch.where(size == 0, 1.0, size)
    return size, query.to(dtype) / size


def _result(query: Tensor, size: Tensor, found: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Output in the dtype of the query and N, of sums for a query over its size."""
    divisor = total.to(found.dtype)
    output = found / torch.where(divisor <= 0, torch.inf, divisor)
    return output.to(query.dtype), _with_size(total, size)


def _with_size(total: Tensor, size: Tensor) -> Tensor:
    """N ``(B, Hq, L)`` of totals ``(B, Hq, L, 1)`` for queries over their size; rounding may take totals below 0."""
    return (total.clamp(min=0) * size.to(torch.float64).square()).squeeze(-1)


def _triangle(dim: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(dim, dim, device=device)
    return rows, columns
