"""The old path of `report.twins`; see `moved`."""

from .moved import moved

__getattr__ = moved(__name__, {"load_twins": "report.twins"})
