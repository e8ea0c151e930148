"""Errors of pydantic in one line, in the words of the other errors."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

__all__ = ["in_one_line"]

_UNSAID = ("extra_forbidden", "missing", "value_error")  # errors whose value says nothing, or is in the message


def in_one_line(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """All problems: the key of each, the problem, and the value that came.

    Args:
        error: The problems.
        model: The class that was to be made.
        where: The key under which its content stands; empty: it is the whole configuration.
    """
    parts = []
    problems = error.errors(include_url=False)
    for problem in problems:
        location = problem["loc"]
        within = [other["loc"] for other in problems if other["loc"][: len(location)] == location != other["loc"]]
        if problem["type"] == "too_short" and within:
            continue  # of what is wrong in it, nothing was left
        key = ".".join(str(part) for part in (*([where] if where else []), *location))
        message = _in_our_words(problem["msg"])
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; known keys are {', '.join(_keys(model, location[:-1]))}"
        got = problem["input"]
        if not isinstance(got, dict) and problem["type"] not in _UNSAID:
            message += f", got {got!r}"
        parts.append(f"{key}: {message}" if key else message)
    return "; ".join(parts)


def _in_our_words(message: str) -> str:
    message = message.removeprefix("Value error, ").replace("Field required", "is missing")
    message = re.sub(r"^(Input|Tuple|List|Dictionary|String|Value) should ", "must ", message)
    return re.sub(r" after validation, not \d+$", "", message)


def _keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys of the table at a path of keys and places in lists."""
    for name in path:
        if isinstance(name, str):
            model = next(iter(_models(model.model_fields[name].annotation)))
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The classes of pydantic in a type."""
    if isinstance(annotation, type(BaseModel)):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models(part)]
