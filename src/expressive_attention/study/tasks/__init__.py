"""The tasks of the study, one file each; a task is chosen by its `kind`.

Every module of this folder is imported, and every task in it registers itself.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import IGNORED, TASKS, Examples, Task
from .rng import stream

__all__ = ["IGNORED", "TASKS", "Examples", "Task", "stream"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
