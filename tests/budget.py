"""The error budget: what a kernel's result may differ from the definition in float64."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from expressive_attention import expressive_attention
from expressive_attention.backends import BACKENDS, dropout
from expressive_attention.backends.cpu import library
from expressive_attention.call import Call, Visibility, accumulation_dtype
from tests.blocks import seen
from tests.poison import Poison, placed

# Every fused backend is judged, the C kernels in each of their builds that runs here.
FUSED = ("blockwise", *(f"cpu {build}" for build in library.BUILDS))

# The squared form in linear time, in C and in torch.
LINEAR = ("linear torch", *(f"linear {build}" for build in library.BUILDS))

# All that run on the CPU; the kernels in Triton, which only an interpreter runs there, have their own tests.
ON_CPU = tuple(name for name in BACKENDS if name not in ("triton", "linear"))

NAMES = ("output", "normalizer", "query", "key", "value")

# A sanitizer watches the C kernels run. Runs without it judge their results, which takes most of the time.
RUN_ONLY = "EXPRESSIVE_ATTENTION_SANITIZED" in os.environ


@contextmanager
def fused(name: str) -> Iterator[str]:
    """The name for `expressive_attention` of one of `FUSED` or `LINEAR`, inside of the block."""
    backend, _, build = name.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if build == "torch":
            patch.setattr(library, "MISSING", "a test")
            patch.setattr(BACKENDS["triton"], "declines", lambda call: "a test")  # which an interpreter may run here
        elif build == "triton":
            patch.setattr(library, "MISSING", "a test")
        elif build:
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


@contextmanager
def drawing() -> Iterator[None]:
    """The same random numbers for every call inside of the block, and others after it."""
    # Not by torch.manual_seed and fork_rng, which take longer than a small problem.
    generators = [torch.default_generator, *torch.cuda.default_generators]
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(0)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


@dataclass
class Case:
    """A call, and how it is judged.

    Attributes:
        query: ``(B, Hq, L, E)``.
        key: ``(B, Hkv, S, E)``.
        value: ``(B, Hkv, S, Ev)``.
        mask: Broadcastable to ``(B, Hq, L, S)``, bool or floating, or None.
        settings: Further arguments of `expressive_attention`.
        through_normalizer: Whether the normalizer takes part in the gradient.
        poison: The poison that is put into the inputs of those that are judged.
        margin: How many numbers before and after each tensor hold NaN.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    through_normalizer: bool = True
    poison: Poison | None = None
    margin: int = 0

    @property
    def log_decay(self) -> Tensor | None:
        """``(B | 1, H, S)``, from the settings."""
        return self.settings.get("log_decay")

    def upstream(self) -> tuple[Tensor, Tensor]:
        """Upstream gradients of output and normalizer, in float64."""
        generator = torch.Generator().manual_seed(0)
        rows = self.query.shape[:-1]
        do = torch.randn(*rows, self.value.shape[-1], generator=generator, dtype=torch.float64)
        dn = torch.randn(rows, generator=generator, dtype=torch.float64)
        do, dn = do.to(self.query.dtype).double(), dn.float().double() * self.through_normalizer
        return do.to(self.query.device), dn.to(self.query.device)

    def distances(self, b: int) -> Tensor:
        """How far the keys of a sequence are before each query, ``(L, S)``."""
        rows, keys, lengths = self.query.shape[2], self.key.shape[2], self.settings.get("key_lengths")
        place = torch.arange(rows, device=self.query.device)[:, None]
        if self.settings.get("causal_alignment") == "lower_right":
            place = place + (keys if lengths is None else int(lengths[b])) - rows
        return place - torch.arange(keys, device=place.device)

    def by_distance(self, b: int, table: Tensor) -> Tensor:
        """The biases of a table ``(H | 1, 2 M - 1)`` for the pairs of a sequence, ``(H | 1, L, S)``; 0 beyond it."""
        index = self.distances(b) + table.shape[-1] // 2
        return torch.where((index >= 0) & (index < table.shape[-1]), table[:, index.clamp(0, table.shape[-1] - 1)], 0.0)

    def visibility_bias(self, relative: Tensor | None = None) -> Tensor:
        """The logarithm of what the settings multiply weights by, ``(B, H, L, S)`` in float64, as it is defined.

        Args:
            relative: Takes the place of the biases by distance.
        """
        relative = self.settings.get("relative_bias") if relative is None else relative
        left, right = self.settings.get("window_size", (-1, -1))
        block_mask = self.settings.get("block_mask")
        lengths, slopes = self.settings.get("key_lengths"), self.settings.get("alibi_slopes")
        decay = self.log_decay
        (batch, heads, rows), keys = self.query.shape[:3], self.key.shape[2]
        factor = torch.zeros(batch, heads, rows, keys, dtype=torch.float64, device=self.query.device)
        for b in range(batch):
            own = keys if lengths is None else int(lengths[b])
            place = torch.arange(rows, device=factor.device)[:, None]
            if self.settings.get("causal_alignment") == "lower_right":
                place = place + own - rows
            key = torch.arange(keys, device=factor.device)
            hidden = (key >= own).expand(rows, keys)
            if left >= 0:
                hidden = hidden | (key < place - left)
            if right >= 0:
                hidden = hidden | (key > place + right)
            if self.settings.get("is_causal"):
                hidden = hidden | (key > place)
            if decay is not None:
                total = decay.expand(batch, -1, -1)[b].double().cumsum(-1)
                total = total.repeat_interleave(heads // total.shape[0], 0)
                here = total[:, place[:, 0].clamp(max=own - 1).clamp(min=0)] if keys else total.new_zeros(heads, rows)
                factor[b] += here.unsqueeze(-1) - total.unsqueeze(-2)
            if slopes is not None:
                own_slopes = slopes.double() if slopes.ndim == 1 else slopes[b].double()
                factor[b] -= own_slopes[:, None, None] * (place - key).abs()
            if relative is not None:
                table = relative if relative.ndim == 2 else relative[b]
                factor[b] += self.by_distance(b, table.double())
            factor[b].masked_fill_(hidden, -torch.inf)
        if block_mask is not None:
            factor.masked_fill_(~seen(block_mask, *factor.shape).to(factor.device), -torch.inf)
        return factor

    def bias(self) -> Tensor:
        """The logarithm of what the settings and the mask multiply weights by, ``(B, H, L, S)``; -inf: hidden."""
        factor = self.visibility_bias()
        if self.mask is None:
            return factor
        if self.mask.is_floating_point():
            return torch.where(factor == -torch.inf, factor, factor + self.mask)
        return factor.masked_fill(~self.mask, -torch.inf)

    def kept(self) -> Tensor:
        """The factors by which dropout multiplies weights, ``(B, H, L, S)`` in float64."""
        p = self.settings.get("dropout_p", 0.0)
        shape = (*self.query.shape[:3], self.key.shape[2])
        if not p:
            return torch.ones(shape, dtype=torch.float64, device=self.query.device)
        with drawing():
            seeds = dropout.draw(self.query)
        call = Call(self.query, self.key, self.value, None, Visibility(), 1.0, "expressive", p, seeds)
        return dropout.kept_weights(torch.ones(shape, dtype=torch.float64, device=self.query.device), call)

    def visible(self) -> Tensor:
        """Which pairs ``(B, H, L, S)`` are not hidden."""
        return self.bias() > -torch.inf

    def results(self, backend: str, dtype: torch.dtype | None = None, *, explicit: bool = False) -> dict[str, Tensor]:
        """Output, normalizer and all gradients, computed in `dtype`, or in that of the inputs.

        With `explicit`, the keys that the settings hide, and how far they are, are in a mask.
        """

        def leaf(x: Tensor) -> Tensor:
            if x.is_floating_point() and dtype is not None:
                return x.detach().to(dtype).requires_grad_()
            copy = placed(x.detach(), self.margin)
            return copy.requires_grad_(x.is_floating_point())

        tensors = [leaf(x) for x in (self.query, self.key, self.value)]
        mask = None if self.mask is None else leaf(self.mask)
        settings, whole_mask = dict(self.settings), mask
        decay = None if self.log_decay is None else leaf(self.log_decay)
        if decay is not None:
            settings["log_decay"] = decay
        relative = None if settings.get("relative_bias") is None else leaf(settings["relative_bias"])
        if relative is not None:
            settings["relative_bias"] = relative
        named = ("window_size", "key_lengths", "alibi_slopes", "relative_bias", "block_mask")
        if decay is None and explicit and any(name in settings for name in named):
            settings = {name: x for name, x in settings.items() if name in ("enable_gqa", "form", "scale", "dropout_p")}
            whole_mask = self.visibility_bias(relative).to(accumulation_dtype(tensors[0].dtype))
            if mask is not None and mask.is_floating_point():
                whole_mask = whole_mask + mask
            elif mask is not None:
                whole_mask = whole_mask.masked_fill(~mask, -torch.inf)
        with drawing():
            output, normalizer = expressive_attention(
                *tensors, whole_mask, return_normalizer=True, backend=backend, **settings
            )
        others = {"mask": mask, "decay": decay, "relative": relative}
        others = {name: x for name, x in others.items() if x is not None and x.requires_grad}
        names, wanted = [*NAMES, *others], [*tensors, *others.values()]
        do, dn = self.upstream()
        outputs, upstream = [output], [placed(do.to(output.dtype), self.margin)]
        if self.through_normalizer:
            outputs, upstream = [output, normalizer], [*upstream, placed(dn.to(normalizer.dtype), self.margin)]
        # A table in a mask of no sequences is in no graph.
        gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=explicit, materialize_grads=explicit)
        found = (output.detach(), normalizer.detach(), *gradients)
        return {name: x.to("cpu", torch.float64) for name, x in zip(names, found, strict=True)}

    def roundings(self) -> dict[str, float]:
        """The change of each result that one rounding may make.

        It is one of the terms that add up to the result, and, in the dtype of the sums, of those that add up to the
        scores: where these cancel, z is less exact than its own last digit, and so is what follows from z.
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
        bias = self.bias()
        # Backends leave out the largest bias of a key that is seen and has a weight: it is in the normalizer alone.
        bias_max = bias.masked_fill(z == 0, -torch.inf)
        bias_max = torch.nn.functional.pad(bias_max, (0, 1), value=-torch.inf).amax(-1, keepdim=True)
        bias_max = torch.where(bias_max == -torch.inf, 0, bias_max)
        factor = (bias - bias_max).clamp(max=0.0).exp()
        # The sum of two biases is rounded.
        dbias = torch.zeros_like(z)
        distances = [self.settings.get(name) for name in ("alibi_slopes", "relative_bias", "log_decay")]
        if any(x is not None for x in distances):
            dbias = torch.where(factor == 0, 0.0, bias.abs() + self.visibility_bias().abs() + bias_max.abs())
            dbias = dbias.clamp(max=1e100)  # a judge that overflows refuses every result: 0 * inf

        def per_total(x: Tensor) -> Tensor:
            return x / torch.where(total == 0, torch.inf, total)

        weight = z * z * r * factor
        dweight = slope * dz * factor + weight * dbias
        total, dtotal = weight.sum(-1, keepdim=True), dweight.sum(-1, keepdim=True)
        a = per_total(weight)
        da = per_total(dweight) + a * per_total(dtotal)
        kept = self.kept()
        upstream = kept * (do.abs() @ v.abs().mT)
        g = upstream + (a * upstream).sum(-1, keepdim=True)
        dg = g * per_total(dtotal) + (da * upstream).sum(-1, keepdim=True)
        g, dg = per_total(g) + dn.abs().unsqueeze(-1), per_total(dg)
        ds = abs(scale) * factor * slope * g
        dds = abs(scale) * factor * (curvature * dz * g + slope * (dg + dbias * g))

        def largest(total: Tensor, a: Tensor, ds: Tensor, bias: Tensor) -> dict[str, float]:
            results = {
                "output": (a * kept) @ v.abs(),
                "normalizer": total * bias_max.exp(),
                "query": ds @ k.abs(),
                "key": (ds.mT @ q.abs()).unflatten(1, (-1, groups)).sum(2),
                "value": ((a * kept).mT @ do.abs()).unflatten(1, (-1, groups)).sum(2),
            }
            if self.mask is not None:
                results["mask"] = bias.sum_to_size((1,) * (4 - self.mask.ndim) + tuple(self.mask.shape))
            table = self.settings.get("relative_bias")
            if table is not None and bias.numel():
                sums = bias.new_zeros(bias.shape[1], table.shape[-1])
                for b, pairs in enumerate(torch.where(self.visible(), bias, 0.0)):
                    index = (self.distances(b) + table.shape[-1] // 2).clamp(0, table.shape[-1] - 1)
                    sums.index_add_(1, index.flatten(), pairs.flatten(1))
                results["relative"] = sums.sum_to_size(table.shape[-2:]) if table.ndim == 2 else sums
            elif table is not None:
                results["relative"] = bias.new_zeros(1)
            if self.log_decay is not None:
                results["decay"] = bias.sum((-2, -1))  # of any part of the keys and of the rows after them
            return {name: float(x.max()) if x.numel() else 0.0 for name, x in results.items()}

        own = largest(total, a, ds, weight * g)
        of_scores = largest(dtotal, da, dds, dweight * g + weight * dg)
        return {name: self.eps(name) * own[name] + self.eps("normalizer") * of_scores[name] for name in own}

    def eps(self, result: str) -> float:
        """The relative size of a rounding of a result; in float64, where the judge itself rounds, of several."""
        dtype = self.query.dtype
        if result in ("normalizer", "relative"):
            dtype = torch.promote_types(dtype, torch.float32)
        elif result == "mask" and self.mask is not None and self.mask.is_floating_point():
            dtype = self.mask.dtype
        return torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)


class Judge:
    """The results that a case has to have: the definition in float64, on inputs without poison."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.exact = case.results("reference", torch.float64, explicit=True)
        self.plain = case.results("reference", explicit=True)
        self.roundings = case.roundings()
        self.poisoned, self.selection, self.spoiled = case, {}, None
        if case.poison is not None:
            self.poisoned, self.selection, self.spoiled = case.poison.into(case)
        self.hidden = self._hidden()

    def _hidden(self) -> dict[str, Tensor]:
        """Where results are exactly 0, since a row sees no key, no row sees a key, or no such pair reads a bias."""
        case, visible = self.case, self.case.visible()
        blind = ~visible.any(-1)
        unseen = ~visible.any(-2).unflatten(1, (case.key.shape[1], -1)).any(2).unsqueeze(-1)
        hidden = {
            "output": blind.unsqueeze(-1),
            "normalizer": blind,
            "query": blind.unsqueeze(-1),
            "key": unseen,
            "value": unseen,
        }
        if case.mask is not None:
            shape = (1,) * (4 - case.mask.ndim) + tuple(case.mask.shape)
            hidden["mask"] = visible.long().sum_to_size(shape).reshape(case.mask.shape) == 0
        return {name: where.cpu() for name, where in hidden.items()}

    def check(self, name: str, got: dict[str, Tensor]) -> None:
        """At most twice the error of the reference in the same dtype, plus one rounding."""
        for result, want in self.exact.items():
            assert got[result].shape == want.shape, f"{name}, {result}"
            if want.numel() == 0:
                continue
            nowhere = torch.zeros((), dtype=torch.bool)
            hidden = got[result].masked_select(self.hidden.get(result, nowhere))
            assert (hidden == 0).all(), f"{name}, {result}: {hidden} where nothing is seen"
            if self.selection:
                want = want.where(self.selection[result].cpu(), 0.0)
            error, plain = (
                _difference(x[result].where(self.selection[result].cpu(), 0.0) if self.selection else x[result], want)
                for x in (got, self.plain)
            )
            budget = 2 * plain + self.roundings[result]
            largest = want.abs().max()
            assert error <= budget, f"{name}, {result}: error {error:.3g}, budget {budget:.3g}, largest {largest:.3g}"
        poison = self.case.poison
        if self.spoiled is not None and poison is not None and math.isnan(poison.number):
            # A row of scores that are all 0 may be 0, or NaN, as 0 times the value is.
            rows = self.spoiled.cpu() & (self.exact["normalizer"] > 0)
            assert not got["output"][rows].isfinite().all(-1).any(), f"{name}: rows that see NaN do not show it"


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference; NaN if there is one, and 0 of equal infinities."""
    return torch.where(x == y, 0.0, (x - y).abs()).max()


def assert_within_budget(case: Case, *backends: str, threads: Sequence[int] = ()) -> None:
    """Each of `FUSED`, or "reference", which is told of poison as the others are, does what `Judge` wants.

    With each of these numbers of threads, or with that of torch. Under a sanitizer, the C kernels run and nothing is
    judged.
    """
    runs = list(itertools.product(threads or [torch.get_num_threads()], backends))
    if RUN_ONLY:
        poisoned = case if case.poison is None else case.poison.into(case)[0]
        for count, name in runs:
            if name.startswith(("cpu", "linear")) and name != "linear torch":
                with threads_of_torch(count), fused(name) as backend:
                    poisoned.results(backend)
        return
    judge = Judge(case)
    for count, name in runs:
        with threads_of_torch(count), fused(name) as backend:
            judge.check(f"{name}, {count} threads", judge.poisoned.results(backend))
