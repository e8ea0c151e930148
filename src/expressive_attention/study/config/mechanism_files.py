"""Mechanisms in files of the user's own: functions of z, known by the text of their file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...nn import MECHANISMS
from ...nn.mechanisms import register
from .cells import AGAIN
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
            does not give weights, the same ones for the same z, element by element.
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
    for table, functions in tables.items():
        if not isinstance(functions, dict):
            return f"{table} must be a dictionary of names and functions, got {type(functions).__name__}"
    if not any(tables.values()):
        return f"defines no mechanism: no dictionary {' or '.join(_TABLES)} of names and functions"
    for table, functions in tables.items():
        for name, function in functions.items():
            if not isinstance(name, str) or not name.isidentifier() or not callable(function):
                return f"{table} must map names to functions, got {name!r}: {function!r}"
            if name.endswith(AGAIN):
                return (
                    f"{name}: a name must not end with {AGAIN}, which stands for the mechanism before it with other "
                    "random numbers"
                )
            try:
                problem = _problem_of(function, is_log=_TABLES[table])
            except (Exception, SystemExit) as error:
                problem = f": {named(error)}"
            if problem is not None:
                return f"{name}{problem}"
    return None


def _problem_of(function: Callable[..., Any], *, is_log: bool) -> str | None:
    """The problem with a function of z, to be put after its name; None where nothing was found."""
    scores = torch.linspace(-3.0, 3.0, 14).view(2, 7).requires_grad_()  # as in training: numpy cannot take it
    weights, again = (function(scores.clone()) for _ in range(2))
    if not isinstance(weights, torch.Tensor) or weights.shape != scores.shape or weights.dtype != scores.dtype:
        got = weights if isinstance(weights, torch.Tensor) else None
        said = type(weights).__name__ if got is None else f"{tuple(got.shape)}, {got.dtype}"
        return f" must give a tensor of the shape and dtype of z, {tuple(scores.shape)}, {scores.dtype}, got {said}"
    if not weights.isfinite().all() or (not is_log and (weights < 0).any()):
        return f" must give finite weights of at least 0, got {weights.min():g} to {weights.max():g}"
    if not torch.equal(weights, again):
        return " must give the same weights for the same z, got others when asked again"
    for z, weight in zip(scores.flatten(), weights.flatten(), strict=True):
        alone = function(z.clone().view(1, 1))
        # The last digits of a function may depend on how many numbers a processor takes at a time.
        if alone.shape != (1, 1) or not torch.allclose(alone[0, 0], weight, rtol=1e-3, atol=1e-6):
            got = f"{alone.item():g}" if alone.numel() == 1 else f"the shape {tuple(alone.shape)}"
            return f" must act element by element: z = {z:g} gives {weight:g} among other scores, and {got} alone"
    return None
