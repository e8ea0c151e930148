"""The error check of the benchmarks, with the error budget of the tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from expressive_attention import expressive_attention
from implementations import run


class Judge:
    """Expected results of a problem's last head: output and, with `upstream`, gradients of query, key and value.

    A result may differ from the float64 reference by twice the error of the reference in the problem's dtype, plus one
    rounding of the terms that add up to it.
    """

    def __init__(self, inputs: Sequence[Tensor], upstream: Tensor | None, causal: bool) -> None:
        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return expressive_attention(q, k, v, is_causal=causal, backend="reference")

        def results(dtype: torch.dtype) -> list[Tensor]:
            copies = [_last_head(x).to(dtype, copy=True).requires_grad_(upstream is not None) for x in inputs]
            return run(reference, copies, None if upstream is None else _last_head(upstream).to(dtype))

        dtype = inputs[0].dtype
        self._exact = results(torch.float64)
        eps = torch.finfo(dtype).eps
        self.budgets = [
            2 * float((got - want).abs().max()) + eps * term
            for got, want, term in zip(results(dtype), self._exact, terms(inputs, upstream, causal), strict=True)
        ]

    def error(self, results: Sequence[Tensor]) -> float:
        """Largest error as a share of its budget: red above 1, and NaN if a result is NaN."""
        shares = [
            float((_last_head(got) - want).abs().max()) / budget
            for got, want, budget in zip(results, self._exact, self.budgets, strict=True)
        ]
        return math.nan if any(map(math.isnan, shares)) else max(shares)


def terms(inputs: Sequence[Tensor], upstream: Tensor | None, causal: bool) -> list[float]:
    """The largest sum of absolute values of the terms that add up to each result of the last head."""
    q, k, v = (_last_head(x).double() for x in inputs)
    scale = 1 / math.sqrt(q.shape[-1])
    z = scale * q @ k.mT
    r = 1 / (1 + z * z)
    weight = z * z * r
    if causal:
        weight, r = weight.tril(), r.tril()
    total = weight.sum(-1, keepdim=True)
    attention = weight / total
    sums = [attention @ v.abs()]
    if upstream is not None:
        do = _last_head(upstream).double()
        g = do.abs() @ v.abs().mT
        ds = scale * 2 * z.abs() * r * r * (g + (attention * g).sum(-1, keepdim=True)) / total
        sums += [ds @ k.abs(), ds.mT @ q.abs(), attention.mT @ do.abs()]
    return [float(x.max()) for x in sums]


def _last_head(x: Tensor) -> Tensor:
    return x.detach()[-1:, -1:]
