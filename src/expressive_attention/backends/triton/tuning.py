"""Tiles of the kernels: those that a run of `benchmarks/tune.py` found the fastest on a GPU, else defaults.

`tuned.json` has what was measured, ``{capability: {kernel: {dtype: {width: [rows, keys, warps, stages]}}}}``. Nothing
is tuned at run time. The defaults were chosen by counting instructions, registers and spills of the compiled kernels:
they were not measured.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from .tiles import Tile

__all__ = ["KERNELS", "capability_of", "choose", "linear_chunk", "linear_tile", "measured", "wide_tile"]

KERNELS = ("forward", "row", "query", "key_value", "bias_gradient")

# Compute capabilities with 160 KiB of shared memory for a program or more; the others have 99 KiB.
_ROOMY = {80, 90, 100, 103}


@functools.cache
def capability_of(device: torch.device) -> int:
    """The compute capability of a GPU as a number, 90 for 9.0; 0 for another device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def measured() -> dict[tuple[int, str, str, int], Tile]:
    """The table of tiles that were measured: ``{(capability, kernel, dtype, width): tile}``."""
    table = json.loads(Path(__file__).with_name("tuned.json").read_text())
    return {
        (int(capability), kernel, dtype, int(width)): Tile(*tile)
        for capability, kernels in table.items()
        for kernel, dtypes in kernels.items()
        for dtype, widths in dtypes.items()
        for width, tile in widths.items()
    }


def choose(kernel: str, dtype: torch.dtype, width: int, capability: int) -> Tile:
    """The tile of a kernel for head dimensions up to `width`, a power of two."""
    key = (capability, kernel, str(dtype).removeprefix("torch."), width)
    return measured().get(key) or _default(kernel, dtype, width, capability in _ROOMY)


def _default(kernel: str, dtype: torch.dtype, width: int, roomy: bool) -> Tile:
    if dtype == torch.float32:
        if kernel == "forward":
            return Tile(64, 32, 8, 2) if width <= 64 else Tile(32, 32 if width <= 128 else 16, 8, 2)
        if width <= 64:
            return Tile(32, 32, 4, 2)
        return Tile(32, 32, 8, 1) if width <= 128 else Tile(16, 16, 4, 1)
    if width > 128:
        return Tile(64, 32, 4, 2) if kernel == "forward" else Tile(32, 32, 4, 1)
    if kernel == "forward":
        if width <= 64:
            return Tile(128, 64, 4, 3)
        return Tile(128, 64, 8, 3) if roomy else Tile(128, 32, 8, 3)
    if kernel == "key_value":  # 32 rows where the sums of two gradients leave few registers
        return Tile(64 if dtype == torch.bfloat16 and width <= 64 else 32, 64, 4, 2 if dtype == torch.bfloat16 else 1)
    if kernel == "query" and dtype == torch.float16:  # derivatives are float32, which take twice the room
        return Tile(64, 32, 4, 2 if width <= 64 else 1)
    if kernel == "query" and width > 64 and roomy:
        return Tile(128, 64, 8, 2)
    return Tile(64, 64, 4, 2 if width <= 64 or roomy else 1) if dtype == torch.bfloat16 else Tile(32, 32, 4, 1)


def wide_tile(width: int) -> Tile:
    """The tile of kernels with `WIDE`, whose numbers are float32."""
    return Tile(32, 32, 4, 1) if width <= 64 else Tile(16, 16, 4, 1)


def linear_chunk(width: int) -> int:
    """Keys of a chunk that has a state: the larger the fewer states are in memory, and the more pairs are multiplied.

    States are then twice as large as values in float32, and the pairs of a row take half the products of its state.
    """
    return max(128, width * width // 2)


def linear_tile(kernel: str, dtype: torch.dtype, width: int, capability: int) -> Tile:
    """The tile of a kernel in linear time: "sum", "rows" or "key_value". Its numbers are float32."""
    roomy = capability in _ROOMY
    if dtype == torch.float32:
        if width <= 64:
            return Tile(32, 32, 8 if kernel == "rows" else 4, 1)
        return Tile(32, 32, 8, 1) if roomy else Tile(16, 16, 8, 1)
    if width <= 64:
        return Tile(128 if kernel == "rows" else 32, 64, 8, 2)
    return Tile(64 if roomy or kernel != "rows" else 32, 32, 8, 1)
