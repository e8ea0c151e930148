"""A record of a study's own tasks and mechanisms, kept so that reading the study does not run their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..tasks import Task
from ..tasks.contexts import facts_of_test
from .task_files import TaskFile, file_of

__all__ = ["Record", "RecordError", "RecordedTask", "facts_of"]


class RecordError(ValueError):
    """A damaged record."""


@dataclass(frozen=True)
class RecordedTask:
    """A task as it was when the study ran: enough to name its cells and to say what an accuracy is worth.

    Attributes:
        label: Label, as `Task.label`.
        content: Its fields, as JSON has them.
        facts: Facts that say what an accuracy is worth, as in `study.config.condition.Condition`.
        file: The file that defines it.
    """

    label: str
    content: dict[str, Any]
    facts: dict[str, Any]
    file: TaskFile

    def model_dump(self, *, mode: str = "python", exclude_none: bool = False) -> dict[str, Any]:
        """The fields, as a task gives them."""
        return {name: x for name, x in self.content.items() if not (exclude_none and x is None)}


@dataclass(frozen=True)
class Record:
    """Tasks by what a grid says of them, and the files of mechanisms by their names."""

    tasks: Mapping[str, RecordedTask]
    mechanisms: dict[str, TaskFile]

    @classmethod
    def of(
        cls, tasks: Iterable[tuple[dict[str, Any], Any]], mechanisms: dict[str, TaskFile], test_sequences: int
    ) -> Record:
        """The record of tasks, each with what the grid says of it, that come from files."""
        found = {}
        for content, task in tasks:
            file = file_of(task)
            assert file is not None
            found[_key(content)] = RecordedTask(
                task.label, task.model_dump(mode="json"), facts_of(task, test_sequences), file
            )
        return cls(found, mechanisms)

    def task(self, content: dict[str, Any]) -> RecordedTask | None:
        """The task that a table of the grid asks for, None where it is none of these."""
        return self.tasks.get(_key(content))

    @property
    def files(self) -> dict[str, TaskFile]:
        """The files by their names, as they were run."""
        files = [*(task.file for task in self.tasks.values()), *self.mechanisms.values()]
        return {file.name: file for file in files}

    def to_json(self) -> str:
        """The record as text."""
        tasks = {
            key: {"label": task.label, "content": task.content, "facts": task.facts, "file": vars(task.file)}
            for key, task in self.tasks.items()
        }
        return json.dumps(
            {"tasks": tasks, "mechanisms": {name: vars(file) for name, file in self.mechanisms.items()}}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record that `to_json` has written.

        Raises:
            RecordError: The text is no record.
        """
        try:
            content = json.loads(text)
            tasks = {
                key: RecordedTask(x["label"], dict(x["content"]), dict(x["facts"]), TaskFile(**x["file"]))
                for key, x in content["tasks"].items()
            }
            return cls(tasks, {name: TaskFile(**x) for name, x in content["mechanisms"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RecordError("is not what was written") from None


def facts_of(task: Task | RecordedTask, test_sequences: int) -> dict[str, Any]:
    """Facts that say what an accuracy on so many test sequences is worth, as in `study.config.condition.Condition`."""
    return task.facts if isinstance(task, RecordedTask) else task.facts() | facts_of_test(task, test_sequences)


def _key(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)
