"""From a trained model of expressive attention to linear time: layers of small scores get the form ``"squared"``.

    f(z) = z^2 / (1 + z^2),   z^2 / f(z) = 1 + z^2

Where all scores of a head are below sqrt(tolerance), z^2 in the place of f changes no weight by more than the factor
1 + tolerance, and no attention weight, which is a share, by more than that either. The form ``"squared"`` runs in
linear time, with a state of constant size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import linear
from ..call import Call
from ..nn import MultiheadAttention, SelfAttention
from .classes import original_class, set_attributes
from .conversion import Conversion, Found, Verification, attention_layers, record_choice, run_and_count
from .errors import ConversionError
from .guard import GUARD, guard
from .marks import LINEARIZED, MARK, mark
from .scores import scores_of, tell_calls
from .switching import Switched
from .table import Table

__all__ = ["HeadScores", "Linearization", "linearize"]

Undo = Callable[[], None]


@dataclass(frozen=True)
class HeadScores:
    """The sizes of the scores of a layer, over the pairs of query and key that see each other.

    Attributes:
        name: Dotted name of the layer in the model.
        kind: Name of its class.
        largest: The largest |z| of each head, ``(H,)`` of float64.
        beyond: Share of the pairs of each head with z^2 of at least the tolerance, ``(H,)`` of float64.
        at_limit: Whether all heads have smaller scores: the layer was switched.
        why_not_linear: Why a call that was seen runs in quadratic time with any form; empty: none does.
    """

    name: str
    kind: str
    largest: Tensor
    beyond: Tensor
    at_limit: bool
    why_not_linear: str = ""


class Linearization(Table):
    """Layers of a model that have been switched to the form ``"squared"``, and those that have not.

    Printed, it is a table; a context manager, it undoes itself at its end.

    Attributes:
        model: The model, changed in place.
        tolerance: Bound of z^2, and so of the relative change of each weight, on the data that was given.
        layers: All layers of the form ``"expressive"``, in the order of the model.
    """

    def __init__(self, model: nn.Module, tolerance: float, layers: Sequence[HeadScores], undos: list[Undo]) -> None:
        self.model, self.tolerance, self.layers = model, tolerance, tuple(layers)
        self._undos: list[Undo] | None = undos
        modules = dict(model.named_modules())
        self._made = {layer.name: modules[layer.name] for layer in self.switched}

    def __enter__(self) -> Linearization:
        return self

    def __exit__(self, *error: Any) -> None:
        """Undo it."""
        self.undo()

    @property
    def switched(self) -> list[HeadScores]:
        """The layers that have the form ``"squared"`` now."""
        return [layer for layer in self.layers if layer.at_limit]

    def verify(self, *inputs: Any, **kwargs: Any) -> Verification:
        """Run ``model(*inputs, **kwargs)`` and count calls of the form ``"squared"`` in each switched layer.

        No gradients are computed; training or evaluation mode is left as it is.

        Raises:
            ConversionError: A switched layer ran softmax or another form, none of them ran, or the switch was undone.
        """
        if self._undos is None:
            raise ConversionError("the layers have their form of before again; there is nothing to verify")
        modules = dict(self.model.named_modules())
        layers = {layer.name: modules[layer.name] for layer in self.layers if layer.name in modules}
        found = run_and_count(self.model, layers, list(self._made), ("squared",), inputs, kwargs)
        found.check()
        return found

    def undo(self) -> None:
        """Give the layers the form ``"expressive"`` again. A second call does nothing.

        Raises:
            ConversionError: A layer has been switched otherwise since; nothing is changed.
        """
        if self._undos is None:
            return
        if changed := [name for name, module in self._made.items() if LINEARIZED not in vars(module)]:
            raise ConversionError(f"these layers have been switched otherwise since: {', '.join(changed)}")
        for undo in reversed(self._undos):
            undo()
        self._undos = None

    def __getstate__(self) -> dict[str, Any]:
        # The functions that undo it know the original of a copied model alone.
        return {**self.__dict__, "_made": {}, "_undos": None if self._undos is None else [_refuse_to_undo]}

    def __str__(self) -> str:
        rows = [("layer", "class", "largest |z|", "heads at the limit", "")]
        for layer in self.layers:
            below = int((layer.beyond == 0).sum())
            how = layer.why_not_linear and f", but not in linear time: {layer.why_not_linear}"
            how = f"switched{how}" if layer.at_limit else f"left alone: z² reaches {layer.largest.max() ** 2:.2g}"
            heads = f"{below} of {len(layer.largest)}"
            rows.append((layer.name or "(the model)", layer.kind, f"{layer.largest.max():.2g}", heads, how))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        ]
        state = "undone" if self._undos is None else f"tolerance {self.tolerance:g}"
        return "\n".join([*lines, f"{len(self.switched)} of {len(self.layers)} layers switched to z², {state}"])


def _refuse_to_undo() -> None:
    raise ConversionError("a copy of a linearization cannot undo it; undo it before its model is copied")


def linearize(model: nn.Module | Conversion, batches: Iterable[Any], *, tolerance: float = 1e-3) -> Linearization:
    """Switch those layers of a trained model of expressive attention to z^2 whose scores on some data are small.

    A layer is switched if z^2 < `tolerance` for all pairs of query and key of all its heads. On such data, no attention
    weight changes by more than the factor 1 + `tolerance`. On other data scores may be larger: `batches` are to be like
    what the model will see. The layers are those that `convert` has switched, those of models of transformers with
    ``attn_implementation="expressive"``, `nn.SelfAttention` and `nn.MultiheadAttention`.

    The choice is saved with models of transformers and diffusers, layer by layer, as that of `convert` is, and a state
    dict of a converted model has it in an entry. `nn.SelfAttention` and `nn.MultiheadAttention` have it in the
    arguments that they are made with (``mechanism``, ``form``), and not in what is saved.

    Args:
        model: The model, or the conversion that `convert` returned.
        batches: Inputs of the model, on its device: a tensor, a tuple of positional or a mapping of named arguments
            each.
        tolerance: Bound of z^2.

    Returns:
        The largest score of each head, and which layers were switched; it verifies or undoes it.

    Raises:
        ValueError: There are no batches, `tolerance` is not positive, or a layer is not reached.
        ConversionError: The model has no layer of the form ``"expressive"``.

    Example:
        >>> import torch
        >>> from expressive_attention.nn import Transformer
        >>> model = Transformer(vocab_size=10, max_length=8, embed_dim=16, num_layers=2, num_heads=2).eval()
        >>> linearization = linearize(model, [torch.randint(10, (3, 8))], tolerance=100.0)
        >>> print(linearization.verify(torch.randint(10, (3, 8))))
        EA of the form 'squared' ran in 2/2 layers
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    model = model.model if isinstance(model, Conversion) else model
    layers = dict(_expressive_layers(model))
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no attention layer of the form 'expressive'; see `convert`")
    found = _measure(model, layers, batches, tolerance)
    undos: list[Undo] = [lambda: record_choice(model)]  # when all else has been undone
    try:
        for layer in found:
            if layer.at_limit:
                undos.extend(_switch(model, layer.name, layers[layer.name]))
        record_choice(model)
    except BaseException:
        for undo in reversed(undos):
            undo()
        raise
    return Linearization(model, tolerance, found, undos)


