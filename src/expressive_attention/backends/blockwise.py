"""Expressive attention in plain torch over tiles of queries and keys: memory linear in L and S.

The fallback on every device. Weights are bounded, so a tile of keys adds ``sum_j w_ij v_j`` and ``sum_j w_ij``
to its rows and is forgotten; nothing is rescaled. A tile is small enough to stay in a core's cache while the
elementwise passes go over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import (
    Call,
    Gradients,
    Result,
    Upstream,
    accumulation_dtype,
    differentiated_by_func,
    empty_bias_max,
)
from ..forms import weight_, weight_and_half_derivative_
from ..masks import row_bias_max
from . import dropout, nonfinite

__all__ = ["backward", "declines", "forward"]

# Scores in a tile and keys in a tile, found with benchmarks/operator.py.
_TILE = 1 << 18
_TILE_KEYS = 256
_TILE_ROWS = 512

# A finite float32 normalizer above this lost no weight that counts to underflow, and none to overflow.
_SAFE_NORMALIZER = 2.0**-80

# Beyond this |z|, f(z) is 1 and f'(z) is 0; z^2 is still finite in float64.
_SATURATED = 2.0**500

# Below this |z|, z^2 is finite in float32.
_SAFE_SCORE = 2.0**60


def declines(call: Call) -> str | None:
    """The reason why this backend declines the call; None: it does not."""
    if differentiated_by_func():
        return "torch.func and forward-mode derivatives are not implemented"
    if call.log_decay is not None or call.relative_bias is not None:
        return "decays and biases by distance must be in a mask"
    return None if call.visibility.is_diagonal() else "which keys a query sees must be in a mask"


def forward(call: Call) -> Result:
    """Output, normalizer and largest biases."""
    dtype = accumulation_dtype(call.query.dtype)
    finite = call if nonfinite.are_finite(call) else nonfinite.cleaned(call)
    result = _forward(finite, dtype)
    if _exceeds_float32(finite, result.normalizer):
        result = _forward(finite, torch.float64)
    if finite is not call:
        nonfinite.spoil(result, call)
    output, normalizer, bias_max = result
    return Result(output.to(call.query.dtype), normalizer.to(dtype), None if bias_max is None else bias_max.to(dtype))


def _forward(call: Call, dtype: torch.dtype) -> Result:
    """`forward` in the arithmetic of `dtype`."""
    query, value, diagonal, form = call.query, call.value, call.diagonal, call.form
    batch, heads, length, _ = query.shape
    output = query.new_zeros((batch, heads, length, value.shape[-1]), dtype=dtype)
    normalizer = query.new_zeros((batch, heads, length), dtype=dtype)
    bias_max = empty_bias_max(normalizer, call)

    q, k, v, mask = _grouped(call, dtype)
    out, total = (x.unflatten(1, (k.shape[1], -1)) for x in (output, normalizer))
    for tile in _row_tiles(q, k.shape[-2]):
        q_tile = tile.rows(q)
        out_tile, total_tile = tile.rows_view(out), tile.rows_view(total.unsqueeze(-1))

        def add(tile_max: Tensor | None, tile=tile, q_tile=q_tile, out_tile=out_tile, total_tile=total_tile) -> bool:
            """Add the sums of all keys. Return whether a key with the score 0 may have the largest bias of a row."""
            may_be_weightless = k.shape[-2] == 0  # a mask that is repeated for all keys has biases even so
            for columns in tile.key_ranges(k.shape[-2], diagonal):
                weight = weight_(_scores(q_tile, tile.keys(k, columns)).square_(), form)
                factor = _mask_factor(mask, tile, columns, tile_max)
                may_be_weightless = may_be_weightless or _has_weightless_maximum(tile.grid(weight), factor)
                _apply_mask_(tile.grid(weight), factor, tile, columns, diagonal)
                total_tile.add_(weight.sum(-1, keepdim=True))
                _drop_(weight, call, tile, columns)
                out_tile.baddbmm_(weight, tile.keys(v, columns))
            return may_be_weightless

        tile_max = _tile_bias_max(mask, tile, diagonal)
        may_be_weightless = add(tile_max)
        if mask is not None and tile_max is not None and bias_max is not None:
            if may_be_weightless:
                scored_max = _scored_bias_max(q_tile, k, mask, tile, diagonal)
                if not torch.equal(scored_max, tile_max.expand_as(scored_max)):
                    tile_max = scored_max
                    out_tile.zero_()
                    total_tile.zero_()
                    add(tile_max)
            bias_max.unflatten(1, (k.shape[1], -1))[tile.index] = tile_max.squeeze(-1)
    total = torch.where(normalizer == 0, 1.0, normalizer) * dropout.keep_share(call.dropout_p)
    return Result(output.div_(total.unsqueeze(-1)), normalizer, bias_max)


def backward(call: Call, result: Result, upstream: Upstream) -> Gradients:
    """Gradients of query, key, value and, if wanted, of the float mask.

    With u_i = dO_i / N_i and g_ij = u_i . v_j - D_i + dN_i, where D_i = u_i . o_i = sum_j w_ij u_i . v_j / N_i:

        dv_j = sum_i w_ij u_i,   ds_ij = scale f'(z_ij) exp(bias_ij) g_ij,   dbias_ij = w_ij g_ij

    The part of dq along q is the remainder of terms that cancel, all but z^2 of them. It is computed without them, from
    z f'(z) = 2 f - 2 f^2 and sum_j w_ij (g_ij - dN_i) = 0:

        q_i . dq_i = 2 (dN_i N_i - sum_j w_ij f_ij g_ij)        (f_ij in the second term is 0 in the squared form)
    """
    output, normalizer, _ = result
    do, dn, wants_mask, _ = upstream
    spoiled = ~(normalizer.isfinite() | (normalizer == torch.inf)) | ~output.isfinite().all(-1)
    spoiled |= ~do.isfinite().all(-1)
    if dn is not None:
        spoiled |= ~dn.isfinite()
    if nonfinite.are_finite(call) and not spoiled.any():
        return _backward(call, result, upstream)
    # Such rows give nothing, and what takes part in them is made NaN in the end.
    of_rows = spoiled.unsqueeze(-1)
    kept = Result(output.masked_fill(of_rows, 0.0), normalizer.masked_fill(spoiled, 0.0), None)
    dn = None if dn is None else dn.masked_fill(spoiled, 0.0)
    kept_upstream = Upstream(do.masked_fill(of_rows, 0.0), dn, wants_mask)
    gradients = _backward(nonfinite.cleaned(call), kept, kept_upstream)
    nonfinite.spoil_gradients(gradients, spoiled, call)
    return gradients


def _backward(call: Call, result: Result, upstream: Upstream) -> Gradients:
    """`backward` where all is finite."""
    query, key, value, attn_mask = call[:4]
    scale, form, diagonal = call.scale, call.form, call.diagonal
    output, normalizer, _ = result
    dtype = torch.float64 if _exceeds_float32(call, normalizer) else normalizer.dtype
    if dtype != query.dtype:
        # The stored output is rounded to 16 bits, and the stored normalizer may have left float32's range.
        output, normalizer, _ = _forward(call, dtype)
    total = torch.where(normalizer == 0, torch.inf, normalizer).unsqueeze(-1)
    keep = dropout.keep_share(call.dropout_p)
    do = upstream.output.to(dtype) / (total * keep)

    q, k, v, mask = _grouped(call, dtype)
    kv_heads = k.shape[1]
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (query, key, value))
    dmask = torch.zeros_like(mask) if upstream.wants_mask and mask is not None else None
    by_row = [x.unflatten(1, (kv_heads, -1)) for x in (do, total, output, dq)]
    dn = upstream.normalizer
    dn = None if dn is None else dn.to(dtype).unsqueeze(-1).unflatten(1, (kv_heads, -1))
    for tile in _row_tiles(q, k.shape[-2]):
        q_tile = tile.rows(q)
        u, total_tile, o = (tile.rows(x) for x in by_row[:3])
        dq_tile = tile.rows_view(by_row[3])
        dn_tile = None if dn is None else tile.rows(dn)

        def products(columns: slice, tile_max: Tensor | None, tile=tile, q_tile=q_tile, u=u) -> tuple[Tensor, ...]:
            """w, f'(z) exp(bias) / 2, u . v and f of a tile of keys; without f in the squared form."""
            # The bits of the forward pass, so that a weight over the sum of its row is the same number.
            weight, half_derivative = weight_and_half_derivative_(_scores(q_tile, tile.keys(k, columns)), form)
            f = (weight.clone(),) if form == "expressive" else ()
            factor = _mask_factor(mask, tile, columns, tile_max)
            for x in (weight, half_derivative):
                _apply_mask_(tile.grid(x), factor, tile, columns, diagonal)
            uv = torch.bmm(u, tile.keys(v, columns).mT)
            _drop_(uv, call, tile, columns)
            return weight, half_derivative, uv, *f

        ranges = list(tile.key_ranges(k.shape[-2], diagonal))
        tile_max = _tile_bias_max(mask, tile, diagonal)
        if mask is not None and tile_max is not None:
            scores = (tile.grid(_scores(q_tile, tile.keys(k, part))) for part in ranges)
            factors = (_mask_factor(mask, tile, part, tile_max) for part in ranges)
            if any(_has_weightless_maximum(z, factor) for z, factor in zip(scores, factors, strict=True)):
                tile_max = _scored_bias_max(q_tile, k, mask, tile, diagonal)
        known = {0: products(ranges[0], tile_max)} if len(ranges) == 1 else {}
        some_rows_see_few = mask is not None or (diagonal is not None and tile.queries.start + diagonal < _TILE_KEYS)
        from_output = len(ranges) > 1 and not some_rows_see_few
        if from_output:
            mean = (u * o).sum(-1, keepdim=True) * keep
        else:
            # A row may see one key only. Then w / N is 1 and g is 0, if D comes from the products that it is subtracted
            # from: f'(z) / N = 2 / z would magnify the smallest difference. Where few keys have nearly all of the
            # weight, g cancels likewise, and D from the output would make its rounding error two to three times as
            # large; no result would be wrong by more, as `decided` below makes g of a single key 0 either way.
            mean = torch.zeros_like(total_tile)
            for i, columns in enumerate(ranges):
                weight, _, uv, *_ = known.get(i) or products(columns, tile_max)
                mean += (weight / total_tile).mul_(uv).sum(-1, keepdim=True)
        shift = mean if dn_tile is None else mean - dn_tile

        along, small = torch.zeros_like(total_tile), torch.zeros_like(total_tile)
        for i, columns in enumerate(ranges):
            weight, half_derivative, uv, *f = known.get(i) or products(columns, tile_max)
            kept = weight.clone() if call.dropout_p else weight
            _drop_(kept, call, tile, columns)
            tile.keys_view(dv, columns).baddbmm_(kept.mT, u)
            g = uv.sub_(shift)
            if from_output:  # the same of a row in which one key has all the weight
                decided = weight == total_tile
                g = g.masked_fill_(decided, 0.0) if dn_tile is None else torch.where(decided, dn_tile, g)
            if f:
                wf = f[0].mul_(weight)
                small += wf.sum(-1, keepdim=True)
                along -= wf.mul_(g).sum(-1, keepdim=True)
            if dmask is not None:
                part = tile.of_mask(dmask, columns)
                part.add_(tile.grid(weight.mul_(g)).sum_to_size(part.shape))
            ds = half_derivative.mul_(g)
            dq_tile.baddbmm_(ds, tile.keys(k, columns))
            tile.keys_view(dk, columns).baddbmm_(ds.mT, q_tile)  # q_tile carries the scale
        if dn_tile is not None:
            along += dn_tile * total_tile.masked_fill(total_tile == torch.inf, 0.0)
        # Where the mean of f is not small, it is this sum that cancels.
        _set_part_along_(dq_tile, q_tile, along, small < 0.5 * total_tile)
    dq.mul_(2.0 * scale)
    dk.mul_(2.0)
    dbias = None
    if dmask is not None and attn_mask is not None:
        dbias = dmask.flatten(1, 2).reshape(attn_mask.shape).to(attn_mask.dtype)
    return Gradients(dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dbias)


