"""Names that the documentation once taught, at the paths that it gave: files of users import them.

The text of a task file is part of the identity of its cells, so a study that was begun with an old import keeps it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["moved"]


def moved(old: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose names are elsewhere now; each use warns.

    Args:
        old: Name of the module.
        names: The module in which each name is now, from `expressive_attention.study` on.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        new = f"expressive_attention.study.{names[name]}"
        warnings.warn(f"{old}.{name} has moved to {new}", FutureWarning, stacklevel=2)
        return getattr(import_module(new), name)

    return find
