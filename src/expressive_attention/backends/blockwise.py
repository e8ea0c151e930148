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

from . import nonfinite
from .pattern import Pattern
from .problem import Problem, accumulation_dtype, empty_peak, row_peak

__all__ = ["backward", "forward", "supports", "takes"]

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


def supports(problem: Problem) -> str | None:
    """The reason why this backend declines `problem`; None: it does not."""
    if problem.dropout_p:
        return "dropout is not implemented"
    if problem.differentiated_by_func:
        return "torch.func and forward-mode derivatives are not implemented"
    return None


def takes(pattern: Pattern) -> bool:
    """Whether this backend knows all that a pattern asks for."""
    return pattern.is_diagonal()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    pattern: Pattern,
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalizer and peak, as `reference.forward`."""
    diagonal = pattern.diagonal(query, key)
    dtype = accumulation_dtype(query.dtype)
    inputs = (query, key, value, attn_mask)
    are_finite = nonfinite.are_finite(*inputs)
    if not are_finite:
        query, key, value, attn_mask = nonfinite.cleaned(*inputs)
    results = _forward(query, key, value, attn_mask, diagonal, scale, form, dtype)
    if _exceeds_float32(results[1], query, key, scale):
        results = _forward(query, key, value, attn_mask, diagonal, scale, form, torch.float64)
    output, normalizer, peak = results
    if not are_finite:
        nonfinite.spoil(output, normalizer, *inputs, diagonal)
    return output.to(query.dtype), normalizer.to(dtype), peak.to(dtype)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    form: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` in the arithmetic of `dtype`."""
    batch, heads, length, _ = query.shape
    output = query.new_zeros((batch, heads, length, value.shape[-1]), dtype=dtype)
    normalizer = query.new_zeros((batch, heads, length), dtype=dtype)
    peak = empty_peak(normalizer, attn_mask)

    q, k, v, mask = _grouped(query, key, value, attn_mask, dtype, scale)
    out, total = (x.unflatten(1, (k.shape[1], -1)) for x in (output, normalizer))
    for tile in _row_tiles(q, k.shape[-2]):
        q_tile = tile.rows(q)
        out_tile, total_tile = tile.rows_view(out), tile.rows_view(total.unsqueeze(-1))

        def add(bias_peak: Tensor | None, tile=tile, q_tile=q_tile, out_tile=out_tile, total_tile=total_tile) -> None:
            for columns in tile.key_ranges(k.shape[-2], diagonal):
                weight = _scores(q_tile, tile.keys(k, columns)).square_()
                if form == "expressive":
                    weight.div_(weight + 1.0)
                _apply_mask_(tile.grid(weight), _mask_factor(mask, tile, columns, bias_peak), tile, columns, diagonal)
                total_tile.add_(weight.sum(-1, keepdim=True))
                out_tile.baddbmm_(weight, tile.keys(v, columns))

        bias_peak = _tile_peak(mask, tile, diagonal)
        add(bias_peak)
        if mask is not None and bias_peak is not None:
            if _has_lost_rows(total_tile):
                bias_peak = _scored_peak(q_tile, k, mask, tile, diagonal)
                out_tile.zero_()
                total_tile.zero_()
                add(bias_peak)
            peak.unflatten(1, (k.shape[1], -1))[tile.index] = bias_peak.squeeze(-1)
    return output.div_(torch.where(normalizer == 0, 1.0, normalizer).unsqueeze(-1)), normalizer, peak


