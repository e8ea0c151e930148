"""Which attention layer is running, and what it calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn

from ..call import Call
from ..functional import call_hooks

__all__ = ["Tracer", "traced"]


class Tracer:
    """Follows the layers of a forward pass, and tells of calls of `expressive_attention` in them.

    Attributes:
        entered: How often each layer was called.
    """

    def __init__(self, told: Callable[[str, Call], None]) -> None:
        self.told = told
        self.thread = get_ident()  # others may run the same model
        self.running: list[str] = []
        self.entered: Counter[str] = Counter()

    @property
    def layer(self) -> str | None:
        """The innermost layer that is running; None: none of them."""
        return self.running[-1] if self.running else None

    def _enter(self, name: str) -> None:
        if get_ident() == self.thread:
            self.running.append(name)
            self.entered[name] += 1

    def _leave(self) -> None:
        if get_ident() == self.thread:
            self.running.pop()

    def _called(self, call: Call) -> None:
        if get_ident() == self.thread and self.layer is not None:
            self.told(self.layer, call)


@contextmanager
def traced(layers: Mapping[str, nn.Module], told: Callable[[str, Call], None]) -> Iterator[Tracer]:
    """Follow these layers, by name, in all forward passes inside of the block."""
    tracer = Tracer(told)
    handles = []
    for name, module in layers.items():

        def enter(*_: Any, name: str = name) -> None:
            tracer._enter(name)

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(lambda *_: tracer._leave(), always_call=True))
    call_hooks.append(tracer._called)
    try:
        yield tracer
    finally:
        call_hooks.remove(tracer._called)
        for handle in handles:
            handle.remove()
