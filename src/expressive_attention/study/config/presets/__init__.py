"""The configurations that come with the package, one TOML file each."""

from importlib import resources

from ...errors import ConfigError

__all__ = ["preset_names", "preset_text"]

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
