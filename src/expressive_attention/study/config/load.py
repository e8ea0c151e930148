"""Reading of configurations: from a preset or a TOML file to a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from ..tasks.images.image_task import ImageTask
from .mechanism_files import load_mechanism_files
from .presets import preset_names, preset_text
from .record import Record, RecordedTask
from .schema import PROTOCOL, in_one_line
from .study import Files, StudyConfig, is_file_name
from .task_files import TaskFileError, load_task_files
from .task_trial import check_task
from .toml import tomllib

__all__ = ["load_config", "parse_config"]


# Values that an older protocol had where a configuration says nothing.
_OLDER_DEFAULTS = {2: {"training": {"early_stop": True}, "seeds": {"tuning": 4, "confirmation": 0}}}


def load_config(preset_or_file: str) -> tuple[StudyConfig, str]:
    """The configuration of a preset or a TOML file, to be run, and its text.

    Raises:
        ConfigError: No such preset or file, not TOML, a key or value does not fit, or images cannot be read.
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
    # In a run folder, copies of the files lie beside the configuration, wherever it has them from.
    is_of_a_run = path.name == "config.toml" and (path.parent / "cells").is_dir()
    find = lambda name: path.parent / (Path(name).name if is_of_a_run else name)  # noqa: E731
    config = parse_config(text, preset_or_file, find)
    for _, task, _ in config.expanded():
        if isinstance(task, ImageTask):
            task.check_images()
    return config, text


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
        of = content["protocol"]
        for table, defaults in (_OLDER_DEFAULTS.get(of, {}) if isinstance(of, int) else {}).items():
            if isinstance(content.setdefault(table, {}), dict):
                content[table] = defaults | content[table]
        files = Files(record=record)
        if record is None:
            tasks, mechanisms = ([find(name) for name in _names(content, key)] for key in _FILE_KEYS)
            files = Files(load_task_files(tasks), load_mechanism_files(mechanisms))
        # JSON is stricter: "30" and true are no numbers there, but a list is a tuple.
        text = json.dumps(content, default=str)
        config = StudyConfig.model_validate_json(text, strict=True, context=files)
        if files.tasks:
            tried = {repr(task): task for _, task, _ in config.expanded() if not isinstance(task, RecordedTask)}
            for task in tried.values():
                check_task(task, config.training)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    except TaskFileError as error:
        raise ConfigError(f"{source}: {error.key}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: {in_one_line(error, StudyConfig)}") from None
    return config


_FILE_KEYS = ("task_files", "mechanism_files")


def own_files(text: str) -> list[str]:
    """The files that a configuration names, and that would be run."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return []
    return [name for key in _FILE_KEYS for name in _names(content, key)]


def _names(content: dict[str, Any], key: str) -> list[str]:
    """File names in a key; none where they are no names, which is left to the validation."""
    names = content.get(key, [])
    well_formed = isinstance(names, list) and all(isinstance(name, str) and is_file_name(name) for name in names)
    return names if well_formed else []
