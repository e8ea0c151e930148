"""The operators of the library, registered with torch.

Everything that torch has to know about them is here: shapes for tracing (fake), autograd (twice), vmap and autocast.
Their schemas are in `schema`; rules for DTensor and for counters of FLOPs are in `sharding` and `flops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import call as calls
from . import flops, sharding
from .backends import BACKENDS, reference
from .call import Call, Result, Upstream, Visibility, accumulation_dtype
from .schema import (
    ATTENTION,
    BACKWARD,
    RELATIVE,
    SEEDS,
    TILES,
    flatten,
    flatten_backward,
    unflatten,
    unflatten_backward,
)

__all__ = ["attention", "autocast_inputs", "reference_forward"]


def attention(call: Call, backend: str) -> Result:
    """The result of a call, by the backend of that name."""
    query, key, value, attn_mask = call[:4]
    if not _is_eager(query, key, value, attn_mask, call.log_decay, call.relative_bias):
        if not torch.compiler.is_compiling():
            flops.register()
            sharding.register(query, key, value)
        output, normalizer, bias_max = torch.ops.expressive_attention.attention(*flatten(call, backend))
        return Result(output, normalizer, bias_max if call.has_bias else None)
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (attn_mask is not None and attn_mask.requires_grad)
        or (call.log_decay is not None and call.log_decay.requires_grad)
        or (call.relative_bias is not None and call.relative_bias.requires_grad)
    ):
        return Result(*_Attention.apply(*call, backend))
    return calls.forward(BACKENDS[backend], call)


def reference_forward(call: Call) -> Result:
    """The result of a call by the reference, as plain torch, which has derivatives of every kind."""
    if call.dropout_p and call.visibility.query_starts is not None:
        return calls.forward(reference, call)  # seeds say which weights are dropped in a sequence alone
    return reference.forward(calls.lower_whole(call, reference))


def _attention_backward(call: Call, backend: str, result: Result, upstream: Upstream) -> tuple[Tensor | None, ...]:
    tensors = (*call[:4], call.log_decay, call.relative_bias, *result[:2], *upstream[:2])
    if torch.is_grad_enabled() or not _is_eager(*tensors):
        arguments = flatten_backward(call, backend, result, upstream)
        return torch.ops.expressive_attention.attention_backward(*arguments)
    return calls.backward(BACKENDS[backend], call, result, upstream)


def _plain_keys() -> tuple[int, int]:
    """Dispatch keys of tensors that are no more than memory of the CPU: no subclass, view of a sign, or vmap."""
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    plain = torch.empty(0, device="cpu")
    return torch._C._dispatch_keys(plain).raw_repr(), torch._C._dispatch_keys(inference).raw_repr()


_PLAIN, _INFERENCE = _plain_keys()


def _is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call may skip torch's dispatcher, which takes longer than a small problem.

    Nothing traces, transforms, casts or records it, and its tensors are plain ones.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch.autograd._profiler_enabled()
    ):
        return False
    for x in tensors:
        if x is not None:
            keys = torch._C._dispatch_keys(x).raw_repr()
            if keys != _PLAIN and keys != _INFERENCE:
                return False
    return True


def _no_bias_max(normalizer: Tensor) -> Tensor:
    """An empty tensor ``(B, Hq, 0)``, which stands for None in the results of the operator."""
    return normalizer.new_empty((*normalizer.shape[:-1], 0))


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, backend = unflatten(arguments)
    output, normalizer, bias_max = calls.forward(BACKENDS[backend], call)
    if call.visibility.query_starts is not None:  # a backend may have them as (T, H, ...) in memory
        output, normalizer = output.contiguous(), normalizer.contiguous()
        bias_max = None if bias_max is None else bias_max.contiguous()
    return output, normalizer, _no_bias_max(normalizer) if bias_max is None else bias_max


def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call, backend, result, upstream = unflatten_backward(arguments)
    dq, dk, dv, *others = calls.backward(BACKENDS[backend], call, result, upstream)
    if call.visibility.query_starts is not None:
        dq, dk, dv = (x.contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, *(dq.new_empty(0) if x is None else x for x in others)


torch.library.impl(ATTENTION, "CompositeExplicitAutograd", _run)
torch.library.impl(BACKWARD, "CompositeExplicitAutograd", _run_backward)


# ---- shapes ----


@torch.library.register_fake(ATTENTION)
def _(*arguments: Any):
    call, _ = unflatten(arguments)
    rows = call.query.shape[:-1]
    normalizer = call.query.new_empty(rows, dtype=accumulation_dtype(call.query.dtype))
    bias_max = torch.empty_like(normalizer) if call.has_bias else _no_bias_max(normalizer)
    return call.query.new_empty((*rows, call.value.shape[-1])), normalizer, bias_max


@torch.library.register_fake(BACKWARD)
def _(*arguments: Any):
    call, _, _, upstream = unflatten_backward(arguments)
    mask = call.attn_mask if upstream.wants_mask else None
    found = (*call[:3], mask, call.log_decay, call.relative_bias if upstream.wants_relative else None)
    return tuple(call.query.new_empty(0) if x is None else x.new_empty(x.shape) for x in found)


# ---- autograd ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, backend = unflatten(inputs)
    _save(ctx, (*call, backend), output)


def _save(ctx: Any, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    seen = arguments[4]
    # The tensors of the visibility and the seeds, too: then torch says if one of them was changed in place.
    of_visibility = (seen.slopes, seen.key_lengths, seen.query_starts, seen.key_starts, seen.listed, seen.tiles)
    ctx.save_for_backward(
        *arguments[:4], output[0], output[1], arguments[9], *of_visibility, arguments[8], arguments[10]
    )
    ctx.settings = arguments[4:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_normalizer: Tensor | None, _: Tensor | None):
    query, key, value, mask, output, normalizer = ctx.saved_tensors[:6]
    *settings, backend = ctx.settings
    needs = ctx.needs_input_grad
    wants_mask, wants_decay, wants_relative = needs[3], needs[-3], needs[-2]
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    dq, dk, dv, dmask, ddecay, drelative = _attention_backward(
        Call(query, key, value, mask, *settings),
        backend,
        Result(output, normalizer, None),
        Upstream(grad_output, grad_normalizer, wants_mask, wants_relative),
    )
    wanted = zip((dmask, ddecay, drelative), (wants_mask, wants_decay, wants_relative), strict=True)
    dmask, ddecay, drelative = (x if wants else None for x, wants in wanted)
    return dq, dk, dv, dmask, *(None,) * (len(ctx.needs_input_grad) - 7), ddecay, drelative, None


torch.library.register_autograd(ATTENTION, _backward, setup_context=_setup)


class _Attention(torch.autograd.Function):
    """The same without the dispatcher: what `attention` calls where it may."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Result:
        # Not by setup_context, for which torch binds the arguments to a signature at every call.
        result = calls.forward(BACKENDS[arguments[-1]], Call(*arguments[:-1]))
        _save(ctx, arguments, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, _, _, upstream = unflatten_backward(inputs)
    ctx.save_for_backward(upstream.output, upstream.normalizer, *call[:4], call.log_decay, call.relative_bias)
    ctx.settings = (call[4:], upstream.wants_mask, upstream.wants_relative)
    ctx.set_materialize_grads(False)


def _backward_twice(ctx: Any, *upstream: Tensor | None):
    """Second derivatives through the reference, whatever backend computed the first: exact, L x S memory."""
    settings, wants_mask, wants_relative = ctx.settings
    names = ("grad_output", "grad_normalizer", "query", "key", "value", "attn_mask", "log_decay", "relative_bias")
    saved = dict(zip(names, ctx.saved_tensors, strict=True))
    with torch.enable_grad():
        leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in saved.items() if x is not None}
        inputs = (leaves["query"], leaves["key"], leaves["value"])
        call = Call(*inputs, leaves.get("attn_mask"), *settings)
        call = call.but(log_decay=leaves.get("log_decay"), relative_bias=leaves.get("relative_bias"))
        output, normalizer, _ = reference_forward(call)
        outputs, grads = [output], [leaves["grad_output"]]
        if "grad_normalizer" in leaves:
            outputs, grads = [output, normalizer], [*grads, leaves["grad_normalizer"]]
        of_mask = leaves["attn_mask"] if wants_mask else None
        of_relative = leaves["relative_bias"] if wants_relative else None
        given = zip((*inputs, of_mask, leaves.get("log_decay"), of_relative), upstream, strict=True)
        given = [(x, g) for x, g in given if x is not None]
        first = torch.autograd.grad(outputs, [x for x, _ in given], grads, create_graph=True)
        pairs = [(y, g) for y, (_, g) in zip(first, given, strict=True) if g is not None]
        wanted = [name for name, x in leaves.items() if x.requires_grad]
        second = torch.autograd.grad(
            [y for y, _ in pairs], [leaves[name] for name in wanted], [g for _, g in pairs], allow_unused=True
        )
    by_name = dict(zip(wanted, second, strict=True))
    none: Any = None
    found: list[Any] = [by_name.get(name) for name in names]
    do, dn, dq, dk, dv, dmask, ddecay, drelative = found
    nothing = Visibility(*[none] * len(Visibility._fields))
    gradients = Call(dq, dk, dv, dmask, nothing, none, none, none, log_decay=ddecay, relative_bias=drelative)
    return flatten_backward(gradients, none, Result(none, none, none), Upstream(do, dn, none, none))


