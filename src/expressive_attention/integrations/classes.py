"""Gives a module another class, a subclass of its own: it keeps its parameters, and gets its old class back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

__all__ = ["Subclassed", "give_class", "original_class", "set_attributes"]


class Subclassed:
    """The base of classes that `give_class` makes. They have no name to import, and are made again by pickle."""

    _original: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(protocol)
        mixin = next(base for base in type(self).__bases__ if issubclass(base, Subclassed))
        return (_remade, (mixin, self._original), *rest)


def give_class(module: nn.Module, mixin: type[Subclassed], **attributes: Any) -> Callable[[], None]:
    """Put `mixin` before the class of a module, and set attributes of it; returns what undoes it."""
    original = type(module)
    _set_class(module, _class(mixin, original))
    undo_attributes = set_attributes(module, **attributes)

    def undo() -> None:
        _set_class(module, original)
        undo_attributes()

    return undo


def original_class(module: nn.Module) -> type:
    """The class of a module as its library wrote it, whether `give_class` has given it another or not."""
    return getattr(type(module), "_original", type(module))


def set_attributes(target: Any, **attributes: Any) -> Callable[[], None]:
    """Set attributes of an object; returns what gives it back those that it had."""
    before = {name: target.__dict__[name] for name in attributes if name in target.__dict__}
    target.__dict__.update(attributes)

    def undo() -> None:
        for name in attributes:
            target.__dict__.pop(name, None)
        target.__dict__.update(before)

    return undo


def _set_class(module: nn.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)  # past the guard, which refuses it


@cache
def _class(mixin: type[Subclassed], original: type) -> type:
    name = f"Expressive{original.__name__}"
    return type(name, (mixin, original), {"_original": original, "__module__": original.__module__})


def _remade(mixin: type[Subclassed], original: type) -> Any:
    made: Any = _class(mixin, original)
    return made.__new__(made)
