"""Gives a module another class, a subclass of its own: it keeps its parameters, and gets its old class back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from .sdpa import expressive_sdpa

__all__ = ["GAIN", "Switched", "WithExpressiveSdpa", "set_attributes", "switch"]


# A parameter ``(H,)`` that `calibrate` gives to switched layers: a factor on the queries of each head.
GAIN = "expressive_gain"


class Switched:
    """What the classes that `switch` makes have in common. They have no name to import, and are made again."""

    _original: type
    _expressive_form: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(protocol)
        mixin = next(base for base in type(self).__bases__ if issubclass(base, Switched))
        return (_remade, (mixin, self._original), *rest)

    def extra_repr(self) -> str:
        """As before, with the mechanism."""
        before = super().extra_repr()  # pyright: ignore[reportAttributeAccessIssue]
        return ", ".join(part for part in (before, f"mechanism='expressive', form={self._expressive_form!r}") if part)

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(
            "torch.jit.script cannot compile expressive attention; use torch.compile or torch.export"
        )


class WithExpressiveSdpa(Switched):
    """Calls of dot-product attention in the module's forward pass compute expressive attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As before, with expressive attention."""
        with expressive_sdpa(self._expressive_form, getattr(self, GAIN, None)):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def switch(module: nn.Module, mixin: type[Switched], form: str, **attributes: Any) -> Callable[[], None]:
    """Put `mixin` before the class of a module, and set attributes of it.

    Returns:
        What undoes it.
    """
    original = type(module)
    module.__class__ = _class(mixin, original)
    undo_attributes = set_attributes(module, _expressive_form=form, **attributes)

    def undo() -> None:
        module.__class__ = original
        undo_attributes()

    return undo


def set_attributes(target: Any, **attributes: Any) -> Callable[[], None]:
    """Set attributes of an object; returns what gives it back those that it had."""
    before = {name: target.__dict__[name] for name in attributes if name in target.__dict__}
    target.__dict__.update(attributes)

    def undo() -> None:
        for name in attributes:
            target.__dict__.pop(name, None)
        target.__dict__.update(before)

    return undo


@cache
def _class(mixin: type[Switched], original: type) -> type:
    name = f"Expressive{original.__name__}"
    return type(name, (mixin, original), {"_original": original, "__module__": original.__module__})


def _remade(mixin: type[Switched], original: type) -> Any:
    made: Any = _class(mixin, original)
    return made.__new__(made)