def backward(
    grad_output: Tensor,
    grad_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    normalizer: Tensor,
    pattern: Pattern,
    scale: float,
    form: str,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, where `mask_gradient`, of the float mask.

    With u_i = dO_i / N_i and g_ij = u_i . v_j - D_i + dN_i, where D_i = u_i . o_i = sum_j w_ij u_i . v_j / N_i:

        dv_j = sum_i w_ij u_i,   ds_ij = scale f'(z_ij) exp(bias_ij) g_ij,   dbias_ij = w_ij g_ij

    The part of dq along q is the remainder of terms that cancel, all but z^2 of them. It is computed without them, from
    z f'(z) = 2 f - 2 f^2 and sum_j w_ij (g_ij - dN_i) = 0:

        q_i . dq_i = 2 (dN_i N_i - sum_j w_ij f_ij g_ij)        (f_ij in the second term is 0 in the squared form)
    """
    diagonal = pattern.diagonal(query, key)
    rest = (diagonal, scale, form, mask_gradient)
    upstream = (grad_output, grad_normalizer)
    spoiled = ~(normalizer.isfinite() | (normalizer == torch.inf)) | ~output.isfinite().all(-1)
    spoiled |= ~grad_output.isfinite().all(-1)
    if grad_normalizer is not None:
        spoiled |= ~grad_normalizer.isfinite()
    if nonfinite.are_finite(query, key, value, attn_mask) and not spoiled.any():
        return _backward(*upstream, query, key, value, attn_mask, output, normalizer, *rest)
    # Such rows give nothing, and what takes part in them is made NaN in the end.
    if grad_normalizer is not None:
        grad_normalizer = grad_normalizer.masked_fill(spoiled, 0.0)
    of_rows = spoiled.unsqueeze(-1)
    gradients = _backward(
        grad_output.masked_fill(of_rows, 0.0),
        grad_normalizer,
        *nonfinite.cleaned(query, key, value, attn_mask),
        output.masked_fill(of_rows, 0.0),
        normalizer.masked_fill(spoiled, 0.0),
        *rest,
    )
    nonfinite.spoil_gradients(gradients, spoiled, attn_mask, diagonal)
    return gradients


def _backward(
    grad_output: Tensor,
    grad_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    normalizer: Tensor,
    diagonal: int | None,
    scale: float,
    form: str,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`backward` where all is finite."""
    dtype = torch.float64 if _exceeds_float32(normalizer, query, key, scale) else normalizer.dtype
    if dtype != query.dtype:
        # What was stored is rounded to 16 bits (the output) or may have left float32's range (the normalizer).
        output, normalizer, _ = _forward(query, key, value, attn_mask, diagonal, scale, form, dtype)
    total = torch.where(normalizer == 0, torch.inf, normalizer).unsqueeze(-1)
    upstream = grad_output.to(dtype) / total

    q, k, v, mask = _grouped(query, key, value, attn_mask, dtype, scale)
    kv_heads = k.shape[1]
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (query, key, value))
    dmask = torch.zeros_like(mask) if mask_gradient and mask is not None else None
    by_row = [x.unflatten(1, (kv_heads, -1)) for x in (upstream, total, output, dq)]
    dn = None if grad_normalizer is None else grad_normalizer.to(dtype).unsqueeze(-1).unflatten(1, (kv_heads, -1))
    for tile in _row_tiles(q, k.shape[-2]):
        q_tile = tile.rows(q)
        u, total_tile, o = (tile.rows(x) for x in by_row[:3])
        dq_tile = tile.rows_view(by_row[3])
        dn_tile = None if dn is None else tile.rows(dn)

        def products(columns: slice, bias_peak: Tensor | None, tile=tile, q_tile=q_tile, u=u) -> tuple[Tensor, ...]:
            """w, f'(z) exp(bias) / 2, u . v and f of a tile of keys; without f in the squared form."""
            z = _scores(q_tile, tile.keys(k, columns))
            # The operations of the forward pass, so that a weight over the sum of its row is the same number.
            weight, half_derivative, f = z * z, z, ()
            if form == "expressive":
                denominator = weight + 1.0
                weight.div_(denominator)
                half_derivative.div_(denominator).div_(denominator)
                f = (weight.clone(),)
            factor = _mask_factor(mask, tile, columns, bias_peak)
            for x in (weight, half_derivative):
                _apply_mask_(tile.grid(x), factor, tile, columns, diagonal)
            return weight, half_derivative, torch.bmm(u, tile.keys(v, columns).mT), *f

        ranges = list(tile.key_ranges(k.shape[-2], diagonal))
        bias_peak = _tile_peak(mask, tile, diagonal)
        known = {0: products(ranges[0], bias_peak)} if len(ranges) == 1 else {}
        if mask is not None and bias_peak is not None:
            # The peak of the forward pass.
            weights = ((known.get(i) or products(part, bias_peak))[0] for i, part in enumerate(ranges))
            if _has_lost_rows(sum((w.sum(-1, keepdim=True) for w in weights), torch.zeros_like(total_tile))):
                bias_peak = _scored_peak(q_tile, k, mask, tile, diagonal)
                known = {0: products(ranges[0], bias_peak)} if len(ranges) == 1 else {}
        some_rows_see_few = mask is not None or (diagonal is not None and tile.queries.start + diagonal < _TILE_KEYS)
        from_output = len(ranges) > 1 and not some_rows_see_few
        if from_output:
            mean = (u * o).sum(-1, keepdim=True)
        else:
            # A row may see one key only. Then w / N is 1 and g is 0, but only if D comes from the products that
            # it is subtracted from: f'(z) / N = 2 / z would magnify the smallest difference.
            mean = torch.zeros_like(total_tile)
            for i, columns in enumerate(ranges):
                weight, _, uv, *_ = known.get(i) or products(columns, bias_peak)
                mean += (weight / total_tile).mul_(uv).sum(-1, keepdim=True)
        shift = mean if dn_tile is None else mean - dn_tile

        along, small = torch.zeros_like(total_tile), torch.zeros_like(total_tile)
        for i, columns in enumerate(ranges):
            weight, half_derivative, uv, *f = known.get(i) or products(columns, bias_peak)
            tile.keys_view(dv, columns).baddbmm_(weight.mT, u)
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
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dbias


