"""Runs the kernels: chooses tiles and number formats, allocates, and says in which order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...call import Call, Gradients, Result, Upstream, accumulation_dtype, empty_bias_max, float32_precision
from ...masks import repeated_strides
from ..dropout import keep_share, threshold
from . import decode, tuning
from .backward_pass import key_value_kernel, query_kernel, row_kernel
from .bias import bias_gradient_kernel, bias_max_kernel
from .blocks import NO_BLOCKS, Blocks
from .forward_pass import forward_kernel
from .tiles import ALIBI, BOOL, FLOAT, FORMS, INTERPRETED, NO_MASK, RATIO, Tile, ceil_div, padded, shapes
from .wide import wide_kernel

__all__ = ["backward", "forward", "on_device", "precision_of"]

# A float32 normalizer above this lost no weight that counts to underflow.
_LOWEST = 2.0**-80

# Weights of float16 are multiplied by this, so that they are normal numbers from 2^-29 on.
_FLOAT16_FACTOR = 2.0**15

# With it, the mean weight of a row of float16 has to be this large: its rounding error is then below 2^-11.
_FLOAT16_MEAN = 2.0**-28

# Scales between these have the form of weights that needs none: constants and derivatives stay well in float32's range.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-8, 2.0**8

# Programs for each multiprocessor that look for rows to compute once more. Nearly always there are none.
_FEW = 4


def _forward_tile(inputs: _Inputs) -> Tile:
    """The tile of the forward kernel."""
    tile = inputs.tile("forward")
    if inputs.biased and inputs.dtype != torch.float32:  # a bias is loaded in tiles, too
        tile = tile._replace(keys=min(tile.keys, 64), stages=min(tile.stages, 2 if inputs.widest <= 64 else 3))
    if inputs.longest_query * inputs.groups > 16:
        return tile
    return tile._replace(rows=16, keys=64 if inputs.widest <= 64 else min(tile.keys, 32), warps=4)


def forward(call: Call) -> Result:
    """Output, normalizer and largest biases."""
    query, value, form = call.query, call.value, call.form
    batch, heads, length, _ = query.shape
    value_width = value.shape[3]
    is_packed = call.visibility.query_starts is not None
    new = query.new_zeros if is_packed else query.new_empty  # there are rows of no sequence
    output = new((batch, heads, length, value_width))
    normalizer = new((batch, heads, length), dtype=accumulation_dtype(query.dtype))
    bias_max = empty_bias_max(normalizer, call)
    if is_packed and bias_max is not None:
        bias_max.zero_()
    inputs = _Inputs(call)
    if normalizer.numel() == 0 or inputs.longest_query == 0:
        return Result(output, normalizer, bias_max)

    weight, factor, lowest = query.dtype, 1.0, _LOWEST
    if query.dtype == torch.float16 and form == "expressive":
        factor, lowest = _FLOAT16_FACTOR, max(_LOWEST, inputs.longest_key * _FLOAT16_MEAN)
    elif query.dtype == torch.float16:
        weight = torch.float32  # these have no bound; in tf32, as exact as float16
    plane = normalizer.numel()
    arguments = {**inputs.arguments, "outputs": output, "normalizers": normalizer, "plane": plane, "lowest": lowest}

    tile = inputs.fitted(_forward_tile(inputs))
    tiles = inputs.tiles(tile)
    programs = tiles * inputs.programs
    span = inputs.longest_key
    if tiles == 1:
        span = decode.part_of_keys(programs, span, _processors(query.device))
    parts = ceil_div(inputs.longest_key, span) if span < inputs.longest_key else 1
    wide = inputs.fitted(tuning.wide_tile(inputs.widest))
    # Few programs need no flag to look at their rows; with parts, nobody knows the sums before they are added.
    lost = None
    if parts == 1 and inputs.tiles(wide) * inputs.programs > inputs.few:
        lost = torch.zeros(inputs.programs, dtype=torch.int32, device=query.device)
    narrow = {**inputs.narrow, "WEIGHT": _TYPES[weight], "FACTOR": factor, "lost": lost}
    narrow |= {"tiles": tiles, "span": span, "bias_maxima": normalizer if bias_max is None else bias_max}
    with on_device(inputs.device):
        inputs.find_bias_max(bias_max)
        if parts == 1:
            _run(forward_kernel, (programs, 1), tile, arguments, SPLIT=False, **narrow)
        else:
            sums = new((parts, *output.shape), dtype=torch.float32)
            totals = new((parts, *normalizer.shape), dtype=normalizer.dtype)
            split = {**arguments, "outputs": sums, "normalizers": totals}
            _run(forward_kernel, (programs, parts), tile, split, SPLIT=True, **narrow)
            few = Tile(16, 16, 4, 1)
            merged = {"sums": sums, "totals": totals, "outputs": output, "normalizers": normalizer}
            _run(
                decode.merge_kernel, (ceil_div(plane, few.rows),), few, merged,
                rows=plane, parts=parts, value_width=value_width, BLOCK_EV=padded(value_width),
            )  # fmt: skip
        inputs.run_again(
            wide_kernel, wide, {**arguments, **inputs.wide}, tiles=inputs.tiles(wide), lost=lost,
            bias_maxima=narrow["bias_maxima"], BACKWARD=False, stats=None, wide_stats=None,
            grad_output=None, grad_normalizer=None, grad_strides=(0, 0, 0, 0),
        )  # fmt: skip
    return Result(output, normalizer, bias_max)


def backward(call: Call, result: Result, upstream: Upstream) -> Gradients:
    """Gradients of query, key, value and, if wanted, of the float mask."""
    query, key, value, attn_mask = call[:4]
    form, (output, normalizer, _) = call.form, result
    grad_output, grad_normalizer, wants_mask, _ = upstream
    # In packed tensors there are rows of no sequence.
    new = torch.empty if call.visibility.query_starts is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    dmask = attn_mask.new_zeros(attn_mask.shape) if wants_mask and attn_mask is not None else None
    inputs = _Inputs(call)
    if normalizer.numel() == 0 or inputs.longest_query == 0 or inputs.longest_key == 0:
        return Gradients(dq.zero_(), dk.zero_(), dv.zero_(), dmask)

    bias_max = empty_bias_max(normalizer, call)
    stats = new((normalizer.numel(), 4), dtype=normalizer.dtype, device=query.device)
    wide_stats = new((normalizer.numel(), 8), dtype=normalizer.dtype, device=query.device)
    lost = torch.zeros(inputs.programs, dtype=torch.int32, device=query.device)
    arguments = {
        **inputs.arguments,
        "grad_output": grad_output,
        "grad_strides": grad_output.stride(),
        "grad_normalizer": None if grad_normalizer is None else grad_normalizer.contiguous(),
        "outputs": output.contiguous(),
        "normalizers": normalizer.contiguous(),
        "bias_maxima": normalizer if bias_max is None else bias_max,
        "lowest": _LOWEST,
        "lost": lost,
    }
    wide = inputs.fitted(tuning.wide_tile(inputs.widest))
    of_keys = NO_BLOCKS if inputs.blocks is None else inputs.blocks.arguments(of_keys=True)
    # Weights are at most 1 here; derivatives have no bound, and float16 would not hold them.
    half = query.dtype == torch.float16
    radial = form != "exponential"
    narrow = {
        **inputs.narrow,
        "WIDE": False,
        "RADIAL": radial and (query.dtype == torch.float32 or query.shape[3] == 1),
        "stats": stats,
        "WEIGHT": _TYPES[query.dtype],
        "FACTOR": _FLOAT16_FACTOR if half else 1.0,
        "DS": _TYPES[torch.float32 if half else query.dtype],
    }
    widened = {
        **inputs.wide,
        "WIDE": True,
        "RADIAL": radial,
        "stats": wide_stats,
        "FACTOR": 1.0,
        "DS": tl.float32,
    }
    with on_device(inputs.device):
        inputs.find_bias_max(bias_max)
        # A gradient of the mask may be the small sum of many terms, which a rounded output would drown.
        exact = dmask is not None and query.dtype != torch.float32
        tile = inputs.tile("row")
        tiles = inputs.tiles(tile)
        _run(row_kernel, (tiles * inputs.programs,), tile, {**arguments, **narrow}, tiles=tiles, EXACT=exact)

        def query_key_value(sizes: tuple[Tile, Tile], given: dict[str, Any], run: Callable[..., None]) -> None:
            tiles = inputs.tiles(sizes[0])
            run(query_kernel, sizes[0], given, tiles=tiles, gradient=dq)
            tiles = ceil_div(inputs.longest_key, sizes[1].keys)
            run(key_value_kernel, sizes[1], {**given, **of_keys}, tiles=tiles, grad_key=dk, grad_value=dv)

        def bias(size: Tile, given: dict[str, Any]) -> None:
            if dmask is not None:
                b, h, m, n = dmask.shape
                grid = (b * h, ceil_div(m, size.rows), ceil_div(n, size.keys))
                _run(
                    bias_gradient_kernel, grid, size, given, gradient=dmask,
                    mask_batches=b, mask_heads=h, mask_queries=m, mask_keys=n,
                    heads=query.shape[1], batches=query.shape[0], ONE_ROW=m == 1, ONE_KEY=n == 1,
                )  # fmt: skip

        query_key_value((inputs.tile("query"), inputs.tile("key_value")), {**arguments, **narrow}, inputs.run)
        given = {**arguments, **widened, "stats": stats, "wide_stats": wide_stats}
        inputs.run_again(wide_kernel, wide, given, tiles=inputs.tiles(wide), BACKWARD=True)
        # After that, no row counts twice.
        bias(inputs.tile("bias_gradient"), {**arguments, **narrow})
        query_key_value((wide, wide), {**arguments, **widened}, inputs.run_again)
        bias(wide, {**arguments, **widened})
    return Gradients(dq, dk, dv, dmask)


class _Inputs:
    """The arguments that all kernels take."""

    def __init__(self, call: Call) -> None:
        query, key, value, attn_mask, visibility, scale, form, dropout_p, seeds, *_ = call
        self.device, self.dtype = query.device, query.dtype
        self.drops = seeds is not None
        self.capability = tuning.capability_of(query.device)
        self.few = _FEW * _processors(query.device)
        self.groups = query.shape[1] // key.shape[1]
        sequences, self.longest_query, self.longest_key = query.shape[0], query.shape[2], key.shape[2]
        if visibility.query_starts is not None:
            sequences = visibility.query_starts.numel() - 1
            self.longest_query = min(self.longest_query, visibility.longest_query)
            self.longest_key = min(self.longest_key, visibility.longest_key)
        self.programs = sequences * key.shape[1]
        self.widest = max(padded(query.shape[3]), padded(value.shape[3]))
        self.precision = precision_of(query)
        self.biased = attn_mask is not None and attn_mask.dtype != torch.bool
        # Slopes are read as a mask (B | 1, Hq, 1, 1). Without a mask, any pointer will do.
        kind, weights, strides = NO_MASK, query, (0, 0, 0, 0)
        if visibility.slopes is not None:
            kind, weights, strides = ALIBI, visibility.slopes, (*repeated_strides(visibility.slopes), 0, 0)
        elif attn_mask is not None:
            kind, strides = FLOAT if self.biased else BOOL, repeated_strides(attn_mask)
            weights = attn_mask if self.biased else attn_mask.view(torch.uint8)
        self.blocks = None if visibility.listed is None else Blocks(call)
        self.arguments: dict[str, Any] = {
            **shapes(query, key, value),
            **(NO_BLOCKS if self.blocks is None else self.blocks.arguments()),
            "query": query,
            "key": key,
            "value": value,
            "mask": weights,
            "query_starts": _contiguous(visibility.query_starts),
            "key_starts": _contiguous(visibility.key_starts),
            "key_lengths": _contiguous(visibility.key_lengths),
            **_dropout(dropout_p, seeds, query.shape[0]),
            "query_strides": query.stride(),
            "key_strides": key.stride(),
            "value_strides": value.stride(),
            "mask_strides": strides[:3],
            "mask_stride": strides[3],
            "scale": scale,
            "scale_exponent": 0,
            # No further than all there is, so that no place leaves 32 bits.
            "right": min(visibility.right or 0, self.longest_query + self.longest_key),
            "left": min(visibility.left or 0, self.longest_query + self.longest_key),
            "lower_right": int(visibility.lower_right),
            "CAUSAL": visibility.right is not None,
            "WINDOW": visibility.left is not None,
            "FORM": FORMS[form],
            "MASK": kind.value,
        }

        mantissa, exponent = math.frexp(scale)
        # Kernels that compute lost rows, and others, get other values of these arguments.
        self.narrow: dict[str, Any] = {"PRECISION": self.precision}
        if form == "expressive" and _SMALLEST_SCALE <= abs(scale) <= _LARGEST_SCALE:
            self.narrow |= {"scale": scale**-2, "FORM": RATIO.value}
        self.wide = {
            "scale": mantissa, "scale_exponent": exponent, "PRECISION": self.precision, "WEIGHT": tl.float32,
        }  # fmt: skip

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel. Dropout draws for at most 64 keys at once."""
        tile = tuning.choose(kernel, self.dtype, self.widest, self.capability)
        return self.fitted(tile._replace(keys=min(tile.keys, 64)) if self.drops else tile)

    def fitted(self, tile: Tile) -> Tile:
        """A tile that no block of the call ends inside of."""
        return tile if self.blocks is None else self.blocks.fitted(tile)

    def run(self, kernel: Any, tile: Tile, arguments: dict[str, Any], *, tiles: int, **more: Any) -> None:
        """Launch a program for each tile of each key head."""
        programs = tiles * self.programs
        _run(kernel, (programs,), tile, arguments, tiles=tiles, programs=programs, **more)

    def run_again(self, kernel: Any, tile: Tile, arguments: dict[str, Any], *, tiles: int, **more: Any) -> None:
        """Launch a few programs, which share the tiles of the key heads that have rows to compute once more."""
        programs = tiles * self.programs
        _run(kernel, (min(programs, self.few),), tile, arguments, tiles=tiles, programs=programs, **more)

    def tiles(self, tile: Tile) -> int:
        """How many tiles of rows the longest sequence has for each of its key heads."""
        return ceil_div(self.longest_query * self.groups, tile.rows)

    def find_bias_max(self, bias_max: Tensor | None) -> None:
        """Write the largest bias of each row, if there are biases."""
        if bias_max is not None and bias_max.numel():
            tile = Tile(16, 64, 4, 2)
            tiles = self.tiles(tile)
            _run(bias_max_kernel, (tiles * self.programs,), tile, self.arguments, tiles=tiles, bias_maxima=bias_max)


def precision_of(x: Tensor) -> str:
    """The precision of products of tiles of a tensor.

    Products of 16-bit numbers are exact in tf32. With "high", torch allows less than float32; three products of tf32
    lose nearly nothing and run on the tensor cores.
    """
    if torch.version.hip is not None:
        return "ieee"
    if x.dtype != torch.float32:
        return "tf32"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[float32_precision(x.device)]


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _dropout(dropout_p: float, seeds: Tensor | None, batch: int) -> dict[str, Any]:
    """The arguments of kernels for dropout: seeds and of how many batches each, 2^24 p, and 1 / (1 - p)."""
    share = 1 if seeds is None else max(1, batch // seeds.shape[0])
    grown = 1 / keep_share(dropout_p)
    return {"seeds": _contiguous(seeds), "share": share, "threshold": threshold(dropout_p), "grown": grown}


def _contiguous(numbers: Tensor | None) -> Tensor | None:
    return None if numbers is None else numbers.contiguous()


_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _run(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any], **more: Any) -> None:
    """Launch a kernel with those of the arguments that it takes."""
    given = {**arguments, **more, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    options = {} if INTERPRETED.value else {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel[grid](**{name: given[name] for name in kernel.arg_names if name in given}, **options)
