"""The error check of the benchmarks, with the error budget of the tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from expressive_attention import expressive_attention
from expressive_attention.backends import dropout
from expressive_attention.call import Call, Visibility
from implementations import run
from problems import Problem


class Settings(NamedTuple):
    """Factors of the weights of the last head, in float64: ``(1, 1, L, S)`` or None.

    Attributes:
        bias: The logarithm of a factor before normalization.
        kept: 1 / (1 - p) where dropout keeps the weight, else 0.
    """

    bias: Tensor | None = None
    kept: Tensor | None = None


def judged_settings(problem: Problem) -> Settings:
    """The settings of the last head of a problem, whose calls draw from the generator of torch with the seed 0."""
    b, h, length, _ = problem.shape
    keys = problem.keys or length
    bias, slopes, kept = problem.mask(), problem.slopes(), None
    if bias is not None:
        bias = bias[-1:, -1:].double()
    elif slopes is not None:
        rows, columns = torch.arange(length)[:, None], torch.arange(keys)
        bias = (-slopes[-1].double() * (rows - columns).abs())[None, None]
    if problem.lengths:
        sequence = torch.arange(len(problem.lengths)).repeat_interleave(torch.tensor(problem.lengths))
        bias = torch.zeros(1, 1, length, keys, dtype=torch.float64)
        bias.masked_fill_(sequence[:, None] != sequence, -torch.inf)
    if problem.dropout_p:
        torch.manual_seed(0)
        query, key, value = problem.inputs()
        seeds = dropout.draw(query)
        call = Call(query, key, value, None, Visibility(), 1.0, "expressive", problem.dropout_p, seeds)
        places = (torch.tensor([b - 1]), torch.tensor([h - 1]), torch.arange(length), torch.arange(keys))
        kept = dropout.kept(call, *places).double() / dropout.keep_share(problem.dropout_p)
    return Settings(bias, kept)


class Judge:
    """Expected results of a problem's last head: output and, with `upstream`, gradients of query, key and value.

    A result may differ from the float64 reference by twice the error of the reference in the problem's dtype, plus one
    rounding of the terms that add up to it. With `softmax`, the reference is that of dot-product attention.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        upstream: Tensor | None,
        causal: bool,
        settings: Settings | None = None,
        *,
        softmax: bool = False,
    ) -> None:
        settings = Settings() if settings is None else settings

        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = None if settings.bias is None else settings.bias.to(q.dtype)
            if softmax:
                with sdpa_kernel(SDPBackend.MATH):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            if settings.kept is None:
                return expressive_attention(q, k, v, bias, is_causal=causal, backend="reference")
            each = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
            weights = expressive_attention(q, k, each, bias, is_causal=causal, backend="reference")
            return weights * settings.kept.to(q.dtype) @ v

        def results(dtype: torch.dtype) -> list[Tensor]:
            copies = [_last_head(x).to(dtype, copy=True).requires_grad_(upstream is not None) for x in inputs]
            return run(reference, copies, None if upstream is None else _last_head(upstream).to(dtype))

        dtype = inputs[0].dtype
        self._exact = results(torch.float64)
        eps = torch.finfo(dtype).eps
        sizes = terms(inputs, upstream, causal, settings, softmax=softmax)
        self.budgets = [
            2 * float((got - want).abs().max()) + eps * term
            for got, want, term in zip(results(dtype), self._exact, sizes, strict=True)
        ]

    def error(self, results: Sequence[Tensor]) -> float:
        """Largest error as a share of its budget: red above 1, and NaN if a result is NaN."""
        shares = [
            float((_last_head(got) - want).abs().max()) / budget
            for got, want, budget in zip(results, self._exact, self.budgets, strict=True)
        ]
        return math.nan if any(map(math.isnan, shares)) else max(shares)


def terms(
    inputs: Sequence[Tensor],
    upstream: Tensor | None,
    causal: bool,
    settings: Settings | None = None,
    *,
    softmax: bool = False,
) -> list[float]:
    """The largest sum of absolute values of the terms that add up to each result of the last head."""
    settings = Settings() if settings is None else settings
    q, k, v = (_last_head(x).double() for x in inputs)
    scale = 1 / math.sqrt(q.shape[-1])
    z = scale * q @ k.mT
    r = 1 / (1 + z * z)
    weight = (z - z.amax(-1, keepdim=True)).exp() if softmax else z * z * r
    if settings.bias is not None:
        factor = (settings.bias - settings.bias.amax(-1, keepdim=True)).exp()
        weight, r = weight * factor, r * factor.sqrt()
    if causal:
        weight, r = weight.tril(), r.tril()
    total = weight.sum(-1, keepdim=True)
    attention = weight / total
    kept = 1.0 if settings.kept is None else settings.kept
    sums = [attention * kept @ v.abs()]
    if upstream is not None:
        do = _last_head(upstream).double()
        g = do.abs() @ v.abs().mT * kept
        ds = scale * 2 * z.abs() * r * r * (g + (attention * g).sum(-1, keepdim=True)) / total
        sums += [ds @ k.abs(), ds.mT @ q.abs(), (attention * kept).mT @ do.abs()]
    return [float(x.max()) for x in sums]


def _last_head(x: Tensor) -> Tensor:
    return x.detach()[-1:, -1:]
