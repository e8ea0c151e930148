"""The squared form over many ranks: only states travel, whose size does not depend on the length.

A squared dot product factorizes, so all keys of a run amount to a state (`backends.linear.state`),

    sum_j w_ij v_j = phi(q_i)^T sum_j phi(k_j) v_j^T.

Causal queries of a piece read the state of all pieces before it, and their own piece as on one machine. A rank has a
state for each of its pieces, and gets the sum of those before by a prefix scan: log2 P messages of one state, and as
many for the second half of a zigzag. In the backward pass, queries and keys change places, and the scan runs the other
way. Without causality, one sum over all ranks is all there is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.linear.state import State
from ..call import accumulation_dtype
from ..functional import expressive_attention
from .links import Links
from .orders import Run, Shards

__all__ = ["states"]

_CHUNK = 256

# A share of |q|^2 sum_j |k_j|^2, as in the backend `linear`: a row whose normalizer is less lost digits.
_LEAST_SHARE_OF_RANDOM = 0.25
_LEAST_SUM = 2.0**-80


class _Element(NamedTuple):
    """The change of a state by a piece: it decays, and something is added.

    Attributes:
        log_factor: The sum of its log decays, ``(N, 1, 1)`` of float64.
        moment: As in `State`, ``(N, E, E)`` of float64.
        sums: Likewise, one after the other, ``(N, n, D)``; the last, since what is in bytes before it is aligned.
    """

    log_factor: Tensor
    moment: Tensor
    sums: Tensor

    def after(self, earlier: _Element | None) -> _Element:
        """Both in one, the earlier first."""
        if earlier is None:
            return self
        factor = self.log_factor.exp()
        return _Element(
            self.log_factor + earlier.log_factor,
            self.moment + factor * earlier.moment,
            self.sums + factor.to(self.sums.dtype) * earlier.sums,
        )

    def packed(self) -> Tensor:
        """Its bytes."""
        return torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in self])

    def unpacked(self, memory: Tensor) -> _Element:
        """Another one of the same shapes, from its bytes."""
        parts = memory.split([x.nbytes for x in self])
        return _Element(*(p.view(x.dtype).view(x.shape) for p, x in zip(parts, self, strict=True)))

    def state(self, dim: int) -> State:
        """The state that it adds."""
        found = State(self.sums.shape[0], dim, self.sums.shape[2], self.sums)
        found.sums = list(self.sums.split([x.shape[1] for x in found.sums], 1))
        found.moment = self.moment
        return found


def _element(state: State, log_factor: Tensor) -> _Element:
    return _Element(log_factor.reshape(-1, 1, 1), state.moment, torch.cat(state.sums, 1))


def _scan(links: Links, own: _Element, order: list[int]) -> _Element | None:
    """The elements of all ranks before this one in `order`, in one; None: there is none before it.

    Each round doubles how many are known.
    """
    at = order.index(links.rank)
    known, before = own, None
    distance = 1
    while distance < links.ranks:
        message = known.packed()
        room = torch.empty_like(message)
        sends = [(message, order[at + distance])] if at + distance < links.ranks else []
        receives = [(room, order[at - distance])] if at >= distance else []
        links.start(sends, receives, "a round of the scan of states").wait()
        if receives:
            found = own.unpacked(room)
            known = known.after(found)
            before = found if before is None else before.after(found)
        distance *= 2
    return before


class _Setting(NamedTuple):
    """A problem of states: the ranks, which tokens they have, whether queries see later keys, and the dtype of sums."""

    links: Links
    shards: Shards
    is_causal: bool
    dtype: torch.dtype

    @property
    def pieces(self) -> list[Run]:
        """The pieces of the one sequence."""
        return self.shards.pieces(self.links.rank)

    def before(self, elements: list[_Element], backward: bool) -> list[_Element | None]:
        """For each piece, the elements of all pieces before it, or, backward, of all after it, in one.

        Without causality, of all pieces.
        """
        if not self.is_causal:
            total = elements[0]
            for other in elements[1:]:
                total = other.after(total)
            moment, sums = (self.links.add(x, "the sum of states") for x in total[1:])
            return [_Element(total.log_factor, moment, sums)] * len(elements)
        up = list(range(self.links.ranks))
        chains = [(0, up), (1, up[::-1])]
        if self.shards.order == "contiguous":
            chains = [(0, up[::-1] if backward else up)]
        elif backward:
            chains = [(1, up), (0, up[::-1])]
        found: list[_Element | None] = [None] * len(elements)
        so_far: _Element | None = None
        for i, (piece, order) in enumerate(chains):
            is_turn = i > 0 and order[0] == self.links.rank  # the rank at which the order of a zigzag turns
            before = _scan(self.links, elements[piece].after(so_far if is_turn else None), order)
            found[piece] = so_far if is_turn else before
            so_far = elements[piece].after(found[piece])
        return found


class _Piece(NamedTuple):
    """A piece of this rank: its rows, and its log decays added up, ``(N, l)`` of float64, or None."""

    rows: slice
    cumulative: Tensor | None

    @classmethod
    def of(cls, run: Run, log_decay: Tensor | None) -> _Piece:
        if log_decay is None:
            return cls(run.rows, None)
        return cls(run.rows, log_decay[:, :, run.rows].double().clamp(min=-1e4).cumsum(-1).flatten(0, 1))

    def chunks(self) -> list[slice]:
        start, stop = self.rows.start, self.rows.stop
        return [slice(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]

    def inside(self, part: slice) -> slice:
        return slice(part.start - self.rows.start, part.stop - self.rows.start)

    def log_factor(self, x: Tensor) -> Tensor:
        """The sum of its log decays, ``(N, 1, 1)``."""
        if self.cumulative is None or self.cumulative.shape[1] == 0:
            return torch.zeros(x.shape[0] * x.shape[1], 1, 1, dtype=torch.float64, device=x.device)
        return self.cumulative[:, -1:, None]

    def since_start(self, part: slice, groups: int, dtype: torch.dtype) -> Tensor | float:
        """The share that is left of the state before the piece at these rows, ``(N, G l, 1)``."""
        if self.cumulative is None:
            return 1.0
        return self.cumulative[:, self.inside(part)].exp().to(dtype).repeat(1, groups).unsqueeze(-1)

    def until_end(self, part: slice, dtype: torch.dtype) -> Tensor:
        """The share that is left of these keys at the end of the piece, ``(N | 1, l | 1, 1)``."""
        if self.cumulative is None:
            return torch.ones(1, 1, 1, dtype=dtype)
        return (self.cumulative[:, -1:] - self.cumulative[:, self.inside(part)]).exp().to(dtype).unsqueeze(-1)


class _Past(torch.autograd.Function):
    """sum_j w_ij v_j, sum_j w_ij and the sum of w |k_j|^2 over the keys of earlier pieces, or of all.

    Args:
        query: ``(B, Hq, L, E)``.
        key: ``(B, H, L, E)``.
        value: ``(B, H, L, Ev)``.
        log_decay: ``(B, H, L)``, or None.
        setting: The problem.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, setting: _Setting
    ) -> tuple[Tensor, Tensor, Tensor]:
        dim, width, groups = key.shape[3], value.shape[3], query.shape[1] // key.shape[1]
        pieces = [_Piece.of(run, log_decay) for run in setting.pieces]
        elements = []
        for piece in pieces:
            state = _new_state(key, width, setting.dtype)
            for part in piece.chunks():
                k, v = (x[:, :, part].flatten(0, 1).to(setting.dtype) for x in (key, value))
                decay = piece.until_end(part, setting.dtype)
                state.add_(k, v * decay.to(v.device), decay.to(v.device))
            elements.append(_element(state, piece.log_factor(key)))
        before = setting.before(elements, backward=False)
        found = query.new_zeros((*query.shape[:3], width), dtype=setting.dtype)
        total, trace = (query.new_zeros(query.shape[:3], dtype=setting.dtype) for _ in range(2))
        for piece, element in zip(pieces, before, strict=True):
            if element is None:
                continue
            state = element.state(dim)
            for part in piece.chunks():
                q = _grouped(query, part, groups, setting.dtype)
                factor = piece.since_start(part, groups, setting.dtype)
                results = (state.values(q) * factor, state.squares(q) * factor, state.trace() * factor)
                for x, result in zip((found, total.unsqueeze(-1), trace.unsqueeze(-1)), results, strict=True):
                    _set_grouped(x, part, groups, result.expand(q.shape[0], q.shape[1], -1))
        ctx.save_for_backward(query, key, value, log_decay, found, total, *_flat(before))
        ctx.setting, ctx.known = setting, [element is not None for element in before]
        ctx.mark_non_differentiable(trace)
        return found, total, trace

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfound: Tensor, dtotal: Tensor, _: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, log_decay, found, total, *flat = ctx.saved_tensors
        setting: _Setting = ctx.setting
        dim, width, dtype = key.shape[3], value.shape[3], setting.dtype
        groups = query.shape[1] // key.shape[1]
        pieces = [_Piece.of(run, log_decay) for run in setting.pieces]
        before = _from_flat(flat, ctx.known)
        dq, dk, dv = (
            torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        by_query = (found * dfound).sum(-1) + total * dtotal  # the derivative by the log decays up to a query
        dc = by_query.double().unflatten(1, (-1, groups)).sum(2)
        elements = []
        for piece, element in zip(pieces, before, strict=True):
            dual = _new_state(key, width, dtype)
            for part in piece.chunks():
                q, u, s = (_grouped(x, part, groups, dtype) for x in (query, dfound, dtotal.unsqueeze(-1)))
                factor = piece.since_start(part, groups, dtype)
                u, s = u * factor, s * factor
                dual.add_(q, u, s)
                if element is not None:
                    _set_grouped(dq, part, groups, 2.0 * element.state(dim).gradient(q, u, -s))
            elements.append(_element(dual, piece.log_factor(key)))
        for piece, element in zip(pieces, setting.before(elements, backward=True), strict=True):
            if element is None:
                continue
            state = element.state(dim)
            for part in piece.chunks():
                k, v = (x[:, :, part].flatten(0, 1).to(dtype) for x in (key, value))
                decay = piece.until_end(part, dtype).to(k.device)
                values = state.values(k) * decay
                dv[:, :, part] = values.view(dv[:, :, part].shape)
                dk[:, :, part] = (2.0 * decay * state.gradient(k, v, -torch.ones_like(v[..., :1]))).view_as(
                    dk[:, :, part]
                )
                by_key = (values * v).sum(-1) + (state.squares(k) * decay).squeeze(-1)
                dc[:, :, part] -= by_key.view(dc[:, :, part].shape)
        ddecay = _of_log_decay(setting, dc).to(log_decay.dtype) if log_decay is not None else None
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), ddecay, None


