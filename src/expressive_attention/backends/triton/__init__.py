"""Expressive attention on the GPU, in Triton: one source for all GPUs since Ampere.

``launch`` runs the kernels of ``forward_pass``, ``decode``, ``backward_pass`` and ``bias``; ``tiles`` has what all of
them share. With ``TRITON_INTERPRET=1`` in the environment when they are first used, they run on the CPU, slowly.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys

import torch
from torch import Tensor

from ...call import Call, Gradients, Result, Upstream, differentiated_by_func

__all__ = ["backward", "declines", "forward", "linear_backward", "linear_declines", "linear_forward"]

_WIDEST = 256
_WIDEST_LINEAR = 128
_OLDEST = (3, 4)  # Triton


def declines(call: Call) -> str | None:
    """The reason why this backend declines the call; None: it does not."""
    device = call.query.device.type
    if device != "cuda" and not (device == "cpu" and _interpreted()):
        return f"it runs on GPUs, not on {device}" + (f"; {_MISSING}" if _MISSING else "")
    if device == "cpu" and _UNFIT:
        return _UNFIT
    if call.query.dtype == torch.float64:
        return "float64 is not implemented"
    widest = max(call.query.shape[-1], call.value.shape[-1])
    if widest > _WIDEST:
        return f"head dimensions above {_WIDEST} are not implemented, got {widest}"
    if call.log_decay is not None or call.relative_bias is not None:
        return "decays and biases by distance must be in a mask"
    if call.visibility.listed is not None and call.has_bias:
        return "blocks of keys beside a bias must be in a mask"
    if call.visibility.listed is not None and call.visibility.block_keys % 16:
        return f"blocks must have a multiple of 16 keys, got {call.visibility.block_keys}"
    if call.attn_mask is not None and call.visibility.slopes is not None:
        return "slopes beside a mask must be in it"
    if differentiated_by_func():
        return "torch.func and forward-mode derivatives are not implemented"
    return _MISSING


def _missing() -> str | None:
    """The fault in the installation of Triton; None: it has none."""
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


def _unfit() -> str | None:
    """The reason why Triton's interpreter would fail here; None: there is none."""
    try:
        versions = {name: importlib.metadata.version(name) for name in ("triton", "numpy")}
    except importlib.metadata.PackageNotFoundError:
        return None
    triton, numpy = (tuple(int(part) for part in versions[name].split(".")[:2]) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return f"the interpreter of Triton {versions['triton']} needs numpy below 2.4, got {versions['numpy']}"
    return None


_UNFIT = _unfit()


def forward(call: Call) -> Result:
    """Output, normalizer and largest biases."""
    from . import launch  # not before it is needed: importing triton takes its time

    return launch.forward(call)


def backward(call: Call, result: Result, upstream: Upstream) -> Gradients:
    """Gradients of query, key, value and, if wanted, of a float mask."""
    from . import launch

    return launch.backward(call, result, upstream)


# ---- the squared form in linear time ----


def linear_declines(call: Call) -> str | None:
    """The reason why a call that `backends.linear` does not decline has no kernels here; None: it has."""
    reason = declines(call.but(log_decay=None))
    if reason is not None:
        return reason
    if call.visibility.key_lengths is not None:
        return "key_lengths are not implemented"
    widest = max(call.query.shape[-1], call.value.shape[-1])
    if widest > _WIDEST_LINEAR:
        return f"states of head dimensions above {_WIDEST_LINEAR} are not implemented, got {widest}"
    return None


def linear_forward(call: Call, decays: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and normalizer of the squared form; N is NaN where float32 does not hold a row.

    Args:
        call: A call that `linear_declines` does not decline.
        decays: Cumulative log decays ``(B, Hq | Hkv, S)`` of float64, or None.
    """
    from . import linear

    return linear.forward(call, decays)


def linear_backward(
    call: Call, decays: Tensor | None, upstream: Upstream
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Gradients of query, key, value and decays, as keys have them; None: float32 does not hold all rows."""
    from . import linear

    return linear.backward(call, decays, upstream)


def _interpreted() -> bool:
    """Whether the kernels run on the CPU: settled when they are imported."""
    tiles = sys.modules.get(f"{__name__}.tiles")
    return os.environ.get("TRITON_INTERPRET") == "1" if tiles is None else tiles.INTERPRETED.value
