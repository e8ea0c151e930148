"""The tasks of the study, one file each; a task is chosen by its `kind`.

Every module of this folder and of those in it is imported, and every task registers itself.
"""

from importlib import import_module
from pkgutil import walk_packages

from .base import IGNORED, TASKS, Examples, Task
from .rng import stream

__all__ = ["IGNORED", "TASKS", "Examples", "Task", "stream"]

for _module in walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)