def _set_part_along_(dq: Tensor, q: Tensor, product: Tensor, where: Tensor) -> None:
    """Change each row of dq along q so that q . dq is `product`, where it says so."""
    size = q.abs().amax(-1, keepdim=True)
    size = torch.where(size == 0, 1.0, size)
    unit = q / size  # whose square neither overflows nor underflows
    square = unit.square().sum(-1, keepdim=True)
    change = (product / size - (unit * dq).sum(-1, keepdim=True)) / torch.where(square == 0, 1.0, square)
    dq.add_(unit * torch.where(where, change, 0.0))


def _exceeds_float32(call: Call, normalizer: Tensor) -> bool:
    """Whether squares of scores left float32's range, so that the problem needs float64 arithmetic."""
    query, key, scale = call.query, call.key, call.scale
    if query.dtype == torch.float64 or normalizer.numel() == 0 or key.numel() == 0:
        return False
    largest_key = max(abs(end.item()) for end in torch.aminmax(key)) * abs(scale)
    largest_query = max(abs(end.item()) for end in torch.aminmax(query))
    if largest_query * largest_key * query.shape[-1] > _SAFE_SCORE:
        return True
    smallest, largest = (x.item() for x in torch.aminmax(normalizer))
    if smallest > _SAFE_NORMALIZER and largest < torch.inf:
        return False
    # A normalizer of 0 is exact where a row sees no key or its scores are 0, not where they are tiny.
    size = query.abs().amax(-1).to(torch.float64) * largest_key
    tiny = (size > 0) & (size < _SAFE_NORMALIZER**0.5)
    lost = ~normalizer.isfinite() | ((normalizer <= _SAFE_NORMALIZER) & ((normalizer > 0) | tiny))
    return bool(lost.any())


