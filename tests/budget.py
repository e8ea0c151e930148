"""The error budget: what a kernel's result may differ from the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from expressive_attention import expressive_attention
from expressive_attention.backends import BACKENDS
from expressive_attention.backends.cpu import library
from expressive_attention.backends.problem import accumulation_dtype

# What is judged: every fused backend, the C kernels in each of their builds that runs here.
FUSED = ("blockwise", *(f"cpu {build}" for build in library.BUILDS))

# All that run on the CPU; the kernels in Triton, which only an interpreter runs there, have their own tests.
ON_CPU = tuple(name for name in BACKENDS if name != "triton")

NAMES = ("output", "normalizer", "query", "key", "value", "mask")


@contextmanager
def fused(name: str) -> Iterator[str]:
    """The name for `expressive_attention` of one of `FUSED`, inside of the block."""
    backend, _, build = name.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if build:
            patch.setattr(library, "chosen", lambda: library.BUILDS[build])
        yield backend


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """So many threads inside of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        do, dn = do.to(self.query.dtype).double(), dn.float().double() * self.through_normalizer
        return do.to(self.query.device), dn.to(self.query.device)

    def log_factor(self) -> Tensor | None:
        """The logarithm of what the settings multiply weights by, ``(B, H, L, S)`` in float64, as it is defined.

        None: no more than `is_causal` says.
        """
        window = self.settings.get("window_size", (-1, -1))
        lengths, slopes = self.settings.get("key_lengths"), self.settings.get("alibi_slopes")
        if window == (-1, -1) and lengths is None and slopes is None:
            return None
        (batch, heads, rows), keys = self.query.shape[:3], self.key.shape[2]
        factor = torch.zeros(batch, heads, rows, keys, dtype=torch.float64, device=self.query.device)
        for b in range(batch):
            own = keys if lengths is None else int(lengths[b])
            place = torch.arange(rows, device=factor.device)[:, None]
            if self.settings.get("causal_alignment") == "lower_right":
                place = place + own - rows
            key = torch.arange(keys, device=factor.device)
            hidden = (key >= own).expand(rows, keys)
            left, right = window
            if left >= 0:
                hidden = hidden | (key < place - left)
            if right >= 0:
                hidden = hidden | (key > place + right)
            if self.settings.get("is_causal"):
                hidden = hidden | (key > place)
            if slopes is not None:
                own_slopes = slopes.double() if slopes.ndim == 1 else slopes[b].double()
                factor[b] -= own_slopes[:, None, None] * (place - key).abs()
            factor[b].masked_fill_(hidden, -torch.inf)
        return factor

    def results(self, backend: str, dtype: torch.dtype | None = None, *, explicit: bool = False) -> dict[str, Tensor]:
        """Output, normalizer and all gradients, computed in `dtype`, or in that of the inputs.

        With `explicit`, the keys that the settings hide, and how far they are, are in a mask.
        """

        def leaf(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            copy = x.detach() if dtype is None else x.detach().to(dtype)
            return copy.clone(memory_format=torch.preserve_format).requires_grad_()

        tensors = [leaf(x) for x in (self.query, self.key, self.value)]
        mask = None if self.mask is None else leaf(self.mask)
        settings, whole_mask = self.settings, mask
        factor = self.log_factor() if explicit else None
        if factor is not None:
            settings = {name: x for name, x in settings.items() if name in ("enable_gqa", "form", "scale")}
            whole_mask = factor.to(accumulation_dtype(tensors[0].dtype))
            if mask is not None and mask.is_floating_point():
                whole_mask = whole_mask + mask
            elif mask is not None:
                whole_mask = whole_mask.masked_fill(~mask, -torch.inf)
        output, normalizer = expressive_attention(
            *tensors, whole_mask, return_normalizer=True, backend=backend, **settings
        )
        wanted = [*tensors, *([mask] if mask is not None and mask.requires_grad else [])]
        do, dn = self.upstream()
        gradients = torch.autograd.grad(
            (output, normalizer), wanted, (do.to(output.dtype), dn.to(normalizer.dtype)), allow_unused=True
        )
        found = (output.detach(), normalizer.detach(), *gradients)
        return {name: x.to("cpu", torch.float64) for name, x in zip(NAMES, found, strict=False)}

    def roundings(self) -> dict[str, float]:
        """What one rounding may change in each result.

        Of the terms that add up to the result, and, in the dtype of the sums, of those that add up to the scores:
        where these cancel, z is less exact than its own last digit, and so is what follows from z.
        """
        q, k, v = (x.double() for x in (self.query, self.key, self.value))
        do, dn = self.upstream()
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scale = self.settings.get("scale") or 1 / math.sqrt(q.shape[-1])
        z = scale * q @ k.mT
        dz = abs(scale) * q.abs() @ k.abs().mT
        squared = self.settings.get("form") == "squared"
        r = torch.ones_like(z) if squared else 1 / (1 + z * z)
        slope = 2 * z.abs() * r * r
        curvature = torch.full_like(z, 2.0) if squared else (2 - 6 * z * z).abs() * r**3
        factor = torch.ones_like(z)
        if self.mask is not None:
            factor = factor * (self.mask.double().exp() if self.mask.is_floating_point() else self.mask)
        log_factor, peak = self.log_factor(), torch.zeros(())
        if log_factor is not None:
            # Rows far from their keys have small weights, of which all but the normalizer leaves out a common factor.
            peak = log_factor.amax(-1, keepdim=True) if log_factor.numel() else log_factor
            peak = torch.where(peak == -torch.inf, 0, peak)
            factor = factor * (log_factor - peak).exp()
        elif self.settings.get("is_causal"):
            lower_right = self.settings.get("causal_alignment") == "lower_right"
            factor = factor.tril(z.shape[-1] - z.shape[-2] if lower_right else 0)

        def per_total(x: Tensor) -> Tensor:
            return x / torch.where(total == 0, torch.inf, total)

        weight, dweight = z * z * r * factor, slope * dz * factor
        total, dtotal = weight.sum(-1, keepdim=True), dweight.sum(-1, keepdim=True)
        a = per_total(weight)
        da = per_total(dweight) + a * per_total(dtotal)
        upstream = do.abs() @ v.abs().mT
        g = upstream + (a * upstream).sum(-1, keepdim=True)
        dg = g * per_total(dtotal) + (da * upstream).sum(-1, keepdim=True)
        g, dg = per_total(g) + dn.abs().unsqueeze(-1), per_total(dg)
        ds = abs(scale) * factor * slope * g
        dds = abs(scale) * factor * (curvature * dz * g + slope * dg)

        def largest(total: Tensor, a: Tensor, ds: Tensor, bias: Tensor) -> dict[str, float]:
            results = {
                "output": a @ v.abs(),
                "normalizer": total * peak.exp(),
                "query": ds @ k.abs(),
                "key": (ds.mT @ q.abs()).unflatten(1, (-1, groups)).sum(2),
                "value": (a.mT @ do.abs()).unflatten(1, (-1, groups)).sum(2),
            }
            if self.mask is not None:
                results["mask"] = bias.sum_to_size((1,) * (4 - self.mask.ndim) + tuple(self.mask.shape))
            return {name: float(x.max()) if x.numel() else 0.0 for name, x in results.items()}

        own = largest(total, a, ds, weight * g)
        of_scores = largest(dtotal, da, dds, dweight * g + weight * dg)
        return {name: self.eps(name) * own[name] + self.eps("normalizer") * of_scores[name] for name in own}

    def eps(self, result: str) -> float:
        """The relative size of a rounding of a result; in float64, where the judge itself rounds, of several."""
        dtype = self.query.dtype
        if result == "normalizer":
            dtype = torch.promote_types(dtype, torch.float32)
        elif result == "mask" and self.mask is not None and self.mask.is_floating_point():
            dtype = self.mask.dtype
        return torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)


def assert_within_budget(case: Case, *backends: str) -> None:
    """Each of `FUSED`: at most twice the error of the reference in the same dtype, plus one rounding."""
    exact = case.results("reference", torch.float64, explicit=True)
    plain = case.results("reference", explicit=True)
    roundings = case.roundings()
    for name in backends:
        with fused(name) as backend:
            got = case.results(backend)
        for result, want in exact.items():
            if want.numel() == 0:
                assert got[result].shape == want.shape
                continue
            budget = 2 * (plain[result] - want).abs().max() + roundings[result]
            error = (got[result] - want).abs().max()
            largest = want.abs().max()
            assert error <= budget, f"{name}, {result}: error {error:.3g}, budget {budget:.3g}, largest {largest:.3g}"
