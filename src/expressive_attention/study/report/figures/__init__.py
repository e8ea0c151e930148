"""The figures of a report, one file each, of the figure's name; the file defines `FIGURE`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..figure import ReportFigure

__all__ = ["FIGURES"]


_FOUND: dict[str, ReportFigure] = {
    module.name: import_module(f"{__name__}.{module.name}").FIGURE for module in iter_modules(__path__)
}
FIGURES = dict(sorted(_FOUND.items(), key=lambda item: item[1].order))