def _has_weightless_maximum(x: Tensor, factor: Tensor | None) -> bool:
    """Whether the largest bias of a row may be that of a key with no weight, as of `_scored_bias_max`.

    Beside such a bias, the others lose digits: ``bias - bias_max`` is rounded.

    Args:
        x: Scores, or f of them, ``(b, h, g, l, s)``.
        factor: As of `_mask_factor`.
    """
    if factor is None or factor.dtype == torch.bool or bool(x.all()):
        return False
    return bool(((x == 0) & (factor == 1.0)).any())


def _scores(q_tile: Tensor, k_tile: Tensor) -> Tensor:
    z = torch.bmm(q_tile, k_tile.mT)
    return z.clamp_(-_SATURATED, _SATURATED) if z.dtype == torch.float64 else z


def _grouped(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """scale * query as ``(B, Hkv, G, L, E)``, key and value, and the mask as ``(B | 1, Hkv | 1, G | 1, ...)``.

    A float mask comes back in `dtype`, a bool mask as it is.
    """
    query, key, value, attn_mask = call[:4]
    q = (query.to(dtype) * call.scale).unflatten(1, (key.shape[1], -1))
    if attn_mask is None:
        return q, key.to(dtype), value.to(dtype), None
    mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(dtype)
    mask = mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (key.shape[1], -1))
    return q, key.to(dtype), value.to(dtype), mask


