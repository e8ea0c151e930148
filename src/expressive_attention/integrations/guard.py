"""A switched layer guards itself: softmax in the place of expressive attention is an error, in whatever call.

`Conversion.verify` proves one call. Afterwards a processor may be set, an implementation be named, or a call may take a
way through the layer that others do not take. So each switched layer has two hooks. The first opens a note, where
expressive attention and functions of torch that compute softmax are entered while the layer runs; the second reads it.
Softmax alone is an error. A layer that runs neither, because the batch is empty or it has a cache, is left in peace.

Functions of torch are seen by a mode. Layers that run inside of `expressive_sdpa` have one; all others get one for
calls where they could compute softmax: something of them has changed, or their own code has softmax in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from .errors import ConversionError
from .inspection import own_softmax

__all__ = ["GUARD", "guard", "is_guarded", "note_expressive", "note_function", "unguarded"]

# The attribute of a switched layer that holds its `Guard`.
GUARD = "_expressive_guard"

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
        by_class: Whether the switch gave it another class.
        implementation: The name that its configuration has for its attention, if it goes by that.
        watched: Whether its own code has softmax in it beside what was switched.
        state: Everything else that may change, to be named in messages.
    """

    name: str
    by_class: bool
    implementation: str | None
    watched: bool
    state: dict[str, Any]


class _Note:
    """Whether expressive attention ran in a running layer, and which function computed softmax."""

    __slots__ = ("expressive", "module", "softmax", "watch")

    def __init__(self, module: nn.Module, watch: _Watch | None) -> None:
        self.module, self.watch = module, watch
        self.expressive, self.softmax = False, ""


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
        _here.notes[-1].softmax = name


@contextmanager
def unguarded() -> Iterator[None]:
    """Layers raise no error inside of it, in this thread: `verify` counts, and says more."""
    _here.off += 1
    try:
        yield
    finally:
        _here.off -= 1


def guard(module: nn.Module, name: str, by_class: bool) -> Callable[[], None]:
    """Put the hooks on a layer that has just been switched; returns what takes them off."""
    implementation = None if by_class else _implementation(module)
    watched = not by_class and own_softmax(type(module))
    # By __dict__, as all that the package keeps in modules of others.
    module.__dict__[GUARD] = Guard(name, by_class, implementation, watched, _state(module))
    handles = (
        module.register_forward_pre_hook(_enter),
        module.register_forward_hook(_leave, always_call=True),
    )

    def undo() -> None:
        for handle in handles:
            handle.remove()
        module.__dict__.pop(GUARD, None)

    return undo


def is_guarded(module: nn.Module) -> bool:
    """Whether a layer was switched by its configuration, and still is."""
    found = getattr(module, GUARD, None)
    return found is not None and not found.by_class and _implementation(module) == found.implementation


def _enter(module: Any, _: Any) -> None:
    # This runs in every call of a layer, so it calls as little as possible.
    if _here.off or (found := module.__dict__.get(GUARD)) is None:
        return
    if found.by_class:
        changed = not hasattr(type(module), "_original")  # as classes have that `switch` has made
    else:
        changed = found.watched or _implementation(module) != found.implementation
    watch = None
    if changed or "forward" in module.__dict__:
        watch = _Watch()
        watch.__enter__()
    _here.notes.append(_Note(module, watch))


def _leave(module: nn.Module, _: Any, output: Any) -> None:
    notes = _here.notes
    if not notes or notes[-1].module is not module:
        return
    note = notes.pop()
    if note.watch is not None:
        note.watch.__exit__(None, None, None)
    if note.softmax and not note.expressive and output is not None:  # None: the call has ended in an error
        raise ConversionError(_told(module, note.softmax))


def _implementation(module: Any) -> str | None:
    """The name that the configuration of a layer has for its attention, if it has one."""
    config: Any = module.__dict__.get("config")
    try:
        return config._attn_implementation_internal  # without its property, in half the time
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
        "attn_implementation": _implementation(module),
        "processor": None if processor is None else type(processor).__name__,
        "class": type(module).__name__,
        "forward": "a method of its own" if "forward" in vars(module) else "that of its class",
    }


def _told(module: nn.Module, softmax: str) -> str:
    found: Guard = getattr(module, GUARD)
    now = _state(module)
    changes = [
        f"{name} was {found.state.get(name)!r} and is {now.get(name)!r}"
        for name in {**found.state, **now}
        if found.state.get(name) != now.get(name)
    ]
    why = (
        f"since the switch it has changed: {'; '.join(changes)}"
        if changes
        else "nothing of it has changed since the switch, so this call takes a way that others do not take"
    )
    return (
        f"{found.name or 'the model'} ({type(module).__name__}) was switched to expressive attention and has computed "
        f"softmax ({softmax}) without it: {why}. To go back to softmax, call undo() of the conversion"
    )
