"""Expressive attention on the GPU, in Triton: one source for all GPUs since Ampere.

``launch`` runs the kernels of ``forward_pass``, ``decode``, ``backward_pass`` and ``bias``; ``tiles`` has what all of
them share. With ``TRITON_INTERPRET=1`` in the environment when they are first used, they run on the CPU, slowly.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

import torch
from torch import Tensor

from ..pattern import Pattern
from ..problem import Problem

__all__ = ["backward", "forward", "supports", "takes"]

_WIDEST = 256
_OLDEST = (3, 4)  # Triton


def supports(problem: Problem) -> str | None:
    """The reason why this backend declines `problem`; None: it does not."""
    if problem.device != "cuda" and not (problem.device == "cpu" and _interpreted()):
        return f"it runs on GPUs, not on {problem.device}" + (f"; {_MISSING}" if _MISSING else "")
    if problem.dtype == torch.float64:
        return "float64 is not implemented"
    if problem.head_dim > _WIDEST:
        return f"head dimensions above {_WIDEST} are not implemented, got {problem.head_dim}"
    if problem.dropout_p:
        return "dropout is not implemented"
    if problem.differentiated_by_func:
        return "torch.func and forward-mode derivatives are not implemented"
    return _MISSING


def _missing() -> str | None:
    """What is wrong with the installation of Triton; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'expressive-attention[gpu]'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of another name, as for AMD
        return None
    oldest = ".".join(map(str, _OLDEST))
    is_old = tuple(int(part) for part in version.split(".")[:2]) < _OLDEST
    return f"triton must be {oldest} or later, got {version}" if is_old else None


_MISSING = _missing()  # found out with the package, so that a call, and what compiles it, need not


def takes(pattern: Pattern) -> bool:
    """Whether this backend knows all that a pattern asks for."""
    return True


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalizer and peak, of the arguments of `reference.forward`."""
    from . import launch  # not before it is needed: importing triton takes its time

    return launch.forward(*arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, on request, of a float mask, of the arguments of `blockwise.backward`."""
    from . import launch

    return launch.backward(*arguments)


def _interpreted() -> bool:
    """Whether the kernels run on the CPU: settled when they are imported."""
    tiles = sys.modules.get(f"{__name__}.tiles")
    return os.environ.get("TRITON_INTERPRET") == "1" if tiles is None else tiles.INTERPRETED.value