def _new_state(key: Tensor, width: int, dtype: torch.dtype) -> State:
    return State(key.shape[0] * key.shape[1], key.shape[3], width, key.new_empty(0, dtype=dtype))


def _grouped(x: Tensor, rows: slice, groups: int, dtype: torch.dtype) -> Tensor:
    """Rows of ``(B, Hq, L, D)`` by the heads of keys, ``(B H, G l, D)``."""
    return x[:, :, rows].unflatten(1, (-1, groups)).flatten(2, 3).flatten(0, 1).to(dtype)


def _set_grouped(x: Tensor, rows: slice, groups: int, numbers: Tensor) -> None:
    """The inverse of `_grouped`, into `x`."""
    part = x[:, :, rows]
    part.copy_(numbers.view(part.shape[0], -1, groups, *part.shape[2:]).flatten(1, 2))


def _flat(elements: list[_Element | None]) -> list[Tensor]:
    return [x for element in elements if element is not None for x in element]


def _from_flat(flat: list[Tensor], known: list[bool]) -> list[_Element | None]:
    rest = iter(flat)
    return [_Element(next(rest), next(rest), next(rest)) if is_known else None for is_known in known]


def _of_log_decay(setting: _Setting, dc: Tensor) -> Tensor:
    """The gradient of log decays from that of their sums since the beginning: the sum of what comes after."""
    links, pieces = setting.links, setting.pieces
    totals = torch.stack([dc[:, :, run.rows].sum(-1) for run in pieces], -1)
    by_rank = links.gather(totals, [len(pieces)] * links.ranks, "the gradient of decays")
    found = torch.zeros_like(dc)
    for run in pieces:
        own = dc[:, :, run.rows].flip(-1).cumsum(-1).flip(-1)
        for rank, theirs in enumerate(by_rank):
            for other, total in zip(setting.shards.pieces(rank), theirs.unbind(-1), strict=True):
                if other.start >= run.stop and (rank, other) != (links.rank, run):
                    own = own + total.unsqueeze(-1)
        found[:, :, run.rows] = own
    return found