def _expressive_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of the form ``"expressive"`` by name, in the order of the model."""
    known = {found.name for found in attention_layers(model)}
    for name, module in model.named_modules():
        if _form_of(module, name in known) == "expressive":
            yield name, module


def _form_of(module: nn.Module, is_known: bool) -> str | None:
    """The form that a layer computes; None: it computes something else. `is_known`: whether adapters know the layer."""
    if isinstance(module, Switched):
        return module._expressive_form
    if isinstance(module, SelfAttention):
        return module.mechanism
    if isinstance(module, MultiheadAttention):
        return module.form
    return _huggingface().form_of_layer(module) if is_known and "transformers" in sys.modules else None


def _huggingface() -> Any:
    return import_module(f"{__package__}.huggingface")


@torch.no_grad()
def _measure(
    model: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any], tolerance: float
) -> list[HeadScores]:
    largest: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}  # of pairs beyond the tolerance, and of all
    reasons: dict[str, str] = {}

    def told(layer: str, call: Call) -> None:
        heads = call.query.shape[1]
        largest.setdefault(layer, torch.zeros(heads, dtype=torch.float64))
        counts.setdefault(layer, torch.zeros(2, heads, dtype=torch.float64))
        for z, keep in scores_of(call):
            z = z.where(keep, 0.0).abs()
            most = z.amax((0, 2, 3)).cpu()
            largest[layer] = torch.maximum(largest[layer], most)  # NaN stays
            within = z.square() < tolerance
            counts[layer] += torch.stack([(~within).sum((0, 2, 3)), keep.sum((0, 2, 3))]).cpu()
        reasons.setdefault(layer, linear.declines(call.but(form="squared")) or "")

    tell_calls(model, layers, batches, told)
    found = []
    for name, module in layers.items():
        beyond, pairs = counts[name]
        share = beyond / pairs.clamp(min=1)
        kind = original_class(module).__name__
        found.append(HeadScores(name, kind, largest[name], share, bool((beyond == 0).all()), reasons[name]))
    return found


def _switch(model: nn.Module, name: str, module: nn.Module) -> Iterator[Undo]:
    """Give a layer the form ``"squared"``; yields what undoes each change."""
    yield set_attributes(module, **{LINEARIZED: True})
    if isinstance(module, Switched):
        yield set_attributes(module, _expressive_form="squared")
    elif isinstance(module, SelfAttention):
        yield set_attributes(module, mechanism="squared")
    elif isinstance(module, MultiheadAttention):
        yield set_attributes(module, form="squared")
    else:
        yield from _huggingface().switch(model, [Found(name, module)], "squared", False)
    if GUARD in vars(module):
        yield guard(module, name)
    if MARK in vars(module):
        yield mark(module, "squared")
