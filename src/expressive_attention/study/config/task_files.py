"""Tasks in files of the user's own: loaded by path, known by their text, and able to travel to other processes."""

from __future__ import annotations

import copyreg
import hashlib
import inspect
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..tasks import TASKS, Task

__all__ = [
    "TaskFile",
    "TaskFileError",
    "blame",
    "file_of",
    "load_module",
    "load_task_files",
    "named",
    "read_file",
]

_PREFIX = "expressive_attention_task_file_"


class TaskFileError(ValueError):
    """A file of tasks or mechanisms that cannot be used; the message says which and why, in one line.

    Attributes:
        key: The key of the configuration that names the file.
    """

    def __init__(self, message: str, key: str = "task_files") -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class TaskFile:
    """The name of a file of tasks or mechanisms, without folders, and its text as it was read."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """The name of the file's content: a hash of its text, wherever it lies."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()


# The file that each class of a task was defined in.
_FILES: dict[type[Task], TaskFile] = {}


def load_task_files(paths: Sequence[Path]) -> tuple[TaskFile, ...]:
    """Run the files and have their tasks among `TASKS`, in place of what other versions of them defined before.

    Raises:
        TaskFileError: A file cannot be read or run, defines no task or an incomplete one, or a kind that there is
            already: in the package, or in another of these files.
    """
    found: list[TaskFile] = []
    defined: dict[str, type[Task]] = {}
    for path in paths:
        file = read_file(path)
        tasks = [task for task in _tasks(load_module(file, path)) if isinstance(task.model_fields["kind"].default, str)]
        if not tasks:
            raise TaskFileError(f"{path}: defines no task: no subclass of Task whose field kind has a default")
        for task in tasks:
            kind = task.model_fields["kind"].default
            other = defined.get(kind) or (None if TASKS.get(kind) in _FILES else TASKS.get(kind))
            if other is not None:
                where = _FILES[other].name if other in _FILES else other.__module__
                raise TaskFileError(
                    f"{path}: the kind {kind!r} of {task.__name__} is already that of {other.__name__} in {where}"
                )
            if inspect.isabstract(task):
                raise TaskFileError(f"{path}: {task.__name__} lacks {', '.join(sorted(task.__abstractmethods__))}")
            defined[kind] = task
        found.append(file)
    TASKS.update(defined)
    return tuple(found)


def read_file(path: Path, key: str = "task_files") -> TaskFile:
    """A file as it is now.

    Raises:
        TaskFileError: It cannot be read.
    """
    try:
        return TaskFile(path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise TaskFileError(f"{path}: cannot be read: {reason}", key) from None


def file_of(task: Any) -> TaskFile | None:
    """The file that the task's class was defined in, or that is on record; None: it is one of the package."""
    return getattr(task, "file", None) if not isinstance(task, Task) else _FILES.get(type(task))


def blame(error: BaseException) -> str | None:
    """``"my_task.py, line 12: NameError: ..."``, the last line of a file of tasks on the way to the error, if any."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if str(frame.f_globals.get("__name__")).startswith(_PREFIX):
            return f"{frame.f_code.co_filename}, line {line}: {named(error)}"
    return None


# ---- modules ----


def load_module(file: TaskFile, path: Path, key: str = "task_files") -> ModuleType:
    """The file as a module, run once in a process; its tasks are not among `TASKS` by that.

    Raises:
        TaskFileError: It cannot be run.
    """
    name = _PREFIX + file.digest
    if name in sys.modules:
        return sys.modules[name]
    before = dict(TASKS)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # pickle and pydantic look for its definitions there
    try:
        exec(compile(file.text, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskFileError(_of_a_parser(error) or blame(error) or f"{path}: {named(error)}", key) from None
    finally:
        TASKS.clear()
        TASKS.update(before)
    for task in _tasks(module):
        _FILES[task] = file
        copyreg.pickle(task, _reduce)
    return module


def _tasks(module: ModuleType) -> list[type[Task]]:
    """The subclasses of `Task` that the module defines."""
    # By the class of Task: to Python 3.10, list[int] is a type, too.
    classes = [thing for thing in vars(module).values() if isinstance(thing, type(Task)) and issubclass(thing, Task)]
    return [task for task in dict.fromkeys(classes) if task.__module__ == module.__name__]


def _reduce(task: Task) -> tuple[Any, ...]:
    """The pickled form of a task, with its file, which the process that unpickles it may not have run yet."""
    return _blank, (_FILES[type(task)], type(task).__name__), task.__getstate__()


def _blank(file: TaskFile, name: str) -> Task:
    """An object of the class `name` in the file, for its state to be put into."""
    task = vars(load_module(file, Path(file.name)))[name]
    return task.__new__(task)


def _of_a_parser(error: BaseException) -> str | None:
    """A syntax error with its place; None: it is another error, or has no place."""
    if not isinstance(error, SyntaxError) or error.lineno is None:
        return None
    return f"{error.filename}, line {error.lineno}: {named(error)}"


def named(error: BaseException) -> str:
    """An error in one line: its class and the first line of its message, after which torch may have frames of C++."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    lines = [line for line in message.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