torch.library.register_autograd(BACKWARD, _backward_twice, setup_context=_setup_twice)


# ---- vmap: the mapped dimension joins the batch ----


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any):
    operator = torch.ops.expressive_attention.attention
    folded, size = _fold(info.batch_size, in_dims, args)
    return _unfold(operator(*folded), info.batch_size, size), (0, 0, 0)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any):
    operator = torch.ops.expressive_attention.attention_backward
    call, _, _, upstream = unflatten_backward(args)
    # A tensor that calls share has a gradient for each of them: give every call its own.
    shared: dict[int, Tensor] = {}
    wanted = ((_MASK, call.attn_mask, upstream.wants_mask), (RELATIVE, call.relative_bias, upstream.wants_relative))
    for i, x, wants in wanted:
        if wants and x is not None:
            shared[i] = _to_front(x, in_dims[i], info.batch_size)
    if shared:
        batch = call.query.shape[0 if in_dims[0] is None else int(in_dims[0] == 0)]
        args = tuple(
            shared[i].expand(-1, batch, *shared[i].shape[2:]) if i in shared else x for i, x in enumerate(args)
        )
        in_dims = tuple(0 if i in shared else dim for i, dim in enumerate(in_dims))
    folded, size = _fold(info.batch_size, in_dims, args)
    *gradients, dmask, ddecay, drelative = operator(*folded)
    gradients = _unfold(gradients, info.batch_size, size)
    has_decay = call.log_decay is not None
    if has_decay:
        (ddecay,) = _unfold([ddecay], info.batch_size, size)
    dmask, drelative = (
        x.unflatten(0, (info.batch_size, size)).sum_to_size(shared[i].shape) if i in shared else x
        for i, x in ((_MASK, dmask), (RELATIVE, drelative))
    )
    dims = (0 if _MASK in shared else None, 0 if has_decay else None, 0 if RELATIVE in shared else None)
    return (*gradients, dmask, ddecay, drelative), (0, 0, 0, *dims)


