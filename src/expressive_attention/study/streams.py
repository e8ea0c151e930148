"""The old path of `tasks.rng`; see `moved`."""

from .moved import moved

__getattr__ = moved(__name__, {"stream": "tasks.rng"})
