"""The old path of `tasks.recall.mqar`; see `moved`."""

from ..moved import moved

__getattr__ = moved(__name__, {"MQARTask": "tasks.recall.mqar"})
