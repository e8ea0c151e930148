"""Random packed sequences, each of them judged as a case of its own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from expressive_attention import expressive_attention_varlen
from tests.budget import NAMES, Case, Judge, fused
from tests.poison import Poison, placed


@dataclass
class Packed:
    """Sequences that are packed one after the other.

    Attributes:
        cases: Each of them, with batch dimension 1 and the settings that it has on its own.
        settings: Further arguments of `expressive_attention_varlen`.
        rest: How many rows of queries, and of keys, there are after the last sequence.
        number: The number that these rows hold.
    """

    cases: list[Case]
    settings: dict[str, Any]
    rest: tuple[int, int]
    number: float

    def results(self, backend: str, cases: list[Case]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """The results of each case, of which `cases` have the inputs, and those of the rows after the last."""
        margin, rows, keys = cases[0].margin, [x.query.shape[2] for x in cases], [x.key.shape[2] for x in cases]
        q = self._leaf([x.query for x in cases], self.rest[0], margin)
        k, v = (self._leaf([getattr(x, name) for x in cases], self.rest[1], margin) for name in ("key", "value"))
        output, normalizer = expressive_attention_varlen(
            q, k, v, _starts(rows), _starts(keys), max(rows), max(keys), return_normalizer=True, backend=backend,
            **self.settings,
        )  # fmt: skip
        outputs = [output, normalizer.T.unsqueeze(-1)]
        upstream = [
            torch.cat([_packed(parts).to(x.dtype), torch.ones_like(x[sum(rows) :])])
            for x, parts in zip(outputs, self._upstream(cases), strict=True)
        ]
        if not cases[0].through_normalizer:
            outputs, upstream = outputs[:1], upstream[:1]
        gradients = torch.autograd.grad(outputs, (q, k, v), [placed(x, margin) for x in upstream])
        each, rest = [{} for _ in cases], []
        found = (output, normalizer.T.unsqueeze(-1), *gradients)
        for name, x, counts in zip(NAMES, found, (rows, rows, rows, keys, keys), strict=False):
            *parts, after = x.detach().double().split([*counts, len(x) - sum(counts)])
            rest.append(after)
            for one, part in zip(each, parts, strict=True):
                alone = part.transpose(0, 1).unsqueeze(0)
                one[name] = alone.squeeze(-1) if name == "normalizer" else alone
        return each, rest

    def _leaf(self, parts: list[Tensor], rest: int, margin: int) -> Tensor:
        after = parts[0].new_full((rest, parts[0].shape[1], parts[0].shape[3]), self.number)
        return placed(torch.cat([_packed(parts), after]), margin).requires_grad_()

    def _upstream(self, cases: list[Case]) -> tuple[list[Tensor], list[Tensor]]:
        """Upstream gradients of outputs and of normalizers, as ``(1, H, L, E)`` and ``(1, H, L, 1)``."""
        both = [case.upstream() for case in cases]
        return [do for do, _ in both], [dn.unsqueeze(-1) for _, dn in both]

    def check(self, *backends: str) -> None:
        """Each sequence is within the budget, and what is after the last gives 0 and gets none."""
        judges = [Judge(case) for case in self.cases]
        cases = [judge.poisoned for judge in judges]
        for name in backends:
            with fused(name) as backend:
                each, rest = self.results(backend, cases)
            for judge, got in zip(judges, each, strict=True):
                judge.check(name, got)
            for x in rest:
                assert (x == 0).all(), f"{name}: {x} of rows that are in no sequence"


def _packed(parts: list[Tensor]) -> Tensor:
    """``(1, H, L, E)`` of each as ``(T, H, E)``."""
    return torch.cat([x[0].transpose(0, 1) for x in parts])


def _starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


@st.composite
def packed_problems(draw, largest=20):
    """Sequences of which some are empty, with every option, and NaN beyond the keys of each that exist."""
    size = st.integers(1, largest) | st.sampled_from([8, 16, 32])
    kv_heads, groups, e, ev = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(size), draw(size)
    heads = kv_heads * groups
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    lengths = draw(st.lists(st.tuples(st.integers(0, largest), st.integers(0, largest)), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    causal = draw(st.booleans())
    alignment = draw(st.sampled_from(["upper_left", "lower_right"]))
    form, scale = draw(st.sampled_from(["expressive", "squared"])), draw(st.sampled_from([None, 1.0, 0.03]))
    window = draw(st.none() | st.tuples(st.integers(-1, 5), st.integers(-1, 5)))
    slopes = None
    if draw(st.booleans()):
        slopes = 2 * torch.rand(draw(st.sampled_from([(heads,), (len(lengths), heads)])), generator=generator)
    used = None
    if draw(st.booleans()):
        # More than there are, where a sequence is short, mean all of them.
        most = sum(keys for _, keys in lengths)
        used = torch.tensor([draw(st.integers(0, min(most, keys + 1))) for _, keys in lengths], dtype=torch.int32)
    settings = {
        "causal": causal, "causal_alignment": alignment, "form": form, "softmax_scale": scale,
        "window_size": window or (-1, -1), "alibi_slopes": slopes, "seqused_k": used,
    }  # fmt: skip
    own = {"is_causal": causal, "causal_alignment": alignment, "form": form, "scale": scale, "enable_gqa": True}
    if window is not None:
        own["window_size"] = window
    number = draw(st.sampled_from([torch.nan, torch.inf]))
    poisoned, through_normalizer = draw(st.booleans()), draw(st.booleans())
    seen = draw(st.sampled_from(["nothing", "query", "key", "value"]))
    cases = []
    for b, (rows, keys) in enumerate(lengths):
        q = torch.randn(1, heads, rows, e, generator=generator).to(dtype)
        k = torch.randn(1, kv_heads, keys, e, generator=generator).to(dtype)
        v = torch.randn(1, kv_heads, keys, ev, generator=generator).to(dtype)
        case = Case(q, k, v, None, dict(own), through_normalizer)
        if used is not None:
            case.settings["key_lengths"] = used[b : b + 1].clamp(max=keys)
        if slopes is not None:
            case.settings["alibi_slopes"] = slopes if slopes.ndim == 1 else slopes[b]
        if poisoned:
            case = replace(case, poison=Poison(number, number, seen if b == 0 else "nothing", 0))
        cases.append(case)
    rest = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return Packed(cases, settings, rest, number if poisoned else 1.0)
