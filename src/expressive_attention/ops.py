"""The operators of the library, registered with torch.

``expressive_attention::attention`` and ``expressive_attention::attention_backward`` run a fused backend by
name, with the conventions of `backends.problem`. Everything that torch has to know about them is here:
schema, shapes for tracing (fake), autograd (twice), vmap and autocast. Rules for DTensor and for counters of FLOPs are
in `sharding` and `flops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import flops, sharding
from .backends import BACKENDS, reference
from .backends import pattern as patterns
from .backends.pattern import Pattern
from .backends.problem import accumulation_dtype, empty_peak

__all__ = ["attention", "autocast_inputs"]

_ATTENTION = "expressive_attention::attention"
_BACKWARD = "expressive_attention::attention_backward"

# The members of a `Pattern`, in their order.
_PATTERN = (
    "SymInt? left, SymInt? right, bool lower_right, Tensor? slopes, Tensor? key_lengths, Tensor? query_starts, "
    "Tensor? key_starts, SymInt longest_query, SymInt longest_key"
)
_SIZE = len(Pattern._fields)
_TENSORS = slice(3, 7)  # those of them that are tensors

torch.library.define(
    _ATTENTION,
    f"(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, {_PATTERN}, float scale, str form, "
    "str backend) -> (Tensor output, Tensor normalizer, Tensor peak)",
)
# The last result is the gradient of the mask, without elements where `mask_gradient` is false.
torch.library.define(
    _BACKWARD,
    "(Tensor grad_output, Tensor? grad_normalizer, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    f"Tensor output, Tensor normalizer, {_PATTERN}, float scale, str form, str backend, "
    "bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    pattern: Pattern,
    scale: float,
    form: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalizer and peak of one call, by the fused backend of that name."""
    arguments = (query, key, value, attn_mask, pattern, scale, form, backend)
    if not _is_eager(query, key, value, attn_mask):
        if not torch.compiler.is_compiling():
            flops.register()
            sharding.register(query, key, value)
        return torch.ops.expressive_attention.attention(*arguments[:4], *pattern, *arguments[5:])
    if torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:4] if x is not None):
        return _Attention.apply(*arguments)
    return _run(arguments[:4], *arguments[4:])


def _attention_backward(tensors: tuple[Tensor | None, ...], pattern: Pattern, *rest: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() or not _is_eager(*tensors):
        return torch.ops.expressive_attention.attention_backward(*tensors, *pattern, *rest)
    return _run_backward(tensors, pattern, *rest)


def _plain_keys() -> frozenset[int]:
    """Dispatch keys of tensors that are no more than memory of the CPU: no subclass, view of a sign, or vmap."""
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    return frozenset(torch._C._dispatch_keys(x).raw_repr() for x in (torch.empty(0, device="cpu"), inference))


_PLAIN_KEYS = _plain_keys()


def _is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call may skip torch's dispatcher, which takes longer than a small problem.

    Nothing traces, transforms, casts or records it, and its tensors are plain ones.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_any_autocast_enabled()
        and not torch.autograd._profiler_enabled()
        and all(x is None or torch._C._dispatch_keys(x).raw_repr() in _PLAIN_KEYS for x in tensors)
    )


def _run(tensors: Any, pattern: Pattern, scale: float, form: str, backend: str):
    arguments: Any = (*tensors, pattern, scale, form)
    return patterns.forward(BACKENDS[backend], *arguments)


def _run_backward(tensors: Any, pattern: Pattern, scale: float, form: str, backend: str, mask_gradient: bool):
    arguments: Any = (*tensors, pattern, scale, form, mask_gradient)
    dq, dk, dv, dmask = patterns.backward(BACKENDS[backend], *arguments)
    return dq, dk, dv, dq.new_empty(0) if dmask is None else dmask


def _of_operator(run: Callable[..., tuple[Tensor, ...]], tensors: int) -> Callable[..., tuple[Tensor, ...]]:
    """`run` with the arguments of the operator: the members of the pattern come after so many tensors."""
    return lambda *x: run(x[:tensors], Pattern(*x[tensors : tensors + _SIZE]), *x[tensors + _SIZE :])


torch.library.impl(_ATTENTION, "CompositeExplicitAutograd", _of_operator(_run, 4))
torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _of_operator(_run_backward, 8))


# ---- shapes ----


@torch.library.register_fake(_ATTENTION)
def _(query, key, value, attn_mask, *rest):
    rows = query.shape[:-1]
    normalizer = query.new_empty(rows, dtype=accumulation_dtype(query.dtype))
    peak = empty_peak(normalizer, attn_mask, Pattern(*rest[:_SIZE]).slopes)
    return query.new_empty((*rows, value.shape[-1])), normalizer, peak


@torch.library.register_fake(_BACKWARD)
def _(grad_output, grad_normalizer, query, key, value, attn_mask, output, normalizer, *rest):
    gradients = [x.new_empty(x.shape) for x in (query, key, value)]
    mask_gradient = rest[-1]
    return *gradients, attn_mask.new_empty(attn_mask.shape) if mask_gradient else query.new_empty(0)


# ---- autograd ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs[:4], (Pattern(*inputs[4 : 4 + _SIZE]), *inputs[4 + _SIZE :]), output)


