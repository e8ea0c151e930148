"""Facts of tasks in a file of the run folder, since to count them takes seconds and reading a study needs them all."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import tasks
from ..config.record import RecordedTask, facts_of
from ..config.task_files import file_of
from ..files import write_atomically
from ..tasks import Task

__all__ = ["KnownFacts", "plain_number"]


class KnownFacts:
    """Facts of tasks, counted where the file does not have them.

    Each is kept under all that it depends on: the settings of the task, the number of test sequences, and the code of
    the tasks, with the text of a file of the user's own. A damaged file counts as empty.

    Args:
        path: Path of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = _read(path)
        self.found: dict[str, dict[str, Any]] = {}

    def of(self, task: Task | RecordedTask, test_sequences: int) -> dict[str, Any]:
        """The facts of a task, as `record.facts_of` counts them."""
        if isinstance(task, RecordedTask):
            return task.facts
        file = file_of(task)
        own = [] if file is None else [file.digest]
        content = json.dumps([task.model_dump(mode="json"), test_sequences, _code(), *own], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        if key not in self.known:
            facts = facts_of(task, test_sequences)
            self.known[key] = json.loads(json.dumps(facts, default=plain_number))
            self.found[key] = self.known[key]
        return self.known[key]

    def keep(self) -> None:
        """Write new facts; a folder that cannot be written is left as it is."""
        if not self.found:
            return
        facts = _read(self.path) | self.found
        try:
            write_atomically(self.path, json.dumps({"sha256": _digest(facts), "facts": facts}, indent=1).encode())
        except OSError:
            return
        self.found = {}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["facts"] if content["sha256"] == _digest(content["facts"]) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@lru_cache
def _code() -> str:
    """A hash of the sources of the tasks."""
    sources = sorted(Path(tasks.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def plain_number(value: Any) -> Any:
    """A number of numpy as one of Python, for `json.dumps`."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"facts must be numbers, text or truth values, got {value!r}")
