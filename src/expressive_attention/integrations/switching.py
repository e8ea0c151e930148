"""Classes of switched layers, whose code runs with torch's attention replaced, or is replaced itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .classes import give_class
from .guard import Guarded
from .sdpa import expressive_sdpa

__all__ = ["GAIN", "Switched", "WithExpressiveSdpa", "switch"]


# A parameter ``(H,)`` that `calibrate` gives to switched layers: a factor on the queries of each head.
GAIN = "expressive_gain"


class Switched(Guarded):
    """A layer whose class was switched."""

    _expressive_form: str

    def _has_changed(self) -> bool:
        return "forward" in self.__dict__

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
    """Put `mixin` before the class of a module, and set attributes of it; returns what undoes it."""
    return give_class(module, mixin, _expressive_form=form, **attributes)
