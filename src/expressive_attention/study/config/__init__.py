"""The configuration of a study: its schema, the grid of conditions, presets, and files of tasks and mechanisms."""

from ..moved import moved

__getattr__ = moved(__name__, {"parse_config": "config.load", "load_config": "config.load"})
