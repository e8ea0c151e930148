"""Expressive attention for PyTorch: weights proportional to z^2 / (1 + z^2) of the scaled dot product z."""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import nn
    from .functional import expressive_attention
    from .integrations import calibrate, convert
    from .varlen import expressive_attention_varlen

__all__ = ["calibrate", "convert", "expressive_attention", "expressive_attention_varlen", "nn"]

try:
    __version__ = _version("expressive-attention")
except _NotInstalled:  # sources on the path: they run, without the kernels for the CPU
    __version__ = "0+unknown"

if not TYPE_CHECKING:
    # The names are imported when they are first asked for (PEP 562), so that `ea --help` starts without torch.
    _MODULES = {
        "calibrate": "integrations",
        "convert": "integrations",
        "expressive_attention": "functional",
        "expressive_attention_varlen": "varlen",
        "nn": "nn",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f".{_MODULES[name]}", __name__)
        found = globals()[name] = module if name == _MODULES[name] else getattr(module, name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