def states(
    links: Links, shards: Shards, tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output ``(B, Hq, L_rank, Ev)`` and N ``(B, Hq, L_rank)`` of the squared form.

    Args:
        links: The ranks.
        shards: Which tokens of one sequence each rank has.
        tensors: Query, key and value of this rank's tokens.
        options: ``is_causal``, ``scale``, ``log_decay`` of this rank's keys ``(B, Hq | Hkv, L_rank)``, ``key_lengths``,
            ``alibi_slopes`` and ``backend``, as of `expressive_attention`.
    """
    query, key, value = tensors
    setting = _Setting(links, shards, options["is_causal"], accumulation_dtype(query.dtype))
    log_decay, slopes, lengths = (options.get(name) for name in ("log_decay", "alibi_slopes", "key_lengths"))
    if slopes is not None:
        of_slopes = -slopes.reshape(-1, query.shape[1], 1).expand(query.shape[0], -1, query.shape[2])
        if log_decay is not None:
            of_slopes = of_slopes + log_decay.repeat_interleave(query.shape[1] // log_decay.shape[1], 1)
        log_decay = of_slopes
    if lengths is not None:
        places = shards.places(links.rank, query.device)
        hidden = (places >= lengths.view(-1, 1)).view(-1, 1, query.shape[2], 1)
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    if log_decay is not None and log_decay.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(log_decay.shape[1] // x.shape[1], 1) for x in (key, value))
    given = (query, key, value, log_decay)
    output, normalizer, is_unsafe = _attend(setting, given, options["scale"], options.get("backend"))
    if setting.dtype != torch.float64:
        unsafe = links.largest(is_unsafe.to(torch.float32), "the check of states")
        if bool(unsafe):
            # Keys are elsewhere, so all ranks have to do it again.
            setting = setting._replace(dtype=torch.float64)
            output, normalizer, _ = _attend(setting, given, options["scale"], options.get("backend"))
    return output.to(query.dtype), normalizer.to(accumulation_dtype(query.dtype))


def _attend(
    setting: _Setting, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], scale: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and N in the dtype of the setting, and whether that one did not hold a row."""
    query, key, value, log_decay = tensors
    size = query.detach().abs().amax(-1, keepdim=True).to(setting.dtype)
    size = torch.where(size == 0, 1.0, size)
    unit = query.to(setting.dtype) / size  # whose square does not leave the range
    found, total, trace = _Past.apply(unit, key, value, log_decay, setting)
    if setting.is_causal:
        outputs, weights = [], []
        for run in setting.pieces:
            decay = None if log_decay is None else log_decay[:, :, run.rows]
            q, k, v = (x[:, :, run.rows].to(setting.dtype) for x in (unit, key, value))
            own, weight = expressive_attention(
                q, k, v, is_causal=True, scale=1.0, enable_gqa=True, form="squared", log_decay=decay,
                return_normalizer=True, backend=backend,
            )  # fmt: skip
            outputs.append(weight.unsqueeze(-1) * own)
            weights.append(weight)
        found, total = found + torch.cat(outputs, 2), total + torch.cat(weights, 2)
    share = trace * unit.detach().square().sum(-1)
    is_safe = (total >= _LEAST_SHARE_OF_RANDOM / query.shape[-1] * share) & (total > _LEAST_SUM) & (total < torch.inf)
    is_unsafe = ((share != 0) & ~is_safe).any()
    output = found / torch.where(total <= 0, torch.inf, total).unsqueeze(-1)
    return output, total * (size.squeeze(-1) * scale).square(), is_unsafe