@dataclass(frozen=True)
class _Tile:
    """A range of each of the dimensions (B, Hkv, G, L): contiguous rows of a contiguous tensor.

    Only the first of the dimensions that are longer than one is cut; the others are whole.
    """

    batch: slice
    heads: slice
    groups: slice
    queries: slice
    shape: tuple[int, int, int, int]

    @property
    def index(self) -> tuple[slice, slice, slice, slice]:
        return self.batch, self.heads, self.groups, self.queries

    @property
    def query_range(self) -> range:
        return range(self.queries.start, self.queries.stop)

    def rows(self, x: Tensor) -> Tensor:
        """The rows of x ``(B, Hkv, G, L, D)`` as ``(b h, g l, D)``."""
        b, h, g, rows = self.shape
        return x[self.index].reshape(b * h, g * rows, x.shape[-1])

    def rows_view(self, x: Tensor) -> Tensor:
        """`rows` of a contiguous x, to be written to."""
        b, h, g, rows = self.shape
        return x[self.index].view(b * h, g * rows, x.shape[-1])

    def keys(self, x: Tensor, columns: slice) -> Tensor:
        """The rows `columns` of x ``(B, Hkv, S, D)`` as ``(b h, s, D)``."""
        return x[self.batch, self.heads, columns].flatten(0, 1)

    def keys_view(self, x: Tensor, columns: slice) -> Tensor:
        """`keys` of a contiguous x, to be written to."""
        b, h, _, _ = self.shape
        return x[self.batch, self.heads, columns].view(b * h, columns.stop - columns.start, x.shape[-1])

    def grid(self, x: Tensor) -> Tensor:
        """x ``(b h, g l, s)`` as ``(b, h, g, l, s)``."""
        return x.view(*self.shape, x.shape[-1])

    def of_mask(self, mask: Tensor, columns: slice) -> Tensor:
        """The part of the mask ``(B | 1, Hkv | 1, G | 1, L | 1, S | 1)`` that lies on this tile."""
        whole = slice(None)
        index = (*self.index, columns)
        return mask[tuple(whole if size == 1 else part for size, part in zip(mask.shape, index, strict=True))]

    def key_ranges(self, keys: int, diagonal: int | None) -> Iterator[slice]:
        """The ranges of keys that some row of the tile sees."""
        if diagonal is not None:
            keys = max(0, min(keys, self.queries.stop + diagonal))
        for start in range(0, keys, _TILE_KEYS):
            yield slice(start, min(start + _TILE_KEYS, keys))


