"""Sparse attention with a certificate: blocks of keys are left out where a bound proves that they do not count.

Weights have no maximum to be divided by, so they add up, and f(z) <= z^2 bounds the n keys of a block by one quadratic
form. With Q = scale^2 q^T (sum_j k_j k_j^T) q and m = scale^2 |q|^2 max_j |k_j|^2 (Gros, arXiv 2407.18601, has f):

    Q / (1 + min(Q, m))  <=  sum_j f(z_j)  <=  n Q / (n + Q)  <=  min(n, Q)      of the form "expressive"
    Q                     =  sum_j z_j^2                                        of the form "squared"

The upper bound is Jensen's inequality: z^2 / (1 + z^2) is concave in z^2. The least that a row has to keep follows from
the bounds of what is left out, U, and from exact sums W of what is kept: the share left out is at most U / (W + U).

Attention without a share of at most t of the weights differs from attention with them by at most ``2 t max |v|``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .blocks import HIDDEN, WHOLE
from .call import float32_precision
from .checks import ALIGNMENTS, check_dense, check_lengths
from .forms import check_form, weight

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BLOCK_SIZE", "Moments", "Seen", "Selection", "check_tolerance", "choose_blocks", "moments", "select"]

BLOCK_SIZE = (128, 128)

# Relative errors of sums of non-negative terms in float64, of norms and of what follows from them, are far below.
_SLACK = 1e-9

# The least upper bound of a block: below it, numbers of float64 are not exact.
_LEAST = 1e-290


@dataclass(frozen=True)
class Selection:
    """Blocks of keys for blocks of queries, and the proof that the others do not count.

    Attributes:
        block_mask: For `expressive_attention(block_mask=)` and for FlexAttention. It has the causality and the
            `key_lengths` of `select` in it.
        bound: The weight that is left out is at most this share of the whole, ``(B, Hq, L)`` of float64.
        kept: Share of the blocks that are kept, among those with a key that one of the queries sees.
    """

    block_mask: BlockMask
    bound: Tensor
    kept: float


@dataclass(frozen=True)
class Moments:
    """The sum of k k^T over each block of keys, as `moments` makes it.

    Attributes:
        matrices: ``(B, Hkv, blocks, E, E)``, of keys over `sizes`.
        traces: The traces of the matrices, ``(B, Hkv, blocks)`` of float64.
        sizes: The largest norm of a key of each block, ``(B, Hkv, blocks)`` of float64; NaN or infinite where keys are.
        block_keys: Keys of a block.
        keys: S, of which the last block may have fewer.
    """

    matrices: Tensor
    traces: Tensor
    sizes: Tensor
    block_keys: int
    keys: int

    def update(self, key: Tensor) -> Moments:
        """The moments of a cache that has grown: those of whole blocks are kept.

        Args:
            key: ``(B, Hkv, S, E)``, of which the first are as they were.

        Raises:
            ValueError: It has fewer keys than before, or other dimensions.
        """
        batch, heads, _, dim, _ = self.matrices.shape
        if key.ndim != 4 or key.shape[:2] != (batch, heads) or key.shape[3] != dim or key.shape[2] < self.keys:
            raise ValueError(
                f"key must be ({batch}, {heads}, S, {dim}) with S of at least {self.keys}, got {tuple(key.shape)}"
            )
        whole = self.keys // self.block_keys
        new = moments(key[:, :, whole * self.block_keys :], self.block_keys)
        return Moments(
            torch.cat([self.matrices[:, :, :whole], new.matrices], 2),
            torch.cat([self.traces[:, :, :whole], new.traces], 2),
            torch.cat([self.sizes[:, :, :whole], new.sizes], 2),
            self.block_keys,
            key.shape[2],
        )


def moments(key: Tensor, block_keys: int = BLOCK_SIZE[1], *, key_lengths: Tensor | None = None) -> Moments:
    """The sums of k k^T over blocks of keys, which `select` needs: a cache that is asked many times has them once.

    Args:
        key: ``(B, Hkv, S, E)``, floating.
        block_keys: Keys of a block.
        key_lengths: How many of the keys of each sequence exist, ``(B,)``; None: all.

    Raises:
        ValueError: A shape or number does not fit.

    Example:
        >>> q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1000, 16)
        >>> of_keys = moments(k)  # once, for all queries of a cache
        >>> bool((select(q, k, tolerance=0.01, moments=of_keys).bound <= 0.01).all())
        True
    """
    if key.ndim != 4:
        raise ValueError(f"key must be (B, Hkv, S, E), got shape {tuple(key.shape)}")
    if not isinstance(block_keys, int) or block_keys < 1:
        raise ValueError(f"block_keys must be a positive int, got {block_keys!r}")
    keys = key.shape[2]
    key = key.detach()
    if key_lengths is not None:
        exists = torch.arange(keys, device=key.device) < key_lengths.view(-1, 1)
        key = torch.where(exists[:, None, :, None], key, 0.0)
    key = torch.nn.functional.pad(key, (0, 0, 0, -keys % block_keys))
    parts: list[tuple[Tensor, ...]] = []
    for some in key.unflatten(2, (-1, block_keys)).split(_BLOCKS_AT_A_TIME, 2):
        part = some.double()
        size = _norms(part).amax(-1)
        part = part / torch.where(size > 0, size, 1.0)[..., None, None]
        part = part.nan_to_num(0.0, 0.0, 0.0)  # of which the size tells
        parts.append(((part.mT @ part).to(_dtype(key.device)), part.square().sum((-2, -1)), size))
    if not parts:
        shape = (*key.shape[:2], 0)
        empty = key.new_empty((*shape, key.shape[3], key.shape[3]), dtype=_dtype(key.device))
        parts = [(empty, *2 * [key.new_empty(shape).double()])]
    matrices, traces, sizes = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return Moments(matrices, traces, sizes, block_keys, keys)


def select(
    query: Tensor,
    key: Tensor,
    *,
    tolerance: float,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    scale: float | None = None,
    form: str = "expressive",
    key_lengths: Tensor | None = None,
    enable_gqa: bool = False,
    block_size: int | tuple[int, int] = BLOCK_SIZE,
    moments: Moments | None = None,
) -> Selection:
    """Choose the blocks of keys that attention has to read, if it may leave out a share of the weights.

    The blocks of a block of queries are taken in the order of their bounds, until for each of the queries the weight of
    the others is proved to be at most `tolerance` of the whole. Where that may save more than a tenth of them, the
    weights of what is taken are added up. Blocks with NaN or infinities are always taken.

    Args:
        query: ``(B, Hq, L, E)``, floating.
        key: ``(B, Hkv, S, E)``, likewise.
        tolerance: The largest share of the weights of a row that may be left out, in (0, 1).
        is_causal: As `expressive_attention` has it, as the next five.
        causal_alignment: ``"upper_left"`` or ``"lower_right"``.
        scale: ``1 / sqrt(E)`` if None.
        form: ``"expressive"`` or ``"squared"``.
        key_lengths: How many of the keys of each sequence exist, broadcastable to ``(B,)``.
        enable_gqa: Let Hq be a multiple of Hkv.
        block_size: Queries and keys of a block, or one number for both. Few queries in a block share few blocks of
            keys; the bound of few keys is closer to the truth, but more of it has to be computed.
        moments: The moments of `key`, by `sparse.moments` with the `key_lengths` of this call and the keys of
            `block_size`; None: they are computed, which takes longer than to attend to the keys with a few queries.

    Returns:
        The blocks, with the bound of each row.

    Raises:
        TypeError: An argument is not of the type above.
        ValueError: A shape or number does not fit; the message names the argument.
        NotImplementedError: Within torch.compile, as the choice depends on numbers.

    Example:
        >>> query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 4096, 16) / 1000
        >>> key[:, :, 1234] = 8 * query[:, :, 0]
        >>> found = select(query, key, tolerance=0.01)
        >>> found.kept < 0.1, bool((found.bound <= 0.01).all())
        (True, True)
    """
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        check_dense(name, x)
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"{name} must be (B, H, L, E) and floating, got shape {tuple(x.shape)} of {x.dtype}")
    check_tolerance(tolerance)
    check_form(form)
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {ALIGNMENTS}, got {causal_alignment!r}")
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"key must be ({batch}, Hkv, S, {dim}) as query {tuple(query.shape)}, got {tuple(key.shape)}")
    if heads != kv_heads and (not enable_gqa or heads % max(1, kv_heads)):
        raise ValueError(
            f"query must have the {kv_heads} heads of key, or a multiple of them with enable_gqa=True, got {heads}"
        )
    block = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise ValueError(f"block_size must be a positive int or two of them, got {block_size!r}")
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, query, keys)
        key_lengths = key_lengths.expand(batch)
    if moments is not None and (
        (moments.block_keys, moments.keys) != (block[1], keys)
        or moments.matrices.shape[:2] != (batch, kv_heads)
        or moments.matrices.shape[-1] != dim
    ):
        raise ValueError(
            f"moments must be of {keys} keys in blocks of {block[1]}, ({batch}, {kv_heads}, S, {dim}), got "
            f"{moments.keys} in blocks of {moments.block_keys}, {tuple(moments.matrices.shape)}"
        )
    scale = 1 / math.sqrt(dim) if scale is None else scale
    lower_right = causal_alignment == "lower_right"
    seen = Seen(rows, keys, is_causal, lower_right, key_lengths, scale, form)
    chosen = choose_blocks(query, key, seen, tolerance, block, moments)
    return Selection(_block_mask(chosen, seen, block, query.device), chosen.bound, chosen.kept)


class Seen(NamedTuple):
    """Which keys the queries see, and what makes weights of their scores."""

    rows: int
    keys: int
    is_causal: bool
    lower_right: bool
    key_lengths: Tensor | None
    scale: float
    form: str

    def counts(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many keys each query sees, which are the first ones, ``(B | 1, L)``; how many exist, ``(B | 1, 1)``."""
        exist = torch.tensor([[self.keys]], device=device) if self.key_lengths is None else self.key_lengths.view(-1, 1)
        exist = exist.to(device, torch.int64)
        place = torch.arange(self.rows, device=device).view(1, -1)
        if not self.is_causal:
            return exist.expand(-1, self.rows), exist
        place = place + (exist - self.rows if self.lower_right else 0)
        return (place + 1).clamp(min=0).minimum(exist), exist


