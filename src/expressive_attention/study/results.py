"""The old path of `config.condition` and `runs.results`; see `moved`."""

from .moved import moved

__getattr__ = moved(
    __name__, {"Setting": "config.condition", "Condition": "config.condition", "collect": "runs.results"}
)
