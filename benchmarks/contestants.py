"""Ours and its rivals: each makes, for a problem, the function of query, key and value that is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from expressive_attention import expressive_attention
from expressive_attention.backends import AUTOMATIC, BACKENDS
from expressive_attention.backends import problem as backends_problem
from problems import Problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """Something to time; `expressive`: it computes expressive attention, which is then checked."""

    name: str
    make: Callable[[Problem], Attention]
    expressive: bool = True


def run(attention: Attention, inputs: Sequence[Tensor], upstream: Tensor | None) -> list[Tensor]:
    """The output and, with `upstream`, the gradients of one call."""
    query, key, value = inputs
    if upstream is None:
        with torch.no_grad():
            return [attention(query, key, value)]
    output = attention(query, key, value)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def automatic(dtype: torch.dtype) -> str:
    """The backend that expressive_attention chooses by itself for `dtype` on the CPU."""
    return next(name for name in AUTOMATIC if why_not(name, dtype) is None)


def why_not(backend: str, dtype: torch.dtype) -> str | None:
    """Why `backend` does not run `dtype` on the CPU; None: it does."""
    return BACKENDS[backend].supports(backends_problem.Problem("cpu", dtype))


def ours(backend: str | None, dtype: torch.dtype) -> Contestant:
    """Expressive attention as a user calls it, or by the backend of that name."""

    def make(problem: Problem) -> Attention:
        return partial(expressive_attention, is_causal=problem.causal, backend=backend)

    return Contestant(backend or automatic(dtype), make)


def _sdpa(problem: Problem) -> Attention:
    return partial(F.scaled_dot_product_attention, is_causal=problem.causal)


def _flex(problem: Problem) -> Attention:
    """FlexAttention: the softmax of log f(z) is f(z) over its sum."""
    torch.compiler.reset()  # one compiled function per problem, and none of them dynamic

    def log_weight(z: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = z * z
        return torch.log(s) - torch.log1p(s)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    length = problem.shape[2]
    block_mask = create_block_mask(visible, None, None, length, length, device="cpu") if problem.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = compiled(query, key, value, score_mod=log_weight, block_mask=block_mask)
        assert isinstance(output, Tensor)
        return output

    return attention


def _formula(problem: Problem) -> Attention:
    """Expressive attention as one would write it first."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        z = (query @ key.mT) * query.shape[-1] ** -0.5
        weight = z * z / (1 + z * z)
        if problem.causal:
            weight = weight.tril()
        return weight / weight.sum(-1, keepdim=True) @ value

    return attention


SDPA = Contestant("sdpa", _sdpa, expressive=False)
RIVALS = (SDPA, Contestant("flex", _flex), Contestant("formula", _formula))
