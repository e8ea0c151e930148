"""Mechanisms in files of the user's own: functions of z, known by the text of their file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from ...nn import MECHANISMS
from ...nn.mechanisms import register
from .task_files import TaskFile, TaskFileError, load_module, named, read_file

__all__ = ["ensure", "load_mechanism_files", "names_in"]

# Names of the dictionaries that a file may define: weights of z, and logarithms of weights.
_TABLES = {"WEIGHTS": False, "LOG_WEIGHTS": True}
_MODULES: dict[str, ModuleType] = {}


def load_mechanism_files(paths: Sequence[Path]) -> tuple[TaskFile, ...]:
    """Run the files, and have their mechanisms among those that `nn.attend` knows, as ``NAME@DIGEST``.

    A file defines ``WEIGHTS``, ``LOG_WEIGHTS`` or both: a dictionary from a name to a function that takes z, a tensor
    of any shape, and returns weights of at least 0, or their logarithms, of the same shape, element by element.

    Raises:
        TaskFileError: A file cannot be read or run, or defines no mechanism, one that there is already, or one that
            does not give weights.
    """
    files: list[TaskFile] = []
    seen: dict[str, str] = {}
    for path in paths:
        file = read_file(path, "mechanism_files")
        for name in ensure(file, path):
            if name in MECHANISMS or name in seen:
                where = seen.get(name, "the package")
                raise TaskFileError(f"{path}: there is a mechanism {name!r} already, in {where}", "mechanism_files")
            seen[name] = file.name
        files.append(file)
    return tuple(files)


def ensure(file: TaskFile | None, path: Path | None = None) -> list[str]:
    """Have the mechanisms of a file in this process, which may not have run it; their names.

    Raises:
        TaskFileError: As `load_mechanism_files`.
    """
    if file is None:
        return []
    if file.digest not in _MODULES:
        where = path or Path(file.name)
        module = load_module(file, where, "mechanism_files")
        problem = _problem(module)
        if problem is not None:
            raise TaskFileError(f"{where}: {problem}", "mechanism_files")
        for table, is_log in _TABLES.items():
            for name, function in getattr(module, table, {}).items():
                register(f"{name}@{file.digest}", function, is_log=is_log)
        _MODULES[file.digest] = module
    return names_in(file)


def names_in(file: TaskFile) -> list[str]:
    """Names of the mechanisms of a file that was run."""
    return [name for table in _TABLES for name in getattr(_MODULES[file.digest], table, {})]


def _problem(module: ModuleType) -> str | None:
    """The problem with the mechanisms of a file, None where nothing was found."""
    tables = {name: getattr(module, name) for name in _TABLES if hasattr(module, name)}
    if not any(tables.values()):
        return f"defines no mechanism: no dictionary {' or '.join(_TABLES)} of names and functions"
    z = torch.linspace(-3.0, 3.0, 14).view(2, 7)
    for table, functions in tables.items():
        if not isinstance(functions, dict):
            return f"{table} must be a dictionary, got {type(functions).__name__}"
        for name, function in functions.items():
            if not isinstance(name, str) or not name.isidentifier() or not callable(function):
                return f"{table} must map names to functions, got {name!r}: {function!r}"
            try:
                weights = function(z)
            except Exception as error:
                return f"{name}: {named(error)}"
            if not isinstance(weights, torch.Tensor) or weights.shape != z.shape or weights.dtype != z.dtype:
                shape = getattr(weights, "shape", None)
                return f"{name} must give a tensor of the shape and dtype of z, {tuple(z.shape)}, got {shape}"
            if not weights.isfinite().all() or (not _TABLES[table] and (weights < 0).any()):
                return f"{name} must give finite weights of at least 0, got {weights.min():g} to {weights.max():g}"
    return None