def _save(ctx: Any, tensors: tuple[Any, ...], settings: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*tensors, output[0], output[1], *settings[0][_TENSORS])
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_normalizer: Tensor | None, _: Tensor | None):
    saved = ctx.saved_tensors  # which also says if one of them was changed in place
    mask_gradient = ctx.needs_input_grad[3]
    if grad_output is None:
        grad_output = torch.zeros_like(saved[4])
    dq, dk, dv, dmask = _attention_backward((grad_output, grad_normalizer, *saved[:6]), *ctx.settings, mask_gradient)
    return dq, dk, dv, dmask if mask_gradient else None, *(None,) * (len(ctx.needs_input_grad) - 4)


torch.library.register_autograd(_ATTENTION, _backward, setup_context=_setup)


class _Attention(torch.autograd.Function):
    """The same without the dispatcher: what `attention` calls where it may."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Not by setup_context, for which torch binds the arguments to a signature at every call.
        results = _run(arguments[:4], *arguments[4:])
        _save(ctx, arguments[:4], arguments[4:], results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = (Pattern(*inputs[8 : 8 + _SIZE]), *inputs[8 + _SIZE :])
    ctx.set_materialize_grads(False)


def _backward_twice(ctx: Any, *upstream: Tensor | None):
    """Second derivatives through the reference, whatever backend computed the first: exact, L x S memory."""
    pattern, scale, form, _, mask_gradient = ctx.settings
    names = ("grad_output", "grad_normalizer", "query", "key", "value", "attn_mask")
    saved = dict(zip(names, ctx.saved_tensors, strict=True))
    with torch.enable_grad():
        leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in saved.items() if x is not None}
        inputs = (leaves["query"], leaves["key"], leaves["value"])
        mask, rest = pattern.as_mask(leaves.get("attn_mask"), *inputs[:2])
        output, normalizer, _ = reference.forward(*inputs, mask, rest, scale, form)
        outputs, grads = [output], [leaves["grad_output"]]
        if "grad_normalizer" in leaves:
            outputs, grads = [output, normalizer], [*grads, leaves["grad_normalizer"]]
        if mask_gradient:
            inputs = (*inputs, leaves["attn_mask"])
        first = torch.autograd.grad(outputs, inputs, grads, create_graph=True)
        pairs = [(y, g) for y, g in zip(first, upstream, strict=False) if g is not None]
        wanted = [name for name, x in leaves.items() if x.requires_grad]
        second = torch.autograd.grad(
            [y for y, _ in pairs], [leaves[name] for name in wanted], [g for _, g in pairs], allow_unused=True
        )
    by_name = dict(zip(wanted, second, strict=True))
    return *(by_name.get(name) for name in names), *(None,) * (len(ctx.needs_input_grad) - len(names))


torch.library.register_autograd(_BACKWARD, _backward_twice, setup_context=_setup_twice)


# ---- vmap: the mapped dimension joins the batch ----


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any):
    operator = torch.ops.expressive_attention.attention
    folded, size = _fold(info.batch_size, in_dims, args, tensors=4)
    return _unfold(operator(*folded), info.batch_size, size), (0, 0, 0)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any):
    operator = torch.ops.expressive_attention.attention_backward
    mask, mask_gradient = args[5], args[-1]
    if mask_gradient:
        # A mask that is shared inside a call has one gradient per call: give every call its own mask.
        mask = _to_front(mask, in_dims[5], info.batch_size)
        batch = args[2].shape[0 if in_dims[2] is None else int(in_dims[2] == 0)]
        rows = mask.expand(-1, batch, -1, -1, -1)
        args = (*args[:5], rows, *args[6:])
        in_dims = (*in_dims[:5], 0, *in_dims[6:])
    folded, size = _fold(info.batch_size, in_dims, args, tensors=8)
    *gradients, dmask = operator(*folded)
    gradients = _unfold(gradients, info.batch_size, size)
    if not mask_gradient:
        return (*gradients, dmask), (0, 0, 0, None)
    dmask = dmask.unflatten(0, (info.batch_size, size)).sum_to_size(mask.shape)
    return (*gradients, dmask), (0, 0, 0, 0)


def _to_front(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _fold(size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], tensors: int) -> tuple[list[Any], int]:
    """The arguments with the mapped dimension folded into dimension 0, and that one's size.

    Those with such a dimension are the first `tensors`, slopes and key lengths.
    """
    if args[tensors + Pattern._fields.index("query_starts")] is not None:
        raise NotImplementedError("torch.vmap over sequences of variable length is not implemented")
    places = [*range(tensors), *(tensors + Pattern._fields.index(name) for name in ("slopes", "key_lengths"))]
    fronts = {i: _to_front(args[i], in_dims[i], size) for i in places if args[i] is not None}
    batch = max(x.shape[1] for x in fronts.values())
    folded = list(args)
    for i, x in fronts.items():
        # Only a mask and slopes can have a batch dimension of one beside others: they are broadcast.
        folded[i] = x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)
    return folded, batch


def _unfold(results: Any, size: int, batch: int) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(0, (size, batch)) for x in results)


torch.library.register_vmap(_ATTENTION, _vmap)
torch.library.register_vmap(_BACKWARD, _vmap_backward)


# ---- autocast: query, key and value go to the 16-bit dtype, as for scaled_dot_product_attention ----


def autocast_inputs(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of the active autocast region of their device; float64 stays as it is."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors]


def _autocast(query, key, value, *rest):
    query, key, value = autocast_inputs(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        return torch.ops.expressive_attention.attention(query, key, value, *rest)


for _key in ("AutocastCPU", "AutocastCUDA"):
    torch.library.impl(_ATTENTION, _key, _autocast)
