"""One call that switches a model to expressive attention, and a proof of where it ran."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends.problem import check_form
from .inspection import attention_like, names_used
from .switching import GAIN, Switched
from .tracing import Tracer, traced

__all__ = ["Conversion", "ConversionError", "Found", "Layer", "Verification", "convert"]

Undo = Callable[[], None]

# One module each; the first that knows a layer takes it. With the library that it is for, None: torch itself.
_ADAPTERS = (
    ("huggingface", "transformers"),
    ("pytorch", None),
    ("x_transformers", "x_transformers"),
    ("timm", "timm"),
    ("diffusers", "diffusers"),
    ("functional", None),
)


class ConversionError(ValueError):
    """A model that is not, or not wholly, switched; the message names the layers and says why."""


@dataclass(frozen=True)
class Found:
    """An attention layer that an adapter knows.

    Attributes:
        name: Its dotted name in the model.
        module: The layer.
        how: How it is switched, in a few words; empty if it cannot be.
        why_not: Why it cannot be switched; empty if it can.
    """

    name: str
    module: nn.Module
    how: str = ""
    why_not: str = ""


class Adapter(Protocol):
    """What a file of this folder offers to `convert`."""

    def find(self, model: nn.Module) -> list[Found]:
        """The attention layers that it knows, switchable or not."""
        ...

    def switch(self, model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
        """Switch some of them, `whole` if these are all that the adapter has found; yields what undoes each change."""
        ...


@dataclass(frozen=True)
class Layer:
    """A row of a conversion's table.

    Attributes:
        name: Dotted name in the model.
        kind: Name of its class, before the switch.
        how: How it was switched; empty if it was left alone.
        why_not: Why it was left alone; empty if it was switched.
    """

    name: str
    kind: str
    how: str = ""
    why_not: str = ""


@dataclass(frozen=True)
class Verification:
    """Where expressive attention ran in a forward pass.

    Attributes:
        calls: Calls of expressive attention in each switched layer.
        softmax: Layers, switched or left alone, in which softmax ran, and how often; ``""`` is outside of all.
        idle: Switched layers that the pass did not come to.
    """

    calls: dict[str, int]
    softmax: dict[str, int]
    idle: tuple[str, ...]

    @property
    def failed(self) -> list[str]:
        """Switched layers that ran softmax, or ran without expressive attention."""
        return [
            name for name, count in self.calls.items() if name not in self.idle and (name in self.softmax or not count)
        ]

    def __str__(self) -> str:
        ran = sum(1 for name, count in self.calls.items() if count and name not in self.softmax)
        text = f"EA ran in {ran}/{len(self.calls)} layers"
        if self.failed:
            text += f"; not in: {', '.join(self.failed)}"
        if self.idle:
            text += f"; not reached: {', '.join(self.idle)}"
        left = [name for name in self.softmax if name and name not in self.calls]
        text += f"; softmax ran in: {', '.join(left)}" if left else ""
        return text + (f"; softmax ran outside of all of them: {self.softmax['']} times" if "" in self.softmax else "")


class Conversion:
    """A model that has been switched, and how. Printed, it is a table.

    Attributes:
        model: The model, switched in place.
        form: ``"expressive"`` or ``"squared"``.
        layers: All attention layers that were found.
        strict: Whether `verify` raises an error for a layer that does not run expressive attention.
    """

    def __init__(self, model: nn.Module, form: str, layers: Sequence[Layer], strict: bool, undos: list[Undo]) -> None:
        self.model, self.form, self.layers, self.strict = model, form, tuple(layers), strict
        self._undos: list[Undo] | None = undos

    @property
    def switched(self) -> list[Layer]:
        """The layers that compute expressive attention now."""
        return [layer for layer in self.layers if layer.how]

    @torch.no_grad()
    def verify(self, *inputs: Any, **kwargs: Any) -> Verification:
        """Run ``model(*inputs, **kwargs)`` and count calls of expressive attention in each layer.

        Softmax is found where an operator of torch computes it, fused ones included. No gradients are computed;
        training or evaluation mode is left as it is.

        Raises:
            ConversionError: With `strict`, a layer that was switched ran softmax, or no expressive attention; or no
                switched layer ran at all. The message names the layers.
        """
        if self._undos is None:
            raise ConversionError("the conversion has been undone; there is nothing to verify")
        modules = dict(self.model.named_modules())
        layers = {layer.name: modules[layer.name] for layer in self.layers}
        expressive: Counter[str] = Counter()
        with traced(layers, lambda layer, _: expressive.update([layer])) as tracer, _Softmax(tracer) as softmax:
            self.model(*inputs, **kwargs)
        switched = [layer.name for layer in self.switched]
        found = Verification(
            calls={name: expressive[name] for name in switched},
            softmax=dict(softmax.counts),
            idle=tuple(name for name in switched if not tracer.entered[name]),
        )
        if self.strict and (found.failed or len(found.idle) == len(switched)):
            raise ConversionError(str(found))
        return found

    def undo(self) -> None:
        """Restore the model: the same classes, attributes and outputs as before. A second call does nothing.

        Gains that `calibrate` gave to layers are taken away.
        """
        if self._undos is not None:
            modules = dict(self.model.named_modules())
            for layer in self.switched:
                modules[layer.name]._parameters.pop(GAIN, None)
        for undo in reversed(self._undos or []):
            undo()
        self._undos = None

    def __str__(self) -> str:
        rows = [("layer", "class", "")] + [
            (layer.name or "(the model)", layer.kind, layer.how or f"left alone: {layer.why_not}")
            for layer in self.layers
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:{widths[0]}}  {kind:{widths[1]}}  {how}".rstrip() for name, kind, how in rows]
        state = "undone" if self._undos is None else f"form {self.form!r}"
        return "\n".join([*lines, f"{len(self.switched)} of {len(self.layers)} attention layers switched, {state}"])


def convert(
    model: nn.Module, *, form: str = "expressive", layers: str | Iterable[str] | None = None, strict: bool = True
) -> Conversion:
    """Switch the attention of a model to expressive attention, in place, with the parameters that it has.

    It knows the attention of torch (`torch.nn.MultiheadAttention` and all layers and models of torch that hold it),
    of Hugging Face transformers, timm, diffusers and x-transformers, and any module whose code calls
    `torch.nn.functional.scaled_dot_product_attention`. Weights that were trained with softmax do not fit expressive
    attention as they are: see `calibrate`.

    Where query or key projections are zero (a zero-initialized adapter), expressive attention has no gradient
    (f'(0) = 0): a warning names such layers.

    Args:
        model: Any module.
        form: ``"expressive"`` or ``"squared"``, as in `expressive_attention`.
        layers: Names of the layers to switch, as `Conversion` prints them, or patterns such as ``"encoder.*"``; None:
            all.
        strict: A layer that cannot be switched is an error, and nothing is changed; otherwise it is left alone.

    Returns:
        What was done, and how to verify or undo it.

    Raises:
        TypeError: `model` is no module.
        ValueError: The form does not exist, or a name in `layers` matches no attention layer.
        ConversionError: The model has no attention that could be switched, or, with `strict`, a layer that cannot be.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> conversion = convert(model)
        >>> print(conversion.verify(torch.randn(3, 7, 16)))
        EA ran in 1/1 layers
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_form(form)
    wanted = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    by_adapter = list(_found(model))
    everything = [found for _, each in by_adapter for found in each]
    _check_wanted(wanted, everything)
    chosen = [found for found in everything if wanted is None or _matches(found.name, wanted)]
    refused = [found for found in chosen if found.why_not]
    if strict and refused:
        reasons = "; ".join(f"{found.name} ({type(found.module).__name__}): {found.why_not}" for found in refused)
        raise ConversionError(f"{len(refused)} of {len(chosen)} attention layers cannot be switched: {reasons}")
    if len(refused) == len(chosen):
        raise ConversionError(f"{type(model).__name__} has no attention layer that can be switched{_reasons(refused)}")
    rows = {id(found): _row(found, found in chosen) for found in everything}
    undos: list[Undo] = []
    try:
        for adapter, each in by_adapter:
            taken = [found for found in each if found in chosen and not found.why_not]
            if taken:
                undos.extend(adapter.switch(model, taken, form, len(taken) == len(each)))
        _warn_of_zeros(found for found in chosen if not found.why_not)
    except BaseException:
        for undo in reversed(undos):
            undo()
        raise
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ordered = sorted(everything, key=lambda found: order[found.name])
    return Conversion(model, form, [rows[id(found)] for found in ordered], strict, undos)


# Parameters from which queries and keys come, by the names that libraries give them.
_PROJECTION = re.compile(r"(^|[._])(q|k|qk|qkv|query|key|in|c_attn|query_key_value)(_?proj|_?lin)?([._]|$)")


def _warn_of_zeros(switched: Iterable[Found]) -> None:
    zero = [
        f"{found.name}.{name}".lstrip(".")
        for found in switched
        for name, parameter in found.module.named_parameters()
        if parameter.ndim > 1 and "lora" not in name and _PROJECTION.search(name)
        and not parameter.is_meta and not parameter.any()
    ]  # fmt: skip
    if zero:
        warnings.warn(
            f"query or key projections are zero, where expressive attention has no gradient: {', '.join(zero)}; "
            "initialize them otherwise, or they will never learn",
            stacklevel=3,
        )


def _row(found: Found, is_chosen: bool) -> Layer:
    kind = type(found.module).__name__
    if not is_chosen:
        return Layer(found.name, kind, why_not="not among the layers asked for")
    return Layer(found.name, kind, found.how, found.why_not)


def _reasons(refused: Sequence[Found]) -> str:
    if not refused:
        return "; code that calls torch's attention outside of modules can run inside of `expressive_sdpa`"
    return ": " + "; ".join(f"{found.name}: {found.why_not}" for found in refused)


def _check_wanted(wanted: Sequence[str] | None, everything: Sequence[Found]) -> None:
    for pattern in wanted or ():
        if not any(_matches(found.name, [pattern]) for found in everything):
            names = ", ".join(found.name for found in everything) or "none"
            raise ValueError(f"layers must name attention layers, got {pattern!r}; the model has: {names}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _found(model: nn.Module) -> Iterator[tuple[Any, list[Found]]]:
    """What each adapter finds that none before it has found, and that is not inside of such a layer."""
    done = [
        Found(name, module, why_not="it is switched already")
        for name, module in model.named_modules()
        if issubclass(type(module), Switched)
    ]
    yield None, done
    taken = [found.name for found in done]
    for name, library in _ADAPTERS:
        if library is not None and library not in sys.modules:
            continue  # a model of a library that has not been imported cannot exist
        adapter = import_module(f"{__package__}.{name}")
        new = [found for found in adapter.find(model) if not any(_inside(found.name, other) for other in taken)]
        taken += [found.name for found in new]
        yield adapter, new
    # What has an attention layer's name and is nobody's: it would go on with softmax, unseen.
    left = {
        name: module
        for name, module in model.named_modules()
        if attention_like(module)
        and any("softmax" in used.lower() for used in names_used(type(module)))
        and not any(_inside(name, other) or _inside(other, name) for other in taken)
    }
    innermost = [name for name in left if not any(_inside(other, name) for other in left if other != name)]
    yield None, [Found(name, left[name], why_not="it computes softmax by itself") for name in innermost]


def _inside(name: str, other: str) -> bool:
    """Whether the module `name` is the module `other` or a part of it."""
    return name == other or name.startswith(f"{other}." if other else "")


# ---- where it ran ----

_SOFTMAX = {
    "aten::_softmax",
    "aten::_safe_softmax",
    "aten::_log_softmax",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_native_multi_head_attention",
    "aten::_transformer_encoder_layer_fwd",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
}


class _Softmax(TorchDispatchMode):
    """Counts operators of softmax by the attention layer that is running; ``""``: none of them."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _SOFTMAX:
            self.counts[self.tracer.layer or ""] += 1
        return func(*args, **(kwargs or {}))
