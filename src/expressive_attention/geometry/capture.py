"""Watch the attention of a model while it runs.

    with capture(model) as record:
        model(batch)
    print(record)

`capture` sees every call of expressive attention and of torch's dot-product attention: in the models of
`expressive_attention.nn` and of the study, in models switched by `convert`, and in unconverted models of torch, Hugging
Face transformers (with ``attn_implementation="sdpa"``, the default), timm and others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..call import Call, Visibility
from ..functional import fold_batch, fold_mask, with_dims
from ..integrations.classes import set_attributes
from ..integrations.tracing import Tracer, traced
from .record import LayerRecord, Record

__all__ = ["capture"]

_sdpa = F.scaled_dot_product_attention
_SDPA = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0, "is_causal": False,
            "scale": None, "enable_gqa": False,
        }.items()
    ]
)  # fmt: skip


@contextmanager
def capture(
    model: nn.Module,
    layers: str | Iterable[str] | None = None,
    *,
    max_tokens: int = 512,
    pairs: int = 32768,
    into: Record | None = None,
) -> Iterator[Record]:
    """Record the attention of all forward passes inside the block.

    Statistics are sums over all queries and keys, and over pairs of query and key. The pairs are those of random
    queries of each call with all their keys, or of all queries if they have no more than `pairs` pairs. Memory and time
    therefore do not grow with the square of the length. The record keeps queries and keys of the first call, up to
    `max_tokens` tokens per layer, and computes maps of attention from them on demand. The model's outputs do not
    change.

    Args:
        model: Any model that runs eagerly. It must not be compiled.
        layers: Names of modules that attend, or patterns such as ``"encoder.*"``; default: all of them.
        max_tokens: Tokens kept per layer: examples times their length, or the start of a longer example.
        pairs: Number of pairs of query and key for statistics, per call and head.
        into: A record of this model to add to; default: a new record.

    Yields:
        The record, complete when the block ends.

    Raises:
        TypeError: `model` is not a module, a pattern is not a string, or `into` is not a record.
        ValueError: A pattern matches no module, a number is not positive, or `into` is of another model. In the pass:
            a batch is empty, or queries, keys or values are not finite. At the end: no attention was seen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in (("max_tokens", max_tokens), ("pairs", pairs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if into is not None and not isinstance(into, Record):
        raise TypeError(f"into must be a Record or None, got {type(into).__name__}")
    modules = dict(model.named_modules())
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers must be names of modules, got {pattern!r}")
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"layers must name modules of the model, got {pattern!r}, which matches none")
    record = (Record() if into is None else into).of(model)
    generator = torch.Generator().manual_seed(0)
    calls, others = 0, set()

    def told(layer: str, call: Call) -> None:
        nonlocal calls
        if not any(fnmatchcase(layer, pattern) for pattern in patterns):
            others.add(layer)
        else:
            calls += 1
            found = record.layers.setdefault(layer, LayerRecord(layer))
            found.add(call, pairs, max_tokens, generator)

    with ExitStack() as stack:
        tracer = stack.enter_context(traced(modules, told))
        stack.enter_context(_Sdpa(tracer))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # this path computes softmax out of sight
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield record
    if not calls and others:
        raise ValueError(
            f"layers must name modules that attend, {', '.join(sorted(others))}, got {', '.join(patterns)}"
        )
    if not calls:
        among = "" if layers is None else f" in {', '.join(patterns)}"
        raise ValueError(
            f"no attention was seen{among} of {type(model).__name__}: nothing ran, or it computes softmax by itself "
            "(transformers: load it with attn_implementation='sdpa'; timm: set fused_attn of its attention modules to "
            "True)"
        )


class _Sdpa(TorchFunctionMode):
    """Reports calls of torch's dot-product attention like calls of `expressive_attention`."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._tell(*args, **kwargs)
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        # This function calls torch's attention outside this mode, and only if no weights are requested.
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        undo = set_attributes(F, scaled_dot_product_attention=self._attention)
        try:
            if not given.arguments["need_weights"]:
                return func(*args, **kwargs)
            given.arguments |= {"need_weights": False, "training": False}
            with torch.no_grad():
                func(*given.args, **given.kwargs)
        finally:
            undo()
        return func(*args, **kwargs)

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        self._tell(*args, **kwargs)
        return _sdpa(*args, **kwargs)

    def _tell(self, *args: Any, **kwargs: Any) -> None:
        if self.tracer.layer is None:
            return
        given = _SDPA.bind(*args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        query, key, value, mask = _four(given["query"], given["key"], given["value"], given["attn_mask"])
        scale = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
        visibility = Visibility(right=0 if given["is_causal"] else None)
        self.tracer.told(self.tracer.layer, Call(query, key, value, mask, visibility, scale, "softmax"))


def _four(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return all tensors with four dimensions, ``(B, H, L, E)``; leading dimensions are broadcast."""
    dims = max(4, query.ndim, key.ndim, value.ndim)
    query, key, value = (with_dims(x, dims) for x in (query, key, value))
    batch = tuple(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
    query, key, value = (fold_batch(x, batch, x.shape[-3]) for x in (query, key, value))
    return query, key, value, None if attn_mask is None else fold_mask(with_dims(attn_mask, dims), batch)
