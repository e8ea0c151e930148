"""A record of a study's own tasks and mechanisms, kept so that reading the study does not run their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks import Task
from ..tasks.contexts import facts_of_test
from .task_files import TaskFile, TaskFileError, file_of, read_file

__all__ = ["RECORD", "Record", "RecordError", "RecordedTask", "check_files", "facts_of", "read_record"]


RECORD = "record.json"


class RecordError(ValueError):
    """A record that cannot be used; the message says why, in one line."""


@dataclass(frozen=True)
class RecordedTask:
    """A task as it was when the study ran: enough to name its cells and to say what an accuracy is worth.

    Attributes:
        label: Label, as `Task.label`.
        formula: Rule in one line, as `Task.formula`.
        content: Its fields, as JSON has them.
        facts: Facts that say what an accuracy is worth, as in `study.config.condition.Condition`.
        file: The file that defines it.
    """

    label: str
    formula: str
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
                task.label, task.formula, task.model_dump(mode="json"), facts_of(task, test_sequences), file
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
        tasks = {key: {**vars(task), "file": vars(task.file)} for key, task in self.tasks.items()}
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
                key: RecordedTask(
                    x["label"], x.get("formula", ""), dict(x["content"]), dict(x["facts"]), TaskFile(**x["file"])
                )  # records of older versions have no formula
                for key, x in content["tasks"].items()
            }
            return cls(tasks, {name: TaskFile(**x) for name, x in content["mechanisms"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RecordError("is not what was written") from None


def read_record(directory: Path, names: Sequence[str]) -> Record:
    """The record in a folder.

    Args:
        directory: The folder of a study, or of its export.
        names: The names of the files of tasks and mechanisms.

    Raises:
        RecordError: It is missing or damaged; the message says what can tell the same.
    """
    path = directory / RECORD
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except OSError:
        reason = "is missing"
    except (RecordError, UnicodeDecodeError) as error:
        reason = str(error)
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise RecordError(
            f"{path} {reason}, and {missing[0]} is not there, which could tell its tasks: put {RECORD} back from the "
            "run folder, or export the study again"
        )
    raise RecordError(f"{path} {reason}: only --trust, which runs the study's Python files, can tell its tasks")


def check_files(directory: Path, names: Sequence[str]) -> None:
    """Compare files that are to be run with the record of a study.

    A changed file has other tasks and mechanisms than those of the finished cells, which it would hide.

    Raises:
        RecordError: A file has changed. Nothing is said of files that are not there, or where there is no record.
    """
    try:
        known = Record.from_json((directory / RECORD).read_text(encoding="utf-8")).files
        found = {name: read_file(directory / name) for name in names if name in known}
    except (OSError, RecordError, UnicodeDecodeError, TaskFileError):
        return
    for name, file in found.items():
        if file != known[name]:
            raise RecordError(
                f"{directory / name} has changed since the study ran, and its finished cells are not of this file: put "
                f"back the text that {RECORD} has, or run the study again with the new one"
            )


def facts_of(task: Task | RecordedTask, test_sequences: int) -> dict[str, Any]:
    """Facts that say what an accuracy on so many test sequences is worth, as in `study.config.condition.Condition`."""
    return task.facts if isinstance(task, RecordedTask) else task.facts() | facts_of_test(task, test_sequences)


def _key(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)
