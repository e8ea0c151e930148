"""Lets torchvision be imported where its operators cannot be loaded, as those for CUDA beside torch for the CPU.

timm and transformers import torchvision, and nothing here calls its operators.
"""

import re
from importlib.util import find_spec

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")


def make_importable() -> None:
    """Declare the operators that torchvision registers shapes for, until it can be imported."""
    while find_spec("torchvision") is not None and (missing := _missing()):
        _library.define(f"{missing}(Tensor x) -> Tensor")


def _missing() -> str | None:
    """The first operator for want of which torchvision cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        found = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
        if found is None:
            raise
        return found[1]
    return None
