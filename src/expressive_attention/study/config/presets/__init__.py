"""The configurations that come with the package, one TOML file each; its first lines have the question and the time."""

import re
from importlib import resources

from ...errors import ConfigError

__all__ = ["preset_names", "preset_question", "preset_text", "preset_time"]

_FOLDER = resources.files(__name__)


def preset_names() -> list[str]:
    """Names of the presets."""
    names = (path.name for path in _FOLDER.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The TOML text of a preset.

    Raises:
        ConfigError: There is no preset of that name.
    """
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}; presets are: {', '.join(preset_names())}")
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def preset_question(name: str) -> str:
    """The question that a preset asks: the first line of its file."""
    return preset_text(name).partition("\n")[0].removeprefix("# ")


def preset_time(name: str) -> str:
    """The time that a preset takes: the second line of its file, such as ``"about 3 minutes on two cores"``."""
    (found,) = re.findall(r"\A#.*\n# Time: (.*)\.$", preset_text(name), re.MULTILINE)
    return found
