"""A call as one object, the backends that run it, and the one place that makes masks and splits packed sequences.

Inside the library every call has one shape: query ``(B, Hq, L, E)``, key ``(B, Hkv, S, E)``, value
``(B, Hkv, S, Ev)`` with ``Hq % Hkv == 0``, and a mask ``(B | 1, Hq | 1, L | 1, S | 1)`` or None. A `Visibility` says
which keys a query sees, the mask aside. Every backend knows a diagonal. Where it does not know all of a visibility, it
declines the call: then `lower` says the same by a mask, and makes a part of each of the packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from .blocks import mask_of_blocks
from .masks import join_masks

__all__ = [
    "Backend",
    "Call",
    "Gradients",
    "Part",
    "Result",
    "Upstream",
    "Visibility",
    "accumulation_dtype",
    "backward",
    "differentiated_by_func",
    "empty_bias_max",
    "float32_precision",
    "forward",
    "lower",
    "lower_whole",
    "outline",
    "reason_to_decline",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, weights and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float32_precision(device: torch.device) -> str:
    """How exact products of float32 have to be on a device, as `torch.get_float32_matmul_precision` names it."""
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for one kind of device, which torch does not name so
        allowed = "highest"
    of_matmul = getattr(torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn, "matmul", None)
    of_device = getattr(of_matmul, "fp32_precision", "none")
    return "high" if allowed == "highest" and of_device not in ("ieee", "none") else allowed


class Visibility(NamedTuple):
    """Which keys a query sees, masks aside, and at which distance.

    In a sequence of L queries and S keys, query i is at place ``p_i = i``, or, with `lower_right`, ``i + S - L``, and
    sees key j if and only if ``p_i - left <= j <= p_i + right``.

    Attributes:
        left: How many keys before its place a query sees; None: all.
        right: How many after it; None: all. A causal mask is `right` = 0.
        lower_right: Whether the last query is at the place of the last key.
        slopes: ALiBi: weights are multiplied by ``exp(-slope |p_i - j|)``, ``(B | 1, Hq)`` of float32; None: they
            are not.
        key_lengths: The first keys of each sequence that exist, ``(B,)`` of integers; None: all do.
        query_starts: Where each sequence begins in tensors that hold all of them, batch dimension 1, one after the
            other, and where the last ends, ``(B + 1,)`` of integers; None: each has its place in the batch.
        key_starts: The same of keys.
        longest_query: With `query_starts`, a bound on L.
        longest_key: With `query_starts`, a bound on S.
        listed: For each block of `block_rows` queries and of `block_keys` keys whether it is seen, as far as it goes:
            ``(B | 1, Hq | 1, blocks of queries, blocks of keys)`` of int32, with 0 for a block that is hidden, 1 for
            one that is seen, and 2 + n for one of which tile n says which pairs are; None: all are seen.
        tiles: ``(n, block_rows, block_keys)`` of bool; None: there are none.
        block_rows: With `listed`, queries of a block.
        block_keys: With `listed`, keys of a block.
    """

    left: int | None = None
    right: int | None = None
    lower_right: bool = False
    slopes: Tensor | None = None
    key_lengths: Tensor | None = None
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None
    longest_query: int = 0
    longest_key: int = 0
    listed: Tensor | None = None
    tiles: Tensor | None = None
    block_rows: int = 0
    block_keys: int = 0

    def but(self, **members: Any) -> Visibility:
        """The visibility with other `members`; the torch.compile of torch 2.6 does not trace `_replace`."""
        return Visibility(*[members.get(name, own) for name, own in zip(Visibility._fields, self, strict=True)])

    def is_diagonal(self) -> bool:
        """Whether all that it says is how far right a query sees: every backend knows that much."""
        return (
            self.left is None
            and self.slopes is None
            and self.key_lengths is None
            and self.query_starts is None
            and self.listed is None
        )

    def as_mask(self, attn_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Visibility]:
        """The visibility joined to a mask, as large as ``(B | 1, Hq | 1, L, S)``, and the diagonal that is left of it.

        Args:
            attn_mask: ``(B | 1, Hq | 1, L | 1, S | 1)`` or None.
            query: ``(B, Hq, L, E)``.
            key: ``(B, Hkv, S, E)``.
        """
        if self.is_diagonal():
            return attn_mask, self
        same_for_all = self.key_lengths is None and self.query_starts is None
        rest = Visibility(right=self.right, lower_right=self.lower_right) if same_for_all else Visibility()
        inside = self.but(right=None) if same_for_all else self
        mask = inside.mask_of(torch.arange(query.shape[2], device=query.device), query, key)
        if attn_mask is not None:
            mask = join_masks(attn_mask, mask, accumulation_dtype(query.dtype))
        return mask, rest

    def mask_of(self, rows: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The visibility as a mask for the queries `rows`, ``(B | 1, Hq | 1, len(rows), S)``: bool, or a bias."""
        place, column, keep, slopes = self.places(rows, query.shape[2], key.shape[2])
        if self.right is not None:
            keep = keep & (column <= place + self.right)
        if self.left is not None:
            keep = keep & (column >= place - self.left)
        if self.listed is not None:
            keep = keep & mask_of_blocks(self.listed, self.tiles, self.block_rows, self.block_keys, rows, key.shape[2])
        if slopes is None:
            return keep.expand(-1, -1, len(rows), -1)
        bias = -slopes.to(accumulation_dtype(query.dtype)) * (place - column).abs()
        return bias.masked_fill(~keep, -torch.inf)

    def places(self, rows: Tensor, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Places of queries, those of keys, whether they are of one sequence, and the slopes of queries.

        Each of them broadcasts to ``(B | 1, Hq | 1, len(rows), S)``.
        """
        row = rows.view(1, 1, -1, 1)
        column = torch.arange(keys, device=rows.device).view(1, 1, 1, -1)
        slopes = None if self.slopes is None else self.slopes[:, :, None, None]
        if self.query_starts is None or self.key_starts is None:
            own_length, own_keys = length, keys
            if self.key_lengths is not None:
                own_keys = self.key_lengths.clamp(0, keys).view(-1, 1, 1, 1)
            keep = column < own_keys
        else:
            last = self.query_starts.numel() - 2
            row_sequence, row, own_length = _local(row, self.query_starts)
            key_sequence, column, _ = _local(column, self.key_starts)
            sizes = self.key_starts.diff()
            if self.key_lengths is not None:
                sizes = sizes.minimum(self.key_lengths.clamp(min=0))
            keep = (row_sequence == key_sequence) & (row_sequence <= last)
            keep = keep & (column < sizes[key_sequence.clamp(max=last)])
            row_sequence = row_sequence.clamp(max=last)
            own_keys = sizes[row_sequence]
            if self.slopes is not None and slopes is not None and len(slopes) > 1:
                slopes = self.slopes[row_sequence[0, 0, :, 0]].T[None, :, :, None]
        place = row + (own_keys - own_length) if self.lower_right else row
        return place, column, keep, slopes

    def sequences(self) -> Iterator[tuple[slice, slice, Visibility]]:
        """The rows, the keys that exist and the visibility of each of the packed sequences."""
        rows, columns = ([] if starts is None else starts.tolist() for starts in (self.query_starts, self.key_starts))
        lengths = None if self.key_lengths is None else self.key_lengths.tolist()
        for i in range(len(rows) - 1):
            slopes = self.slopes if self.slopes is None or self.slopes.shape[0] == 1 else self.slopes[i : i + 1]
            end = columns[i + 1] if lengths is None else min(columns[i] + lengths[i], columns[i + 1])
            own = Visibility(self.left, self.right, self.lower_right, slopes)
            yield slice(rows[i], rows[i + 1]), slice(columns[i], end), own


def _local(row: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence in which each row lies (their number: in none), its index there, and the length of that one."""
    starts = starts.to(row.dtype)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    inside = sequence.clamp(max=starts.numel() - 2)
    return sequence, row - starts[inside], starts.diff()[inside]


class Call(NamedTuple):
    """A call of `expressive_attention` that has passed the checks, in the shapes that backends take.

    Attributes:
        query: ``(B, Hq, L, E)``.
        key: ``(B, Hkv, S, E)``.
        value: ``(B, Hkv, S, Ev)``.
        attn_mask: ``(B | 1, Hq | 1, L | 1, S | 1)``, bool or floating, or None.
        visibility: Which keys a query sees, the mask aside, and at which distance.
        scale: Factor on the dot product.
        form: ``"expressive"`` or ``"squared"``.
        dropout_p: Probability with which weights are dropped.
        dropout_seeds: Seeds of the weights to drop, as in `backends.dropout`: ``(n, 3)`` of int64, one for each n-th
            of the batch; None: none are dropped.
        log_decay: ``(B, Hq | Hkv, S)``, floating, at most 0: the weight of a pair is multiplied by the exponentials of
            those after the key, up to the place of the query; None: by 1. The visibility is causal.
        relative_bias: ``(B | 1, Hq, 2 M - 1)`` in the accumulation dtype: the weight of a pair is multiplied by the
            exponential of number ``p_i - j + M - 1``; of packed sequences, B is their number. None: by 1.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    visibility: Visibility
    scale: float
    form: str
    dropout_p: float = 0.0
    dropout_seeds: Tensor | None = None
    log_decay: Tensor | None = None
    relative_bias: Tensor | None = None

    def but(self, **members: Any) -> Call:
        """The call with other `members`."""
        return Call(*[members.get(name, own) for name, own in zip(Call._fields, self, strict=True)])

    @property
    def diagonal(self) -> int | None:
        """The d of a diagonal visibility: query i sees key j if and only if ``j <= i + d``; None: it sees all."""
        right = self.visibility.right
        if right is None or not self.visibility.lower_right:
            return right
        return right + self.key.shape[2] - self.query.shape[2]

    def cumulative_decay(self) -> Tensor | None:
        """Log decays added up over the keys, ``(B, Hq | Hkv, S)``, in float64: the difference of large ones counts."""
        if self.log_decay is None:
            return None
        return self.log_decay.to(torch.float64).clamp(min=_LEAST_LOG_DECAY).cumsum(-1)

    def decay_bias(self) -> Tensor | None:
        """The log decays as a bias of weights, ``(B, Hq, L, S)``; 0 of what a causal query does not see."""
        total = self.cumulative_decay()
        if total is None:
            return None
        total = total.repeat_interleave(self.query.shape[1] // total.shape[1], 1)
        rows, keys = self.query.shape[2], self.key.shape[2]
        place, column, *_ = self.visibility.places(torch.arange(rows, device=total.device), rows, keys)
        if keys == 0:
            return total.unsqueeze(-2).expand(-1, -1, rows, -1).to(accumulation_dtype(self.query.dtype))
        lengths = self.visibility.key_lengths
        last = keys - 1 if lengths is None else (lengths.view(-1, 1, 1, 1) - 1).clamp(min=0)
        here = total.gather(-1, place.clamp(min=0).clamp(max=last).expand(*total.shape[:2], rows, 1).squeeze(-1))
        bias = here.unsqueeze(-1) - total.unsqueeze(-2)
        return torch.where(column <= place, bias, 0.0).to(accumulation_dtype(self.query.dtype))

    def distance_bias(self, rows: Tensor | None = None) -> Tensor | None:
        """The biases by distance as a mask for the queries `rows`, ``(B | 1, Hq, len(rows), S)``; default: for all."""
        table, starts = self.relative_bias, self.visibility.query_starts
        if table is None:
            return None
        length, keys = self.query.shape[2], self.key.shape[2]
        rows = torch.arange(length, device=table.device) if rows is None else rows
        place, column, *_ = self.visibility.places(rows, length, keys)
        index = (place - column + table.shape[-1] // 2).clamp(0, table.shape[-1] - 1).expand(-1, -1, len(rows), keys)
        if starts is not None and table.shape[0] > 1:
            sequence = _local(rows, starts)[0].clamp(max=table.shape[0] - 1)
            return table[sequence.unsqueeze(1), :, index[0, 0]].permute(2, 0, 1).unsqueeze(0)
        if index.shape[0] == 1:
            return table[:, :, index[0, 0]]
        shape = (index.shape[0], table.shape[1], len(rows) * keys)
        biases = table.expand(shape[0], -1, -1).gather(-1, index.flatten(2).expand(shape))
        return biases.unflatten(-1, (len(rows), keys))

    @property
    def has_bias(self) -> bool:
        """Whether weights are multiplied by the exponential of a bias: a float mask, that of slopes or by distance."""
        mask = self.attn_mask
        return (
            self.visibility.slopes is not None
            or self.relative_bias is not None
            or (mask is not None and mask.dtype != torch.bool)
        )


class Result(NamedTuple):
    """The results of a forward pass.

    Attributes:
        output: ``(B, Hq, L, Ev)``.
        normalizer: ``(B, Hq, L)`` in the accumulation dtype; N is this times ``exp(bias_max)``.
        bias_max: ``(B, Hq, L)``, the largest bias that a row sees; None: the call has no bias.
    """

    output: Tensor
    normalizer: Tensor
    bias_max: Tensor | None


class Upstream(NamedTuple):
    """The upstream gradients of a backward pass.

    Attributes:
        output: The gradient of the output.
        normalizer: The gradient of the normalizer; None: it is 0.
        wants_mask: Whether the gradient of the float mask is asked for.
        wants_relative: Whether that of biases by distance is.
    """

    output: Tensor
    normalizer: Tensor | None
    wants_mask: bool
    wants_relative: bool = False


class Gradients(NamedTuple):
    """The gradients of the tensors of a call.

    `attn_mask` and `relative_bias` are None if their gradients were not asked for, `log_decay` if the call has none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    log_decay: Tensor | None = None
    relative_bias: Tensor | None = None


class Backend(Protocol):
    """An implementation of the operator: a module with these functions."""

    def declines(self, call: Call) -> str | None:
        """The reason why it does not run the call; None: it does. A diagonal visibility is never a reason."""

    def forward(self, call: Call) -> Result:
        """Output, normalizer and largest biases of a call that it does not decline."""
        ...

    def backward(self, call: Call, result: Result, upstream: Upstream) -> Gradients:
        """The gradients of such a call; of its result, `bias_max` is not needed."""
        ...


def empty_bias_max(normalizer: Tensor, call: Call) -> Tensor | None:
    """Memory for `Result.bias_max`; None without a bias."""
    return normalizer.new_empty(normalizer.shape) if call.has_bias else None


# Its exponential is 0, and a million of them add up to a number whose last digit does not count.
_LEAST_LOG_DECAY = -1e4

# ---- what a backend does not know ----

_ALL = Visibility()


def outline(call: Call) -> Call:
    """The call as far as lowering leaves it as it is: what a backend declines here, it declines altogether."""
    return call if _is_plain(call) else call.but(visibility=_ALL, log_decay=None, relative_bias=None)


def _is_plain(call: Call) -> bool:
    return call.log_decay is None and call.relative_bias is None and call.visibility.is_diagonal()


def reason_to_decline(call: Call, backend: Backend) -> str | None:
    """The reason why a backend does not run the call, lowered or not; None: it does."""
    reason = backend.declines(outline(call))
    if reason is not None or _is_plain(call):
        return reason
    if call.visibility.query_starts is not None:  # one by one, if not together
        call = call.but(visibility=call.visibility.but(query_starts=None, key_starts=None, key_lengths=None))
    reason = backend.declines(call)
    if reason is None:
        return None
    masked = outline(call).but(attn_mask=call.query.new_empty((1, 1, 1, 1)))
    return None if backend.declines(masked) is None else reason


class Part(NamedTuple):
    """A part of a call, as a backend takes it.

    Attributes:
        rows: Which rows of queries of the call it has.
        keys: Which of the keys.
        call: The part as a call.
    """

    rows: slice
    keys: slice
    call: Call


_WHOLE = slice(None)


def lower(call: Call, backend: Backend) -> list[Part]:
    """The call in parts that the backend takes: what it declines is said in other words.

    Packed sequences become a part each. Other visibilities, decays and biases by distance become a mask.
    """
    if call.visibility.query_starts is None or backend.declines(call) is None:
        return [Part(_WHOLE, _WHOLE, lower_whole(call, backend))]
    return [
        Part(rows, keys, lower_whole(_sequence(call, i, rows, keys, visibility), backend))
        for i, (rows, keys, visibility) in enumerate(call.visibility.sequences())
    ]


def lower_whole(call: Call, backend: Backend) -> Call:
    """The call in one part: where the backend declines visibility, decays or biases, a mask says the same."""
    if _is_plain(call) or backend.declines(call) is None:
        return call
    mask, rest = call.visibility.as_mask(call.attn_mask, call.query, call.key)
    for bias in (call.decay_bias(), call.distance_bias()):
        if bias is not None:
            mask = bias if mask is None else join_masks(mask, bias)
    return call.but(attn_mask=mask, visibility=rest, log_decay=None, relative_bias=None)


def _sequence(call: Call, number: int, rows: slice, keys: slice, visibility: Visibility) -> Call:
    """One of the packed sequences alone, of that number."""
    query, key, value = call.query[:, :, rows], call.key[:, :, keys], call.value[:, :, keys]
    seeds = call.dropout_seeds
    if seeds is not None:  # of the row that is the first of the sequence
        seeds = seeds + torch.tensor([0, 0, rows.start], device=seeds.device)
    relative = call.relative_bias
    if relative is not None and relative.shape[0] > 1:
        relative = relative[number : number + 1]
    return call.but(
        query=query, key=key, value=value, visibility=visibility, dropout_seeds=seeds, relative_bias=relative
    )


def forward(backend: Backend, call: Call) -> Result:
    """The result by a backend that does not decline the `outline` of the call."""
    if _is_plain(call):
        return backend.forward(call)
    parts = lower(call, backend)
    if parts and parts[0].rows is _WHOLE:
        return backend.forward(parts[0].call)
    query, value = call.query, call.value
    output = query.new_zeros((*query.shape[:3], value.shape[3]))
    normalizer = query.new_zeros(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    bias_max = torch.zeros_like(normalizer) if call.has_bias else None
    for rows, _, own in parts:
        part = backend.forward(own)
        output[:, :, rows], normalizer[:, :, rows] = part.output, part.normalizer
        if bias_max is not None and part.bias_max is not None:
            bias_max[:, :, rows] = part.bias_max
    return Result(output, normalizer, bias_max)


def backward(backend: Backend, call: Call, result: Result, upstream: Upstream) -> Gradients:
    """The gradients by such a backend."""
    if _is_plain(call):
        return backend.backward(call, result, upstream)
    parts = lower(call, backend)
    if parts and parts[0].rows is _WHOLE:
        gradients = backend.backward(parts[0].call, result, upstream)
        mask, dmask = call.attn_mask, gradients.attn_mask
        if parts[0].call is call or mask is None or dmask is None:
            return gradients
        return Gradients(*gradients[:3], dmask.sum_to_size(mask.shape).to(mask.dtype))
    dq, dk, dv = (x.new_zeros(x.shape) for x in call[:3])
    for rows, keys, own in parts:
        part = Result(result.output[:, :, rows], result.normalizer[:, :, rows], None)
        dn = None if upstream.normalizer is None else upstream.normalizer[:, :, rows]
        gradients = backend.backward(own, part, Upstream(upstream.output[:, :, rows], dn, False))
        dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = gradients[:3]
    return Gradients(dq, dk, dv, None)


def differentiated_by_func() -> bool:
    """Whether a torch.func or forward-mode derivative is active: operators with registered gradients know neither."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = _functorch.get_interpreter_stack() or []
    derivatives = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return any(level.key() in derivatives for level in stack)


# As torch.compiler.assume_constant_result marks it, which takes a second to import: torch.compile evaluates it while it
# traces, within the transforms of the function that it compiles, and compiles anew within others.
differentiated_by_func._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