def _set_part_along_(dq: Tensor, q: Tensor, product: Tensor, where: Tensor) -> None:
    """Change each row of dq along q so that q . dq is `product`, where it says so."""
    size = q.abs().amax(-1, keepdim=True)
    size = torch.where(size == 0, 1.0, size)
    unit = q / size  # whose square neither overflows nor underflows
    square = unit.square().sum(-1, keepdim=True)
    change = (product / size - (unit * dq).sum(-1, keepdim=True)) / torch.where(square == 0, 1.0, square)
    dq.add_(unit * torch.where(where, change, 0.0))


def _exceeds_float32(normalizer: Tensor, query: Tensor, key: Tensor, scale: float) -> bool:
    """Whether squares of scores left float32's range, so that the problem needs float64 arithmetic."""
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


def _has_lost_rows(total: Tensor) -> bool:
    """Whether rows have less weight than the key at their peak has for any score but the smallest."""
    return bool((total <= _SAFE_NORMALIZER).any())


def _scores(q_tile: Tensor, k_tile: Tensor) -> Tensor:
    z = torch.bmm(q_tile, k_tile.mT)
    return z.clamp_(-_SATURATED, _SATURATED) if z.dtype == torch.float64 else z


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """scale * query as ``(B, Hkv, G, L, E)``, key and value, and the mask as ``(B | 1, Hkv | 1, G | 1, ...)``.

    A float mask comes back in `dtype`, a bool mask as it is.
    """
    q = (query.to(dtype) * scale).unflatten(1, (key.shape[1], -1))
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


def _tile_peak(mask: Tensor | None, tile: _Tile, diagonal: int | None) -> Tensor | None:
    """The peak of a float mask on the rows of the tile, ``(b | 1, h | 1, g | 1, l | 1, 1)``."""
    if mask is None or mask.dtype == torch.bool:
        return None
    return row_peak(tile.of_mask(mask, slice(None)), tile.query_range, diagonal)


def _scored_peak(q_tile: Tensor, k: Tensor, mask: Tensor, tile: _Tile, diagonal: int | None) -> Tensor:
    """The largest bias of the keys that each row of the tile sees and whose score is not 0, ``(b, h, g, l, 1)``."""
    peak = q_tile.new_full((*tile.shape, 1), -torch.inf)
    for columns in tile.key_ranges(k.shape[-2], diagonal):
        z = tile.grid(_scores(q_tile, tile.keys(k, columns)))
        if diagonal is not None:
            z.tril_(tile.queries.start + diagonal - columns.start)
        bias = torch.where(z == 0, -torch.inf, tile.of_mask(mask, columns))
        peak = torch.maximum(peak, bias.amax(-1, keepdim=True))
    return peak.masked_fill_(peak == -torch.inf, 0.0)


def _mask_factor(mask: Tensor | None, tile: _Tile, columns: slice, peak: Tensor | None) -> Tensor | None:
    """The factor of the weights of a tile of keys: ``exp(bias - peak)``, or a bool mask; None: there is none.

    A bias above the peak is that of a key that is hidden or has the score 0, and may be of any size.
    """
    if mask is None:
        return None
    part = tile.of_mask(mask, columns)
    return part if peak is None else (part - peak).clamp_(max=0.0).exp_()


def _apply_mask_(x: Tensor, factor: Tensor | None, tile: _Tile, columns: slice, diagonal: int | None) -> None:
    """Multiply x ``(b, h, g, l, s)`` by `factor`; set it to 0 where that is False or causality hides the key."""
    if factor is not None and factor.dtype == torch.bool:
        x.masked_fill_(~factor, 0.0)
    elif factor is not None:
        x.mul_(factor)
    if diagonal is not None and columns.stop - 1 > tile.queries.start + diagonal:
        x.tril_(tile.queries.start + diagonal - columns.start)