_MASK = Call._fields.index("attn_mask")  # among the arguments of the operators


def _to_front(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _fold(size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[list[Any], int]:
    """The arguments with the mapped dimension folded into dimension 0, and that one's size."""
    if unflatten(args)[0].visibility.query_starts is not None:
        raise NotImplementedError("torch.vmap over sequences of variable length is not implemented")
    fronts = {i: _to_front(x, in_dims[i], size) for i, x in enumerate(args) if isinstance(x, Tensor)}
    if TILES in fronts:  # which are of no sequence, but of blocks of any of them
        if in_dims[TILES] is not None:
            raise NotImplementedError("torch.vmap over the mask_mod of a block mask is not implemented")
        del fronts[TILES]
    batch = max(x.shape[1] for i, x in fronts.items() if i != SEEDS)
    folded = list(args)
    for i, x in fronts.items():
        if i == SEEDS:  # of which each is for as many sequences of the batch as before
            folded[i] = x.flatten(0, 1)
            continue
        # A mask, slopes and biases by distance alone can have a batch dimension of one beside others, to be broadcast.
        folded[i] = x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)
    return folded, batch


def _unfold(results: Any, size: int, batch: int) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(0, (size, batch)) for x in results)


torch.library.register_vmap(ATTENTION, _vmap)
torch.library.register_vmap(BACKWARD, _vmap_backward)


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
    torch.library.impl(ATTENTION, _key, _autocast)