def _row_tiles(q: Tensor, keys: int) -> Iterator[_Tile]:
    """Tiles that cover the rows of q ``(B, Hkv, G, L, E)``, so that a tile has about `_TILE` scores."""
    sizes = q.shape[:4]
    capacity = max(1, _TILE // max(1, min(keys, _TILE_KEYS)))
    steps = [1, 1, 1, max(1, min(sizes[3], capacity, _TILE_ROWS))]
    for i in (2, 1, 0):
        if steps[i + 1] < sizes[i + 1]:
            break
        capacity //= max(1, sizes[i + 1])
        steps[i] = max(1, min(sizes[i], capacity))

    def cut(i: int) -> Iterator[slice]:
        return (slice(start, min(start + steps[i], sizes[i])) for start in range(0, sizes[i], steps[i]))

    for batch in cut(0):
        for heads in cut(1):
            for groups in cut(2):
                for queries in cut(3):
                    index = (batch, heads, groups, queries)
                    yield _Tile(*index, tuple(part.stop - part.start for part in index))


def _tile_bias_max(mask: Tensor | None, tile: _Tile, diagonal: int | None) -> Tensor | None:
    """The largest bias that each row of the tile sees, ``(b | 1, h | 1, g | 1, l | 1, 1)``."""
    if mask is None or mask.dtype == torch.bool:
        return None
    return row_bias_max(tile.of_mask(mask, slice(None)), tile.query_range, diagonal)


def _scored_bias_max(q_tile: Tensor, k: Tensor, mask: Tensor, tile: _Tile, diagonal: int | None) -> Tensor:
    """The largest bias of the keys that each row of the tile sees and whose score is not 0, ``(b, h, g, l, 1)``."""
    largest = q_tile.new_full((*tile.shape, 1), -torch.inf)
    for columns in tile.key_ranges(k.shape[-2], diagonal):
        z = tile.grid(_scores(q_tile, tile.keys(k, columns)))
        if diagonal is not None:
            z.tril_(tile.queries.start + diagonal - columns.start)
        bias = torch.where(z == 0, -torch.inf, tile.of_mask(mask, columns))
        largest = torch.maximum(largest, bias.amax(-1, keepdim=True))
    return largest.masked_fill_(largest == -torch.inf, 0.0)


def _drop_(x: Tensor, call: Call, tile: _Tile, columns: slice) -> None:
    """Set x ``(b h, g l, s)`` to 0 where dropout drops the weight."""
    if not call.dropout_p:
        return
    batch, kv_heads, groups, rows, keys = (
        torch.arange(part.start, part.stop, device=x.device) for part in (*tile.index, columns)
    )
    heads = kv_heads.unsqueeze(-1) * (call.query.shape[1] // call.key.shape[1]) + groups
    x.masked_fill_(~dropout.kept(call, batch, heads.flatten(), rows, keys).reshape(x.shape), 0.0)


def _mask_factor(mask: Tensor | None, tile: _Tile, columns: slice, tile_max: Tensor | None) -> Tensor | None:
    """The factor of the weights of a tile of keys: ``exp(bias - bias_max)``, or a bool mask; None: there is none.

    A bias above that is one of a key that is hidden or has the score 0, and may be of any size.
    """
    if mask is None:
        return None
    part = tile.of_mask(mask, columns)
    return part if tile_max is None else (part - tile_max).clamp_(max=0.0).exp_()


def _apply_mask_(x: Tensor, factor: Tensor | None, tile: _Tile, columns: slice, diagonal: int | None) -> None:
    """Multiply x ``(b, h, g, l, s)`` by `factor`; set it to 0 where that is False or causality hides the key."""
    if factor is not None and factor.dtype == torch.bool:
        x.masked_fill_(~factor, 0.0)
    elif factor is not None:
        x.mul_(factor)
    if diagonal is not None and columns.stop - 1 > tile.queries.start + diagonal:
        x.tril_(tile.queries.start + diagonal - columns.start)
