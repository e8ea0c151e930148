"""A switched layer guards itself: softmax in the place of expressive attention is an error, in whatever call.

`Conversion.verify` proves one call. Afterwards a processor may be set, an implementation be named, or a call may take a
way through the layer that others do not take. So the class of a switched layer calls it with a note, where expressive
attention and functions of torch that compute softmax are entered while it runs. Softmax alone is an error. A layer that
runs neither, because the batch is empty or it has a cache, is left in peace.

Functions of torch are seen by a mode. Layers that run inside of `expressive_sdpa` have one; all others get one for
calls where they could compute softmax: something of them has changed, or their own code has softmax in it. A layer of
the attention interface of transformers that has not changed cannot, and is called without a note.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from .classes import Subclassed, set_attributes
from .errors import ConversionError

__all__ = [
    "GUARD",
    "Guarded",
    "guard",
    "implementation_of",
    "is_switched",
    "note_expressive",
    "note_function",
    "unguarded",
]

# The attribute of a switched layer that holds its `Guard`.
GUARD = "_expressive_guard"

# Configurations of transformers have a method of their own for attributes, which takes most of the time of a guard.
_get_attribute: Any = object.__getattribute__

# Functions of torch, its operators, and operators of libraries of kernels that compute softmax, or the exponentials of
# one that is spelled out.
_NAMES = (
    *("softmax", "_softmax", "_safe_softmax", "special_softmax", "exp", "exp_", "exp2"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "_scaled_dot_product_attention_math"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward", "_varlen_attn"),
    *("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "flex_attention"),
    *("_flash_attn_forward", "_flash_attn_varlen_forward", "efficient_attention_forward_cutlass"),
)
_SOFTMAX = frozenset(name + overload for name in _NAMES for overload in ("", ".default", ".int", ".Dimname"))


@dataclass(frozen=True)
class Guard:
    """The state of a layer when it was switched.

    Attributes:
        name: Its dotted name in the model that was converted.
        implementation: The name that its configuration has for its attention, if it goes by that.
        state: Everything else that may change, to be named in messages.
    """

    name: str
    implementation: str | None
    state: dict[str, Any]


class _Note:
    """Whether expressive attention ran in a running layer, and the function that computed softmax, if one did."""

    expressive = False
    function = ""


class _Here(threading.local):
    """Notes of the layers that run in this thread, the innermost last; `off`: how often they are switched off."""

    def __init__(self) -> None:
        self.notes: list[_Note] = []
        self.off = 0


_here = _Here()


class _Watch(TorchFunctionMode):
    """Enters functions that compute softmax into the note of the running layer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note_function(func)
        return func(*args, **(kwargs or {}))


def note_expressive() -> None:
    """Expressive attention runs in the layers that are running."""
    for note in _here.notes:
        note.expressive = True


def note_function(func: Any) -> None:
    """A function of torch is called in the innermost layer that is running."""
    name = getattr(func, "__name__", "")
    if name in _SOFTMAX and _here.notes:
        _here.notes[-1].function = name


@contextmanager
def unguarded() -> Iterator[None]:
    """Layers raise no error inside of it, in this thread: `verify` counts, and says more."""
    _here.off += 1
    try:
        yield
    finally:
        _here.off -= 1


class Guarded(Subclassed):
    """A layer that was switched, and guards its calls."""

    # Whether calls of a layer that has not changed have a note.
    _has_notes = True
    _call_impl: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        original: Any = cls.__dict__.get("_original")
        if original is not None:
            # Between `__call__` and `forward`, so that a forward pass that is an attribute of the layer is seen.
            cls._call_impl = _guarded(original._call_impl, cls._has_changed, cls._has_notes)

    def _has_changed(self) -> bool:
        """Whether something has changed since the switch by which it may compute softmax."""
        raise NotImplementedError

    def _changes(self) -> list[str]:
        """Everything that has changed, in words."""
        found, now = self.__dict__[GUARD].state, _state(self)  # pyright: ignore[reportArgumentType]
        names = [name for name in {**found, **now} if found.get(name) != now.get(name)]
        return [f"{name} was {found.get(name)!r} and is {now.get(name)!r}" for name in names]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and GUARD in self.__dict__ and not issubclass(value, Guarded):
            raise ConversionError(
                f"{self.__dict__[GUARD].name or 'the model'} ({type(self).__name__}) was switched to expressive "
                f"attention, and the class {value.__name__} would take that away; call undo() of the conversion first"
            )
        super().__setattr__(name, value)


def _guarded(plain_call: Callable[..., Any], has_changed: Callable[[Any], bool], has_notes: bool) -> Callable[..., Any]:
    # It runs in every call, so it looks up as little as possible: attributes of modules are slow, and hooks of torch
    # would cost several times as much.
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        changed = has_changed(self)
        if not (changed or has_notes):
            return plain_call(self, *args, **kwargs)
        note, notes = _Note(), _here.notes
        notes.append(note)
        try:
            if changed:
                with _Watch():
                    output = plain_call(self, *args, **kwargs)
            else:
                output = plain_call(self, *args, **kwargs)
        finally:
            notes.pop()
        if note.function and not note.expressive and not _here.off:
            raise ConversionError(_told(self, note.function))
        return output

    return call


def guard(module: nn.Module, name: str) -> Callable[[], None]:
    """Note the state of a layer that has just been switched; returns what undoes it."""
    # By __dict__, as all that the package keeps in modules of others.
    return set_attributes(module, **{GUARD: Guard(name, implementation_of(module), _state(module))})


def is_switched(module: nn.Module) -> bool:
    """Whether a layer was switched, and goes by the same name still, if it goes by a name."""
    found = module.__dict__.get(GUARD) if isinstance(module, Guarded) else None
    return found is not None and implementation_of(module) == found.implementation


def implementation_of(module: Any) -> str | None:
    """The name that the configuration of a layer has for its attention, if it has one."""
    config: Any = module.__dict__.get("config")
    if config is None:
        return None
    try:
        return _get_attribute(config, "_attn_implementation_internal")
    except AttributeError:
        return getattr(config, "_attn_implementation", None)


def _state(module: nn.Module) -> dict[str, Any]:
    """Everything that may decide how a layer computes attention, as far as it can be told in words."""
    found = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, bool | int | float | str | None)
    }
    processor = getattr(module, "processor", None)
    return {
        **found,
        "attn_implementation": implementation_of(module),
        "processor": None if processor is None else type(processor).__name__,
        "class": type(module).__name__,
        "forward": "a method of its own" if "forward" in vars(module) else "that of its class",
    }


def _told(module: Guarded, function: str) -> str:
    changes = module._changes()
    why = (
        f"since the switch it has changed: {'; '.join(changes)}"
        if changes
        else "nothing of it has changed since the switch, so this call takes a way that others do not take"
    )
    return (
        f"{module.__dict__[GUARD].name or 'the model'} ({type(module).__name__}) was switched to expressive attention "
        f"and has computed softmax ({function}) without it: {why}. To go back to softmax, call undo() of the conversion"
    )
