"""The tasks of the study, one file each; a task is chosen by its `kind`."""

from .base import Task
from .nt import NTTask

__all__ = ["TASKS", "NTTask", "Task"]

TASKS: dict[str, type[Task]] = {"nt": NTTask}
