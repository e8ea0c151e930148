"""Whole models on a part of the sequence: what their layers call computes over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..functional import expressive_attention
from ..overrides import takers
from .context import METHODS, context_parallel
from .links import Links
from .orders import Shards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ContextParallel", "active"]

_ACTIVE: list[ContextParallel] = []


def active() -> ContextParallel | None:
    """The innermost region that the program is in, or None."""
    return _ACTIVE[-1] if _ACTIVE else None


class _Guard(TorchFunctionMode):
    """Softmax attention of torch is an error."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            raise NotImplementedError(
                "scaled_dot_product_attention would see this rank's tokens alone in a region of ContextParallel; "
                "convert switches models"
            )
        return func(*args, **(kwargs or {}))


class ContextParallel(AbstractContextManager["ContextParallel"]):
    """A region in which `expressive_attention` is over the tokens of all ranks: ``with ContextParallel(...):``.

    Models run in it as they are, on their rank's tokens: modules of `expressive_attention.nn`, code that calls
    `expressive_attention`, and models that `convert` has switched, those of transformers included. All else in a
    model is by token, but for positions: give the model those of its tokens (`position_ids`).

    Where activations are checkpointed, the backward pass belongs into the region too: it runs layers anew. Layers that
    compute softmax by `scaled_dot_product_attention` raise an error, since each rank would see its own tokens alone.

    Args:
        mesh: A DeviceMesh of one dimension, such as ``mesh["cp"]``.
        shards: Which tokens each rank has.
        method: As of `context_parallel`. None: ``"states"`` for calls of the form ``"squared"`` that it has a form of,
            and ``"ring"`` for all others.
        key_lengths: How many tokens of each sequence of the batch exist, ``(B,)``, the same on all ranks; None: all.
        timeout: Seconds to wait for another rank, on the CPU; None: as long as the process group says.

    Raises:
        TypeError: `mesh` is no DeviceMesh, or `shards` no `Shards`.
        ValueError: The mesh does not have the ranks of `shards`, or the name of the method is wrong.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        shards: Shards,
        *,
        method: str | None = None,
        key_lengths: Tensor | None = None,
        timeout: float | None = None,
    ) -> None:
        links = Links(mesh, timeout)
        if not isinstance(shards, Shards):
            raise TypeError(f"shards must be a Shards, got {type(shards).__name__}")
        if shards.ranks != links.ranks:
            raise ValueError(f"shards must be of the {links.ranks} ranks of mesh, got {shards.ranks}")
        if method is not None and method not in METHODS:
            raise ValueError(f"method must be one of {METHODS} or None, got {method!r}")
        self.shards, self.rank = shards, links.rank
        self._mesh, self._method, self._key_lengths, self._timeout = mesh, method, key_lengths, timeout
        self._guard = _Guard()

    @property
    def position_ids(self) -> Tensor:
        """The place of each of this rank's tokens in its sequence, ``(1, L_rank)`` of int64."""
        return self.shards.places(self.rank).unsqueeze(0)

    def __enter__(self) -> ContextParallel:
        self._guard.__enter__()
        _ACTIVE.append(self)
        takers.append(self._take)
        return self

    def __exit__(self, *error: Any) -> None:
        takers.remove(self._take)
        _ACTIVE.remove(self)
        self._guard.__exit__(*error)

    def _take(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a call of a public function; calls that it makes itself are what they are elsewhere."""
        if function is not expressive_attention:
            raise NotImplementedError("packed sequences are those of shards in a region of ContextParallel")
        own = takers.pop()
        try:
            return self._attend(*args, **kwargs)
        finally:
            takers.append(own)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        **options: Any,
    ) -> Any:
        size = self.shards.size(self.rank)
        if query.shape[-2] != size or key.shape[-2] != size:
            raise ValueError(
                f"attention in a region of ContextParallel is among the {size} tokens that rank {self.rank} has, got "
                f"{query.shape[-2]} queries and {key.shape[-2]} keys"
            )
        if options.pop("key_lengths") is not None:
            raise ValueError("key_lengths are those of ContextParallel in its region, got some in a call")
        if options.pop("relative_bias") is not None:
            raise ValueError("relative_bias must be None in a region of ContextParallel; give a float mask")
        for name in ("block_mask", "tolerance"):
            if options.pop(name) is not None:
                raise ValueError(f"{name} must be None in a region of ContextParallel")
        options.pop("causal_alignment")  # as many queries as keys
        method = self._method
        if method is None:
            plain = attn_mask is None and not dropout_p and tuple(options["window_size"]) == (-1, -1)
            plain = plain and len(self.shards.lengths) == 1 and (is_causal or options["alibi_slopes"] is None)
            plain = plain and (self._key_lengths is None or options["log_decay"] is None)
            method = "states" if plain and options["form"] == "squared" else "ring"
        return context_parallel(
            query, key, value, self._mesh, attn_mask, dropout_p, is_causal, shards=self.shards, method=method,
            key_lengths=self._key_lengths, timeout=self._timeout, **options,
        )  # fmt: skip
