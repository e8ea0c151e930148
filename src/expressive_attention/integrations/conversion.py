"""One call that switches a model to expressive attention, and a proof of where it ran."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..call import Call
from ..forms import FORMS, check_form
from .classes import set_attributes
from .errors import ConversionError
from .guard import guard, is_switched, unguarded
from .inspection import SOFTMAX_FUNCTIONS, attention_like, names_used
from .marks import LINEARIZED, mark
from .switching import GAIN, Switched
from .table import Table
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
    """The functions that a file of this folder offers to `convert`."""

    def find(self, model: nn.Module) -> list[Found]:
        """The attention layers that it knows, switchable or not."""
        ...

    def switch(self, model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
        """Switch some of them, `whole` if these are all that the adapter has found; yields what undoes each change.

        An adapter of a library that saves models may have `record(model)`, too, which is called after each change, and
        writes down what is switched then, by whatever adapter.
        """
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


@dataclass(frozen=True, repr=False)
class Verification(Table):
    """Where expressive attention ran in a forward pass.

    Attributes:
        calls: Calls of expressive attention in each switched layer.
        softmax: Layers, switched or left alone, in which softmax ran, and how often; ``""`` is outside of all.
        idle: Switched layers that the pass did not come to.
        kind: Words for the calls that are counted.
    """

    calls: dict[str, int]
    softmax: dict[str, int]
    idle: tuple[str, ...]
    kind: str = "EA"

    @property
    def failed(self) -> list[str]:
        """Switched layers that ran softmax, or ran without expressive attention."""
        return [
            name for name, count in self.calls.items() if name not in self.idle and (name in self.softmax or not count)
        ]

    def check(self) -> None:
        """Raise `ConversionError` if a switched layer failed, or none of them ran."""
        if self.failed or len(self.idle) == len(self.calls):
            raise ConversionError(str(self))

    def __str__(self) -> str:
        ran = sum(1 for name, count in self.calls.items() if count and name not in self.softmax)
        text = f"{self.kind} ran in {ran}/{len(self.calls)} layers"
        if self.failed:
            text += f"; not in: {', '.join(self.failed)}"
        if self.idle:
            text += f"; not reached: {', '.join(self.idle)}"
        inside = [name for name in self.softmax if name]
        text += f"; softmax ran in: {', '.join(inside)}" if inside else ""
        return text + (f"; softmax ran outside of all of them: {self.softmax['']} times" if "" in self.softmax else "")


class Conversion(Table):
    """A model that has been switched, and how. Printed, it is a table; a context manager, it undoes itself at its end.

    Attributes:
        model: The model, switched in place.
        form: ``"expressive"`` or ``"squared"``.
        layers: All attention layers that were found.
        strict: Whether `verify` raises an error for a layer that does not run expressive attention.
    """

    def __init__(self, model: nn.Module, form: str, layers: Sequence[Layer], strict: bool, undos: list[Undo]) -> None:
        self.model, self.form, self.layers, self.strict = model, form, tuple(layers), strict
        self._undos: list[Undo] | None = undos
        # With the classes that they were given: undone where they are then, in the model or not.
        self._made = [(name, module, type(module)) for name, module in self.modules(self.switched).items()]

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, *error: Any) -> None:
        """Undo it."""
        self.undo()

    @property
    def switched(self) -> list[Layer]:
        """The layers that compute expressive attention now."""
        return [layer for layer in self.layers if layer.how]

    def modules(self, layers: Iterable[Layer]) -> dict[str, nn.Module]:
        """The modules of layers, by name.

        Raises:
            ConversionError: The model has no such modules any more.
        """
        modules = dict(self.model.named_modules())
        names = [layer.name for layer in layers]
        if gone := [name for name in names if name not in modules]:
            raise ConversionError(f"the model no longer has the layers {', '.join(gone)}; convert it as it is now")
        return {name: modules[name] for name in names}

    def _choosers(self) -> dict[str, nn.Module]:
        """Parts of layers that choose keys, and do not attend to them: their softmax is not that of the layer."""
        layers = [layer.name for layer in self.layers]
        return {
            name: module
            for name, module in self.model.named_modules()
            if "indexer" in type(module).__name__.lower() and any(_inside(name, layer) for layer in layers)
        }

    def verify(self, *inputs: Any, **kwargs: Any) -> Verification:
        """Run ``model(*inputs, **kwargs)`` and count calls of expressive attention in each layer.

        Softmax is found where an operator of torch computes it, fused ones included; that of a matrix, as routers of
        experts compute it, does not count. Parts of layers that choose keys (indexers) count as layers of their own.
        No gradients are computed; training or evaluation mode is left as it is.

        Raises:
            ConversionError: With `strict`, a layer that was switched ran softmax, or no expressive attention; or no
                switched layer ran at all; or a layer is gone. The message names the layers.
        """
        if self._undos is None:
            raise ConversionError("the conversion has been undone; there is nothing to verify")
        layers = {**self.modules(self.layers), **self._choosers()}
        found = run_and_count(self.model, layers, [layer.name for layer in self.switched], FORMS, inputs, kwargs)
        if self.strict:
            found.check()
        return found

    def undo(self) -> None:
        """Restore the model: the same classes, attributes and outputs as before. A second call does nothing.

        Gains that `calibrate` gave to layers are taken away.

        Raises:
            ConversionError: A layer was given another class since, as by a parametrization, or another forward pass, as
                by a hook of accelerate, or another form, by `linearize`; or this is a copy of a conversion. Nothing is
                changed.
        """
        if self._undos is None:
            return
        changed = [name for name, module, made in self._made if type(module) is not made]
        if changed:
            raise ConversionError(
                f"the classes of these layers have been changed since the conversion, as parametrizations and FSDP do: "
                f"{', '.join(changed)}; take that back first"
            )
        # A replacement may keep, and call, the forward pass of a class that the layer would no longer have.
        hidden = [name for name, module, made in self._made if issubclass(made, Switched) and "forward" in vars(module)]
        if hidden:
            raise ConversionError(
                f"the forward methods of these layers have been replaced since the conversion, as hooks of accelerate "
                f"do: {', '.join(name or 'the model' for name in hidden)}; take that back first"
            )
        if linear := [name for name, module, _ in self._made if LINEARIZED in vars(module)]:
            raise ConversionError(f"`linearize` has switched these layers since: {', '.join(linear)}; undo it first")
        for undo in reversed(self._undos):
            undo()
        self._undos = None

    def __getstate__(self) -> dict[str, Any]:
        # A model may hold its conversion, and be copied with it. The functions that undo it know the original alone.
        return {**self.__dict__, "_made": [], "_undos": None if self._undos is None else [_refuse_to_undo]}

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
        The conversion: it says what was done, and verifies or undoes it.

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
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{_parts_to_give(model)}")
    check_form(form)
    wanted = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    by_adapter = list(_by_adapter(model))
    everything = [found for _, each in by_adapter for found in each]
    _check_wanted(wanted, everything)
    chosen = [found for found in everything if wanted is None or _matches(found.name, wanted)]
    refused = [found for found in chosen if found.why_not]
    if strict and refused:
        reasons = "; ".join(f"{found.name} ({type(found.module).__name__}): {found.why_not}" for found in refused)
        raise ConversionError(f"{len(refused)} of {len(chosen)} attention layers cannot be switched: {reasons}")
    if len(refused) == len(chosen):
        raise ConversionError(f"{type(model).__name__} has no attention layer that can be switched{_reasons(refused)}")
    rows = [_row(found, found in chosen) for found in everything]
    record = partial(_record, model, [adapter for adapter, _ in by_adapter])
    undos: list[Undo] = [record]  # when all else has been undone
    try:
        for adapter, each in by_adapter:
            taken = [found for found in each if found in chosen and not found.why_not]
            undos.extend(_keep_gain(found.module) for found in taken)
            if taken:
                undos.extend(adapter.switch(model, taken, form, len(taken) == len(each)))
            for found in taken:
                undos.append(guard(found.module, found.name))
                undos.append(mark(found.module, form))
        record()
        _warn_of_zeros(found for found in chosen if not found.why_not)
    except BaseException:
        for undo in reversed(undos):
            undo()
        raise
    return Conversion(model, form, _in_order(model, rows), strict, undos)


def _refuse_to_undo() -> None:
    raise ConversionError("a copy of a conversion cannot undo it; undo the conversion before its model is copied")


def _parts_to_give(pipeline: Any) -> str:
    """The attributes to give instead of an object that is no module and holds some, as pipelines do."""
    parts = {**getattr(pipeline, "components", {}), **getattr(pipeline, "__dict__", {})}
    names = [name for name, part in parts.items() if isinstance(part, nn.Module) and not name.startswith("_")]
    return f"; give {' or '.join(f'its .{name}' for name in names)}" if names else ""


def form_of(module: nn.Module) -> str | None:
    """The form that a layer was switched to, if its class was; None: it was not."""
    return module._expressive_form if isinstance(module, Switched) else None


def attention_layers(model: nn.Module) -> list[Found]:
    """All attention layers, switched or not, in the order of the model."""
    return _in_order(model, [found for _, each in _by_adapter(model) for found in each])


def _record(model: nn.Module, adapters: Sequence[Any]) -> None:
    for adapter in adapters:
        if hasattr(adapter, "record"):
            adapter.record(model)


def forms_of(model: nn.Module, form: Callable[[nn.Module], str | None] = form_of) -> dict[str, list[str] | None]:
    """The attention layers of a model by the form that they are switched to; None: every layer that it has."""
    layers = attention_layers(model)
    forms: dict[str, list[str]] = {}
    for found in layers:
        if (each := form(found.module)) is not None:
            forms.setdefault(each, []).append(found.name)
    return {each: None if len(names) == len(layers) else names for each, names in forms.items()}


def record_choice(model: nn.Module) -> None:
    """Have libraries that save models write down what attention the layers have, and which have gains."""
    _record(model, [adapter for adapter, _ in _by_adapter(model)])


def has_gain(module: nn.Module) -> bool:
    """Whether a layer has gains of `calibrate`."""
    return module._parameters.get(GAIN) is not None


def _keep_gain(module: nn.Module) -> Undo:
    """Return a function that gives a layer back the gain that it has now, or none."""
    before = module._parameters.get(GAIN)

    def undo() -> None:
        module._parameters.pop(GAIN, None)
        if before is not None:
            module._parameters[GAIN] = before

    return undo


# Parameters from which queries and keys come, by the names that libraries give them.
_PROJECTION = re.compile(r"(^|[._])(q|k|qk|qkv|query|key|in|c_attn|query_key_value)(_?proj|_?lin)?([._]|$)")


def _warn_of_zeros(switched: Iterable[Found]) -> None:
    zero = [
        f"{found.name}.{name}".lstrip(".")
        for found in switched
        for name, parameter in found.module.named_parameters()
        if parameter.ndim > 1 and "lora" not in name and _PROJECTION.search(name) and _is_zero(parameter)
    ]  # fmt: skip
    if zero:
        warnings.warn(
            f"query or key projections are zero, where expressive attention has no gradient: {', '.join(zero)}; "
            "initialize them otherwise, or they will never learn",
            stacklevel=3,
        )


def _is_zero(parameter: nn.Parameter) -> bool:
    """Whether all of it is zero, as far as it can be told: quantized weights have few operations."""
    try:
        return not parameter.is_meta and not parameter.any()
    except (NotImplementedError, RuntimeError, TypeError):
        return False


def _in_order(model: nn.Module, named: list[Any]) -> list[Any]:
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(named, key=lambda each: order[each.name])


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


def _by_adapter(model: nn.Module) -> Iterator[tuple[Any, list[Found]]]:
    """Each adapter with the layers that it finds, without those that one before it has found and parts of these."""
    done = [
        Found(name, module, why_not="it is switched already")
        for name, module in model.named_modules()
        if is_switched(module)
    ]
    yield None, done
    taken = [found.name for found in done]
    for name, library in _ADAPTERS:
        if library is not None and library not in sys.modules:
            continue  # a model of a library that has not been imported cannot exist
        try:
            adapter = import_module(f"{__package__}.{name}")
        except ImportError:
            if any(_library(module) == library for module in model.modules()):
                raise
            continue  # a version that is not supported, or broken, of a library that has no part in the model
        new = [
            found if name == "huggingface" else _unless_replaced(found)  # which alone needs no method of ours
            for found in adapter.find(model)
            if not any(_inside(found.name, other) for other in taken)
        ]
        taken += [found.name for found in new]
        yield adapter, new
    # Modules with an attention layer's name that no adapter knows: they would go on with softmax, unseen.
    left = {
        name: module
        for name, module in model.named_modules()
        if attention_like(module)
        and any(SOFTMAX_FUNCTIONS.search(used.lower()) for used in names_used(type(module)))
        and not any(_inside(name, other) or _inside(other, name) for other in taken)
    }
    innermost = [name for name in left if not any(_inside(other, name) for other in left if other != name)]
    # Around a layer of another library, as adapters are (LLaMA-Adapter) that add attention of their own to its output.
    inside = {name: _library(model.get_submodule(name)) for name in taken}
    around = {
        name: module
        for name, module in model.named_modules()
        if attention_like(module)
        and any("softmax" in used.lower() for used in names_used(type(module), 0))
        and any(_inside(other, name) and library != _library(module) for other, library in inside.items())
    }
    yield None, [Found(name, left[name], why_not="it computes softmax by itself") for name in innermost]
    yield None, [Found(name, around[name], why_not="it adds softmax attention of its own") for name in around]


def _library(module: nn.Module) -> str:
    return type(module).__module__.split(".")[0]


def _unless_replaced(found: Found) -> Found:
    """The same, refused if its forward pass is an attribute of the layer, which hides that of any class."""
    if "forward" not in found.module.__dict__ or found.why_not:
        return found
    return replace(found, how="", why_not="its forward method has been replaced, as hooks of accelerate do")


def _inside(name: str, other: str) -> bool:
    """Whether the module `name` is the module `other` or a part of it."""
    return name == other or name.startswith(f"{other}." if other else "")


# ---- where it ran ----

# Parts of the names of operators that compute softmax.
_OPERATORS = re.compile(f"{SOFTMAX_FUNCTIONS.pattern}|scaled_dot_product|multi_head_attention|encoder_layer_fwd|fmha")


@torch.no_grad()
def run_and_count(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    switched: Sequence[str],
    forms: Sequence[str],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Verification:
    """Run ``model(*inputs, **kwargs)`` and count calls of these forms, and of softmax, in the layers by name.

    Args:
        model: The model.
        layers: All attention layers.
        switched: Names of those that are to compute a form of `forms`.
        forms: The forms that count.
        inputs: Positional arguments of the model.
        kwargs: Named arguments of the model.
    """
    counts: Counter[str] = Counter()

    def told(layer: str, call: Call) -> None:
        counts[layer] += call.form in forms

    with unguarded(), traced(layers, told) as tracer, _Softmax(tracer) as softmax:
        _output = model(*inputs, **kwargs)  # weights in it are kept
    return Verification(
        calls={name: counts[name] for name in switched},
        softmax=dict(softmax.counts),
        idle=tuple(name for name in switched if not tracer.entered[name]),
        kind="EA" if len(forms) > 1 else f"EA of the form {forms[0]!r}",
    )


class _Softmax(TorchDispatchMode):
    """Counts operators of softmax by the attention layer that is running; ``""``: none of them.

    Softmax itself counts once something uses its result, or keeps it: weights that are thrown away attend to nothing.
    Layers of SAM 2 compute such weights, and go on with the attention interface.
    """

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.counts: Counter[str] = Counter()
        self._unused = WeakIdKeyDictionary()  # results of softmax, and the layer
        self._undo: Undo | None = None

    def __enter__(self) -> Any:
        # FlexAttention compiles itself even in eager mode, and the compiler does not work under a mode.
        flex = sys.modules.get("torch.nn.attention.flex_attention")
        self._undo = set_attributes(flex, _FLEX_ATTENTION_DISABLE_COMPILE_DEBUG=True) if flex else None
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.counts.update(self._unused.values())
        if self._undo is not None:
            self._undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)) if self._unused else ():
            if isinstance(given, Tensor) and given in self._unused:
                self.counts[self._unused.pop(given)] += 1
        found, name, layer = func(*args, **(kwargs or {})), getattr(func, "__name__", ""), self.tracer.layer or ""
        # Softmax of a matrix is that of a router of experts: scores of attention have a batch, heads, or both.
        if _OPERATORS.search(name) and getattr(args[0], "ndim", 3) > 2:
            if "softmax" in name and isinstance(found, Tensor):
                self._unused[found] = layer
            else:
                self.counts[layer] += 1
        return found
