"""A task of a user's own, the one of the tutorial, and tiny studies of it."""

import json
import re
from pathlib import Path

import pytest

from expressive_attention.study.config.load import load_config
from expressive_attention.study.tasks import TASKS
from tests.study.tiny import tiny

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
FILES = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', PAGE.read_text(), re.MULTILINE | re.DOTALL))
COMMANDS = [line for text in re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
            for line in text.splitlines()]  # fmt: skip
ECHO = FILES["echo.py"]


@pytest.fixture(autouse=True, scope="module")
def no_tasks_are_left():
    """Fixtures of this module define tasks, too: they end before this one does."""
    before = dict(TASKS)
    yield before
    TASKS.clear()
    TASKS.update(before)


@pytest.fixture(autouse=True)
def no_tasks_are_there(no_tasks_are_left):
    TASKS.clear()
    TASKS.update(no_tasks_are_left)


def written(directory, source=ECHO, name="echo.py", files=None, task='{ kind = "echo", basis = 4, delay = 2 }'):
    """A tiny study of a task in a file, which lies in a folder beside its configuration."""
    (directory / "tasks").mkdir(parents=True, exist_ok=True)
    (directory / "tasks" / name).write_text(source)
    listed = json.dumps(files or [f"tasks/{name}"])
    path = directory / "study.toml"
    path.write_text(f"task_files = {listed}\n{tiny(task=task)}")
    return path


def only_cell(path):
    config, _ = load_config(str(path))
    return config.arms()[0].tuning_cells()[0]
