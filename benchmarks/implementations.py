"""Our operator and its rivals. For a problem, each makes the timed function of query, key and value."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import onnx_runtime as onnx
from expressive_attention import expressive_attention, expressive_attention_varlen
from expressive_attention.backends import AUTOMATIC, BACKENDS
from expressive_attention.call import Call, Result, Upstream, Visibility
from problems import Problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """An implementation to time; if `expressive`, it computes expressive attention and is checked."""

    name: str
    make: Callable[[Problem], Attention]
    expressive: bool = True
    softmax: bool = False  # computes what SDPA does, and is checked against it
    fits: Callable[[Problem], bool] = lambda problem: True  # whether it takes part
    on: Callable[[Problem], Problem] = lambda problem: problem  # the problem that it is given in place of one


def run(attention: Attention, inputs: Sequence[Tensor], upstream: Tensor | None) -> list[Tensor]:
    """Return the output and, with `upstream`, the gradients of one call."""
    query, key, value = inputs
    if upstream is None:
        with torch.no_grad():
            return [attention(query, key, value)]
    output = attention(query, key, value)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def prepared(attention: Attention, problem: Problem, inputs: Sequence[Tensor], upstream: Tensor | None):
    """Return the function to time, which gives the output and the gradients of one call."""
    if not problem.backward_alone:
        return partial(run, attention, inputs, upstream)
    output = attention(*inputs)
    return lambda: [output.detach(), *torch.autograd.grad(output, inputs, upstream, retain_graph=True)]


def automatic(dtype: torch.dtype, device: str = "cpu") -> str:
    """The backend that expressive_attention chooses by default for `dtype`."""
    return next(name for name in AUTOMATIC if why_not(name, dtype, device) is None)


def why_not(backend: str, dtype: torch.dtype, device: str = "cpu") -> str | None:
    """Why `backend` does not run `dtype` on the device; None if it does."""
    x = torch.empty(1, 1, 1, 1, dtype=dtype, device=device)
    return BACKENDS[backend].declines(Call(x, x, x, None, Visibility(), 1.0, "expressive"))


def ours(backend: str | None, dtype: torch.dtype, device: str = "cpu") -> Implementation:
    """Expressive attention with the named backend, or by default as a user calls it."""
    return Implementation(backend or automatic(dtype, device), _expressive(backend))


def _expressive(backend: str | None) -> Callable[[Problem], Attention]:
    def make(problem: Problem) -> Attention:
        if problem.lengths:
            return _packed(problem, backend)
        return _drawn_anew(problem, partial(expressive_attention, **problem.settings(), backend=backend))

    return make


def _packed(problem: Problem, backend: str | None) -> Attention:
    starts = torch.tensor([0, *itertools.accumulate(problem.lengths)], dtype=torch.int32, device=problem.device)
    longest = max(problem.lengths)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        output = expressive_attention_varlen(
            q, k, v, starts, starts, longest, longest, causal=problem.causal, backend=backend
        )
        return output.transpose(0, 1).unsqueeze(0)

    return attention


def _drawn_anew(problem: Problem, attention: Attention) -> Attention:
    """With the same weights dropped at every call, as the check of errors needs it."""
    if not problem.dropout_p:
        return attention

    def seeded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(0)
        return attention(query, key, value)

    return seeded


def _sdpa(problem: Problem) -> Attention:
    if problem.lengths:
        return partial(_sdpa_one_by_one, problem)
    settings = {name: x for name, x in problem.settings().items() if name != "alibi_slopes"}
    slopes = problem.slopes()
    if slopes is not None:
        place = torch.arange(problem.shape[2], device=problem.device)
        bias = -slopes[:, None, None] * (place[:, None] - place).abs()
        settings["attn_mask"] = bias.masked_fill(place > place[:, None], -torch.inf) if problem.causal else bias
        settings["is_causal"] = False
    return partial(F.scaled_dot_product_attention, **settings)


def _sdpa_one_by_one(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = zip(*(x.split(problem.lengths, 2) for x in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=problem.causal) for part in parts], 2)


def _sdpa_padded(problem: Problem) -> Attention:
    """SDPA of a batch that is padded to the longest sequence, and its rows without the padding."""
    longest, lengths = max(problem.lengths), torch.tensor(problem.lengths)
    place = torch.arange(longest)
    exists = place < lengths[:, None]
    mask = (exists[:, None, :] & (place <= place[:, None]))[:, None] if problem.causal else exists[:, None, None]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        padded = []
        for x in (query, key, value):
            batch = x.new_zeros(len(lengths), longest, *x.shape[1:2], x.shape[3])
            padded.append(batch.masked_scatter(exists[..., None, None], x[0].transpose(0, 1)).transpose(1, 2))
        output = F.scaled_dot_product_attention(*padded, attn_mask=mask)
        return output.transpose(1, 2)[exists].transpose(0, 1).unsqueeze(0)

    return attention


def _forced(backend: SDPBackend) -> Callable[[Problem], Attention]:
    """SDPA forced to one of its own backends."""

    def make(problem: Problem) -> Attention:
        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=problem.causal)

        return attention

    return make


def _twin(problem: Problem) -> Attention:
    """Our own kernels with exp in place of f, and no maximum, to show the cost of f."""
    from expressive_attention.backends import triton

    settings = (None, Visibility(right=0 if problem.causal else None), problem.shape[-1] ** -0.5, "exponential")

    class Twin(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            result = triton.forward(Call(query, key, value, *settings))
            ctx.save_for_backward(query, key, value, *result[:2])
            return result.output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            query, key, value, output, normalizer = ctx.saved_tensors
            call = Call(query, key, value, *settings)
            return triton.backward(call, Result(output, normalizer, None), Upstream(gradients[0], None, False))[:3]

    return Twin.apply


def flex(problem: Problem, block_mask: BlockMask | None = None) -> Attention:
    """FlexAttention: the softmax of log f(z) is f(z) over its sum. The blocks of a causal problem are its own."""
    functorch_config.donated_buffer = not problem.backward_alone  # repeated backward needs the buffers
    torch.compiler.reset()  # compile one static function per problem

    def log_weight(z: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = z * z
        return torch.log(s) - torch.log1p(s)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    length = problem.shape[2]
    if problem.causal:
        block_mask = create_block_mask(visible, None, None, length, length, device=problem.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = compiled(query, key, value, score_mod=log_weight, block_mask=block_mask)
        assert isinstance(output, Tensor)
        return output

    return attention


def _formula(problem: Problem) -> Attention:
    """Expressive attention as a plain formula."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        z = (query @ key.mT) * query.shape[-1] ** -0.5
        weight = z * z / (1 + z * z)
        if problem.causal:
            weight = weight.tril()
        return weight / weight.sum(-1, keepdim=True) @ value

    return attention


SDPA = Implementation("sdpa", _sdpa, expressive=False)
RIVALS = (
    SDPA,
    Implementation("padded", _sdpa_padded, expressive=False, fits=lambda problem: bool(problem.lengths)),
    Implementation("flex", flex, fits=lambda problem: problem.is_plain),
    Implementation("formula", _formula, fits=lambda problem: problem.is_plain),
    Implementation("onnx", onnx.attention, expressive=False, softmax=True, fits=onnx.fits),
    # Ours: what dropout, a bias and 16 bits cost.
    Implementation("plain", _expressive(None), fits=lambda problem: problem != problem.plain(), on=Problem.plain),
    Implementation(
        "float32",
        _expressive(None),
        fits=lambda problem: problem.goal.float32 is not None,
        on=lambda problem: replace(problem, dtype=torch.float32),
    ),
)
GPU_RIVALS = (
    Implementation("flash", _forced(SDPBackend.FLASH_ATTENTION), expressive=False),
    Implementation("cudnn", _forced(SDPBackend.CUDNN_ATTENTION), expressive=False),
    Implementation("flex", flex),
    Implementation("twin", _twin, expressive=False),
)
