"""The error budget: what a kernel's result may differ from the definition in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expressive_attention import expressive_attention

NAMES = ("output", "normalizer", "query", "key", "value", "mask")


@dataclass
class Case:
    """Inputs ``(B, H, L, E)`` of a call, and whether its normalizer takes part in the gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    through_normalizer: bool = True

    def upstream(self) -> tuple[Tensor, Tensor]:
        """Upstream gradients of output and normalizer, in float64."""
        generator = torch.Generator().manual_seed(0)
        rows = self.query.shape[:-1]
        do = torch.randn(*rows, self.value.shape[-1], generator=generator, dtype=torch.float64)
        dn = torch.randn(rows, generator=generator, dtype=torch.float64)
        return do.to(self.query.dtype).double(), dn.float().double() * self.through_normalizer

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output, normalizer and all gradients, computed in `dtype`, or in that of the inputs."""

        def leaf(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            copy = x.detach() if dtype is None else x.detach().to(dtype)
            return copy.clone(memory_format=torch.preserve_format).requires_grad_()

        tensors = [leaf(x) for x in (self.query, self.key, self.value)]
        mask = None if self.mask is None else leaf(self.mask)
        output, normalizer = expressive_attention(
            *tensors, mask, return_normalizer=True, backend=backend, **self.settings
        )
        wanted = [*tensors, *([mask] if mask is not None and mask.requires_grad else [])]
        do, dn = self.upstream()
        gradients = torch.autograd.grad(
            (output, normalizer), wanted, (do.to(output.dtype), dn.to(normalizer.dtype)), allow_unused=True
        )
        found = (output.detach(), normalizer.detach(), *gradients)
        return {name: x.to(torch.float64) for name, x in zip(NAMES, found, strict=False)}

    def terms(self) -> dict[str, float]:
        """The largest sum of absolute values of the terms that add up to a result: what a rounding is one of."""
        q, k, v = (x.double() for x in (self.query, self.key, self.value))
        do, dn = self.upstream()
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scale = self.settings.get("scale") or 1 / math.sqrt(q.shape[-1])
        z = scale * q @ k.mT
        r = 1 / (1 + z * z) if self.settings.get("form") != "squared" else torch.ones_like(z)
        factor = torch.ones_like(z)
        if self.mask is not None:
            factor = factor * (self.mask.double().exp() if self.mask.is_floating_point() else self.mask)
        if self.settings.get("is_causal"):
            lower_right = self.settings.get("causal_alignment") == "lower_right"
            factor = factor.tril(z.shape[-1] - z.shape[-2] if lower_right else 0)
        weight = z * z * r * factor
        total = weight.sum(-1, keepdim=True)
        attention = weight / torch.where(total == 0, torch.inf, total)
        g = do.abs() @ v.abs().mT
        g = (g + (attention * g).sum(-1, keepdim=True)) / torch.where(total == 0, torch.inf, total)
        g = g + dn.abs().unsqueeze(-1)
        ds = abs(scale) * 2 * z.abs() * r * r * factor * g
        sums = {
            "output": attention @ v.abs(),
            "normalizer": total,
            "query": ds @ k.abs(),
            "key": (ds.mT @ q.abs()).unflatten(1, (-1, groups)).sum(2),
            "value": (attention.mT @ do.abs()).unflatten(1, (-1, groups)).sum(2),
        }
        if self.mask is not None:
            sums["mask"] = (weight * g).sum_to_size((1,) * (4 - self.mask.ndim) + tuple(self.mask.shape))
        return {name: float(x.max()) if x.numel() else 0.0 for name, x in sums.items()}


def assert_within_budget(case: Case, backend: str) -> None:
    """At most twice the error of the reference in the same dtype, plus one rounding of the terms summed."""
    exact = case.results("reference", torch.float64)
    plain = case.results("reference")
    got = case.results(backend)
    terms = case.terms()
    dtypes = {"normalizer": torch.promote_types(case.query.dtype, torch.float32)}
    if case.mask is not None:
        dtypes["mask"] = case.mask.dtype
    for name, want in exact.items():
        if want.numel() == 0:
            assert got[name].shape == want.shape
            continue
        eps = torch.finfo(dtypes.get(name, case.query.dtype)).eps
        # In float64 the judge itself rounds, each of its sums several times.
        roundings = 16 if eps == torch.finfo(torch.float64).eps else 1
        budget = 2 * (plain[name] - want).abs().max() + roundings * eps * terms[name]
        error = (got[name] - want).abs().max()
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}, largest {want.abs().max():.3g}"