class Chosen(NamedTuple):
    """Blocks that are kept.

    Attributes:
        listed: ``(B, Hq, blocks of queries, blocks of keys)`` of int32, as in `blocks`, all kept ones as seen.
        bound: ``(B, Hq, L)``.
        kept: Their share of those that are seen.
    """

    listed: Tensor
    bound: Tensor
    kept: float


def check_tolerance(tolerance: float) -> None:
    """Raise TypeError or ValueError if it is no share of weights, or if torch.compile traces the call."""
    if not isinstance(tolerance, float):
        raise TypeError(f"tolerance must be a float, got {type(tolerance).__name__}")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "tolerance is not implemented within torch.compile, as the blocks depend on numbers; call "
            "expressive_attention.sparse.select outside of it, and give its block_mask"
        )


@torch.no_grad()
def choose_blocks(
    query: Tensor,
    key: Tensor,
    seen: Seen,
    tolerance: float,
    block_size: tuple[int, int],
    of_keys: Moments | None = None,
) -> Chosen:
    """The blocks that `select` finds, for arguments that fit."""
    batch, heads, rows, _ = query.shape
    of_keys = moments(key, block_size[1], key_lengths=seen.key_lengths) if of_keys is None else of_keys
    blocks = of_keys.sizes.shape[2]
    bound = query.new_zeros(query.shape[:3], dtype=torch.float64)
    listed = torch.full(
        (batch, heads, -(-rows // block_size[0]), blocks), HIDDEN, dtype=torch.int32, device=query.device
    )
    counts, exist = seen.counts(query.device)
    kept = possible = 0
    if blocks and batch and heads:
        for i, some in enumerate(query.split(block_size[0], 2)):
            at = slice(i * block_size[0], i * block_size[0] + some.shape[2])
            rows_of = _Rows(some, key, of_keys, counts[:, at], exist, seen.scale, seen.form)
            keep, bound[:, :, at] = rows_of.choose(tolerance)
            listed[:, :, i] = torch.where(keep, WHOLE, HIDDEN).to(torch.int32)
            kept += int(keep.sum())
            possible += int(rows_of.visible.any(2).expand(batch, heads, blocks).sum())
    return Chosen(listed, bound, kept / max(1, possible))


class _Rows:
    """A block of queries, and what is known of their weights on each block of keys.

    All weights are over m^2, with m a number for each query of the size of its largest score, at most 1 for the form
    "expressive", so that squares of small scores do not underflow. Arrays are ``(B, Hq, R, blocks)``.
    """

    def __init__(
        self, query: Tensor, key: Tensor, of_keys: Moments, counts: Tensor, exist: Tensor, scale: float, form: str
    ) -> None:
        self.form, self.scale, self.key, self.block_keys = form, scale, key, of_keys.block_keys
        heads, dim = query.shape[1], query.shape[3]
        blocks = of_keys.sizes.shape[2]
        self.groups = heads // key.shape[1]
        self.query = query.detach().double()
        self.counts = counts[:, None, :, None]
        first = torch.arange(blocks, device=query.device) * self.block_keys
        self.visible = first < self.counts
        whole = (first + self.block_keys).minimum(exist[:, None, :, None]) <= self.counts

        size = _norms(self.query)
        forms, trace = self._quadratic_forms(of_keys, size)
        of_blocks = of_keys.sizes.repeat_interleave(self.groups, 1).unsqueeze(2)
        amplitude = abs(scale) * size.unsqueeze(-1) * of_blocks  # no score is larger
        seen_amplitude = torch.where(self.visible, amplitude.nan_to_num(torch.inf), 0.0)
        self.unit = seen_amplitude.amax(-1, keepdim=True)
        if form == "expressive":
            self.unit = self.unit.clamp(max=1.0)
        # Rows whose weights are all 0 need no block, and those of which nothing is known need all.
        self.weightless = (
            (size == 0).unsqueeze(-1) | ~self.visible.any(-1, keepdim=True) | (of_blocks == 0).all(-1, True)
        )
        unknown = ~(size < torch.inf).unsqueeze(-1) | ~(self.unit > 0) | ~(self.unit < torch.inf)
        self.forced = ((unknown & ~self.weightless) | ~(of_blocks < torch.inf)) & self.visible

        self.amplitude = amplitude / self.unit
        margin = (2 * dim + 16) * torch.finfo(of_keys.matrices.dtype).eps * trace
        square = self.amplitude.square() * (1 + _SLACK)
        upper = square * (forms + margin) + _LEAST
        lower = self.amplitude.square() * (1 - _SLACK) * (forms - margin).clamp(min=0.0)
        if form == "expressive":
            largest = self.unit.square() * upper.minimum(square)  # of z^2
            lower = lower / (1 + largest * (1 + _SLACK))
            number = (self.counts - first).clamp(1, self.block_keys)
            upper = 1 / (self.unit.square() / number + 1 / upper)
        counting = self.visible & ~self.weightless
        self.upper = torch.where(counting, upper.nan_to_num(torch.inf, torch.inf) * (1 + _SLACK), 0.0)
        self.upper.masked_fill_(self.forced, torch.inf)
        self.lower = torch.where(counting & whole & ~self.forced, lower.nan_to_num(0.0, 0.0) * (1 - _SLACK), 0.0)

    def _quadratic_forms(self, of_keys: Moments, size: Tensor) -> tuple[Tensor, Tensor]:
        """q^T M q of unit vectors q and the matrices M of blocks, and the traces of these."""
        matrices = of_keys.matrices
        batch, kv_heads, blocks, dim, _ = matrices.shape
        unit = (self.query / torch.where(size > 0, size, 1.0).unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0)
        unit = unit.to(matrices.dtype).reshape(batch, kv_heads, -1, dim)
        products = matrices.reshape(batch, kv_heads, blocks * dim, dim) @ unit.mT
        products = products.unflatten(2, (blocks, dim))
        # As a product of matrices, if it is one: sums of few adjacent numbers are slow.
        of_one = unit.shape[2] == 1
        forms = products.squeeze(-1) @ unit.mT if of_one else (products * unit.mT.unsqueeze(2)).sum(3)
        forms = forms.double().mT.reshape(*self.query.shape[:3], blocks)
        return forms, of_keys.traces.repeat_interleave(self.groups, 1).unsqueeze(2)

    def choose(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """The blocks that are kept, ``(B, Hq, blocks)``, and the bound of the share left out, ``(B, Hq, R)``."""
        ratio = tolerance / (1 - tolerance) * (1 - _SLACK)
        total = self.lower.sum(-1, keepdim=True)
        importance = torch.where(self.upper > 0, self.upper / total.clamp(min=_LEAST), 0.0).amax(2)
        order = importance.argsort(dim=-1, descending=True, stable=True)
        sorted_order = order.unsqueeze(2).expand(*self.upper.shape)
        upper, lower = (x.gather(-1, sorted_order) for x in (self.upper, self.lower))
        # The weight that is left out if the first 0, 1, ... blocks are kept.
        left = torch.nn.functional.pad(upper.flip(-1).cumsum(-1).flip(-1), (0, 1))
        best = _from_first(lower)
        enough = _first(left, best, ratio)
        least = _first(left, _from_first(upper), ratio)
        for start, end in _doubling(int(enough.amax())):
            if not bool((least < _WORTH * enough).any()):
                break
            exact = self._sums(order[..., start:end]) - self._rounding(sorted_order[..., start:end])
            lower[..., start:end] = lower[..., start:end].maximum(exact.clamp(min=0.0))
            best = _from_first(lower)
            known = _first(left, best, ratio)
            enough = enough.minimum(known)
            least = torch.where(enough <= end, enough, least)  # it is exact up to there
        keep = torch.zeros_like(importance, dtype=torch.bool)
        keep.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device) < enough.unsqueeze(-1))
        chosen = enough[..., None, None].expand(*self.upper.shape[:3], 1)
        out, inside = left.gather(-1, chosen).squeeze(-1), best.gather(-1, chosen).squeeze(-1)
        return keep, torch.where(out > 0, out / (inside + out) * (1 + _SLACK), 0.0)

    def _sums(self, order: Tensor) -> Tensor:
        """The weights of these blocks of keys ``(B, Hq, n)`` added up, ``(B, Hq, R, n)``; 0 where one is NaN."""
        batch, heads, number = order.shape
        at = order.unsqueeze(-1) * self.block_keys + torch.arange(self.block_keys, device=order.device)
        head = torch.arange(heads, device=order.device).view(1, -1, 1, 1) // self.groups
        sequence = torch.arange(batch, device=order.device).view(-1, 1, 1, 1)
        some = self.key.detach()[sequence, head, at.clamp(max=self.key.shape[2] - 1)].double()
        z = self.scale * (self.query @ some.flatten(2, 3).mT)
        weights = weight(z.square(), self.form, (z / self.unit).square()).unflatten(-1, (number, self.block_keys))
        is_seen = at.unsqueeze(2) < self.counts.unsqueeze(-1)
        return torch.where(is_seen, weights, 0.0).sum(-1).nan_to_num(0.0, 0.0)

    def _rounding(self, order: Tensor) -> Tensor:
        """At most by how much rounded scores change the sums of these blocks: f' is at most 2 z, and at most 1."""
        amplitude = self.amplitude.gather(-1, order)
        change = amplitude.square()
        if self.form == "expressive":
            change = change.minimum(amplitude / self.unit)
        return (self.block_keys * (self.query.shape[-1] + 16) * 2.0**-51 * change).nan_to_num(torch.inf, torch.inf)


def _from_first(x: Tensor) -> Tensor:
    """The sums of the first 0, 1, ... numbers."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _first(left: Tensor, inside: Tensor, ratio: float) -> Tensor:
    """The fewest blocks, as the first of their order, that are enough for all queries, ``(B, Hq)``."""
    return (left <= ratio * inside).all(2).int().argmax(-1)


def _doubling(end: int) -> Iterator[tuple[int, int]]:
    """Ranges up to `end` of which each is as long as all before it."""
    start, size = 0, 1
    while start < end:
        yield start, min(start + size, end)
        start, size = start + size, start + size


def _norms(x: Tensor) -> Tensor:
    """The norms of vectors, whose squares may underflow or overflow; NaN or infinite where a number is."""
    largest = x.abs().amax(-1)
    return largest * (x / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)).square().sum(-1).sqrt()


# Exact sums are computed where they may leave no more than this share of the blocks that bounds alone would keep.
_WORTH = 0.9

_BLOCKS_AT_A_TIME = 64  # are copied as float64


def _dtype(device: torch.device) -> torch.dtype:
    """The dtype of the matrices: float32, unless products of float32 may be rounded to fewer digits."""
    return torch.float32 if float32_precision(device) == "highest" else torch.float64


def _block_mask(chosen: Chosen, seen: Seen, block_size: tuple[int, int], device: torch.device) -> BlockMask:
    """The blocks as torch has them: those of which all queries see all keys, and others with causality and lengths."""
    from torch.nn.attention.flex_attention import BlockMask

    counts = seen.counts(device)[0].expand(len(chosen.listed), -1)
    rows_of_blocks, blocks = chosen.listed.shape[2:]
    least = torch.nn.functional.pad(counts, (0, -seen.rows % block_size[0]), value=seen.keys)
    least = least.unflatten(1, (rows_of_blocks, block_size[0])).amin(-1)
    whole = (torch.arange(blocks, device=device) + 1) * block_size[1] <= least[:, None, :, None]
    lists: list[Tensor] = []
    for kind in (~whole, whole):
        listed = (chosen.listed != HIDDEN) & kind
        lists += [listed.sum(-1, dtype=torch.int32), listed.int().argsort(dim=-1, descending=True, stable=True).int()]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (chosen.listed[b, h, i // block_size[0], j // block_size[1]] != HIDDEN) & (j < counts[b, i])

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block_size, mask_mod=mask_mod)
