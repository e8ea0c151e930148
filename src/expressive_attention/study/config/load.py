"""Reading of configurations: from a preset or a TOML file to a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from .mechanism_files import load_mechanism_files
from .presets import preset_names, preset_text
from .record import Record, RecordedTask
from .schema import PROTOCOL
from .study import Files, StudyConfig
from .task_files import TaskFileError, check_task, load_task_files
from .toml import tomllib

__all__ = ["load_config", "parse_config"]


# Values that an older protocol had where a configuration says nothing.
_OLDER_DEFAULTS = {"2": {"training": {"early_stop": True}, "seeds": {"tuning": 4, "confirmation": 0}}}


def load_config(preset_or_file: str) -> tuple[StudyConfig, str]:
    """The configuration of a preset or a TOML file, and its text.

    Raises:
        ConfigError: No such preset or file, not TOML, or a key or value does not fit.
    """
    path = Path(preset_or_file)
    if preset_or_file in preset_names():
        text = preset_text(preset_or_file)
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
    else:
        close = get_close_matches(preset_or_file, preset_names(), 1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"no preset or file {preset_or_file!r}{meant}; presets are: {', '.join(preset_names())}")
    return parse_config(text, preset_or_file, lambda name: path.parent / name), text


def parse_config(
    text: str,
    source: str,
    find: Callable[[str], Path] = Path,
    *,
    protocol: int = PROTOCOL,
    record: Record | None = None,
) -> StudyConfig:
    """The configuration in a TOML text, whose `task_files` and `mechanism_files` are run.

    Args:
        text: The TOML.
        source: Its origin, named in errors.
        find: Gives the path of a file named in `task_files`; by default, relative to the working directory.
        protocol: The number of its protocol, where it does not say.
        record: Facts of the files, which are then not run.

    Raises:
        ConfigError: Not TOML, a key or value does not fit, or a file of tasks or mechanisms cannot be used.
    """
    try:
        content = tomllib.loads(text)
        content.setdefault("protocol", protocol)
        for table, defaults in _OLDER_DEFAULTS.get(str(content["protocol"]), {}).items():
            if isinstance(content.setdefault(table, {}), dict):
                content[table] = defaults | content[table]
        files = Files(record=record)
        if record is None:
            tasks, mechanisms = ([find(name) for name in _names(content, key)] for key in _FILE_KEYS)
            files = Files(load_task_files(tasks), load_mechanism_files(mechanisms))
        # JSON is stricter: "30" and true are no numbers there, but a list is a tuple.
        text = json.dumps(content, default=str)
        config = StudyConfig.model_validate_json(text, strict=True, context=files)
        for _, task, _ in config.expanded() if files.tasks else []:
            if not isinstance(task, RecordedTask):
                check_task(task)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    except TaskFileError as error:
        raise ConfigError(f"{source}: {error.key}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: {_in_one_line(error)}") from None
    return config


_FILE_KEYS = ("task_files", "mechanism_files")


def runs_files(text: str) -> bool:
    """Whether a configuration names files that would be run."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return any(_names(content, key) for key in _FILE_KEYS)


def _names(content: dict[str, Any], key: str) -> list[str]:
    """File names in a key; none where they are no names, which is left to the validation."""
    names = content.get(key, [])
    well_formed = isinstance(names, list) and all(isinstance(name, str) and name.endswith(".py") for name in names)
    return names if well_formed else []


def _in_one_line(error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
        got = problem["input"]
        if not isinstance(got, dict) and problem["type"] not in ("extra_forbidden", "missing", "value_error"):
            message += f", got {got!r}"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)
