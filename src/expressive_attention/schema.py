"""The schemas of the operators of torch, and calls as their arguments and back.

``expressive_attention::attention`` and ``expressive_attention::attention_backward`` run a backend by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .call import Call, Result, Upstream, Visibility

__all__ = [
    "ATTENTION",
    "BACKWARD",
    "RELATIVE",
    "SEEDS",
    "TILES",
    "Backward",
    "flatten",
    "flatten_backward",
    "unflatten",
    "unflatten_backward",
]

ATTENTION = "expressive_attention::attention"
BACKWARD = "expressive_attention::attention_backward"

# The members of a `Call`, in their order, with those of its `Visibility`, and the name of a backend.
_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "SymInt? left, SymInt? right, bool lower_right, Tensor? slopes, Tensor? key_lengths, Tensor? query_starts, "
    "Tensor? key_starts, SymInt longest_query, SymInt longest_key, Tensor? listed, Tensor? tiles, SymInt block_rows, "
    "SymInt block_keys, float scale, str form, float dropout_p, "
    "Tensor? dropout_seeds, Tensor? log_decay, Tensor? relative_bias, str backend"
)
_INPUTS = Call._fields.index("visibility")
_SETTINGS = _INPUTS + len(Visibility._fields)
TILES = _INPUTS + Visibility._fields.index("tiles")
SEEDS = _SETTINGS + 3  # the place of the seeds of dropout
RELATIVE = SEEDS + 2  # that of biases by distance
_SIZE = SEEDS + 4

torch.library.define(ATTENTION, f"({_CALL}) -> (Tensor output, Tensor normalizer, Tensor bias_max)")
# The last results are the gradients of the mask and of the biases by distance, without elements where they are not
# wanted, and between them that of the log decays, without elements where there are none.
torch.library.define(
    BACKWARD,
    f"({_CALL}, Tensor output, Tensor normalizer, Tensor grad_output, Tensor? grad_normalizer, bool wants_mask, "
    "bool wants_relative) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, "
    "Tensor grad_log_decay, Tensor grad_relative_bias)",
)


class Backward(NamedTuple):
    """The arguments of the operator of the backward pass, as objects."""

    call: Call
    backend: str
    result: Result
    upstream: Upstream


def flatten(call: Call, backend: str) -> tuple[Any, ...]:
    """The arguments of the operator."""
    return *call[:_INPUTS], *call.visibility, *call[_INPUTS + 1 :], backend


def unflatten(arguments: Sequence[Any]) -> tuple[Call, str]:
    """The call and the backend of the arguments of the operator, of which there may be more."""
    query, key, value, attn_mask = arguments[:_INPUTS]
    visibility = Visibility(*arguments[_INPUTS:_SETTINGS])
    *settings, backend = arguments[_SETTINGS:_SIZE]
    return Call(query, key, value, attn_mask, visibility, *settings), backend


def flatten_backward(call: Call, backend: str, result: Result, upstream: Upstream) -> tuple[Any, ...]:
    """The arguments of the operator of the backward pass."""
    return *flatten(call, backend), result.output, result.normalizer, *upstream


def unflatten_backward(arguments: Sequence[Any]) -> Backward:
    """Rebuild the arguments of the operator of the backward pass."""
    output, normalizer, *upstream = arguments[_SIZE:]
    return Backward(*unflatten(arguments), Result(output, normalizer, None), Upstream(*upstream))
