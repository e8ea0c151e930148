"""Expressive attention against scaled_dot_product_attention, and the plain formula, on this machine.

    python benchmarks/operator.py [--threads N] [--pairs N] [--only TEXT] [--json FILE]

For every problem and backend: first the error against float64, then the time of the rival over ours, paired.
A backend whose error is over the budget gets no ratio.
"""

from __future__ import annotations

import sys

# This folder last: the name of this file is also that of a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from expressive_attention import expressive_attention
from timing import paired, seconds


@dataclass(frozen=True)
class Problem:
    """One row of the table: shapes (B, H, L, E) with S = L, float32."""

    shape: tuple[int, int, int, int]
    causal: bool = False
    backward: bool = False

    def __str__(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        return f"{passes}, {'causal' if self.causal else 'full'}, {self.shape}".replace(" ", "")

    @property
    def flops(self) -> float:
        """Floating point operations of the matrix products: two forward, five more backward."""
        b, h, length, e = self.shape
        return (7 if self.backward else 2) * 2 * b * h * length * length * e * (0.5 if self.causal else 1.0)


PROBLEMS = [
    Problem((1, 8, 2048, 64)),
    Problem((1, 8, 2048, 64), causal=True),
    Problem((1, 8, 512, 64)),
    Problem((4, 8, 1024, 64)),
    Problem((1, 4, 4096, 128)),
    Problem((1, 8, 2048, 64), backward=True),
    Problem((1, 8, 2048, 64), causal=True, backward=True),
    Problem((4, 8, 1024, 64), backward=True),
    Problem((32, 4, 16, 16)),
    Problem((256, 2, 16, 16)),
    Problem((256, 2, 16, 16), backward=True),
]


def plain_formula(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Expressive attention as one would write it first."""
    z = (q @ k.mT) * q.shape[-1] ** -0.5
    weight = z * z / (1 + z * z)
    if is_causal:
        weight = weight.tril()
    return weight / weight.sum(-1, keepdim=True) @ v


def call(function: Callable[..., Tensor], problem: Problem, inputs: list[Tensor]) -> list[Tensor]:
    """The output and, with `backward`, the gradients of one call."""
    if not problem.backward:
        with torch.no_grad():
            return [function(*inputs, is_causal=problem.causal)]
    output = function(*inputs, is_causal=problem.causal)
    return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def within_budget(function: Callable[..., Tensor], problem: Problem, inputs: list[Tensor]) -> bool:
    """Error against float64 at most twice that of the reference in the same dtype, plus one rounding."""

    def reference(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return expressive_attention(q, k, v, is_causal=is_causal, backend="reference")

    # One head is enough, and what memory allows.
    few = [x[:1, :1].detach().clone().requires_grad_() for x in inputs]
    exact = call(reference, problem, [x.detach().double().requires_grad_() for x in few])
    plain = call(reference, problem, few)
    for got, judge, want in zip(call(function, problem, few), plain, exact, strict=True):
        budget = 2 * (judge - want).abs().max() + torch.finfo(got.dtype).eps * want.abs().max()
        if not (got - want).abs().max() <= budget:
            return False
    return True


def measured_peak() -> float:
    """FLOP/s of a large float32 matrix product, the most that plain torch reaches here."""
    a, b = torch.randn(2, 2048, 2048)
    repeats = 10
    seconds(lambda: a @ b, 2)
    return 2 * 2048**3 / min(seconds(lambda: a @ b, 1) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs per ratio")
    parser.add_argument("--only", default="", help="only problems whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def backend(name: str) -> Callable[..., Tensor]:
        return lambda *args, is_causal: expressive_attention(*args, is_causal=is_causal, backend=name)

    candidates = {
        "blockwise": backend("blockwise"),
        "reference": backend("reference"),
        "formula": plain_formula,
    }
    peak = measured_peak()
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads, ", end="")
    print(f"float32 matrix product {peak / 1e9:.0f} GFLOP/s")
    print("ratio: time of scaled_dot_product_attention / time of the row, median (least to most)\n")
    print(f"{'problem':44} {'':10} {'ratio':>22} {'ms':>9} {'of peak':>8}")
    rows = []
    for problem in PROBLEMS:
        if arguments.only not in str(problem):
            continue
        torch.manual_seed(0)
        inputs = [torch.randn(problem.shape, requires_grad=True) for _ in range(3)]
        for name, function in candidates.items():
            line = f"{problem!s:44} {name:10}"
            if not within_budget(function, problem, inputs) and name != "formula":
                print(f"{line} error over budget: not timed")
                rows.append({"problem": str(problem), "name": name, "error": "over budget"})
                continue
            ratio = paired(
                lambda f=function, p=problem, x=inputs: call(f, p, x),
                lambda p=problem, x=inputs: call(F.scaled_dot_product_attention, p, x),
                pairs=arguments.pairs,
            )
            share = problem.flops / ratio.ours / peak
            print(f"{line} {ratio!s:>22} {ratio.ours * 1e3:9.2f} {share:8.0%}", flush=True)
            rows.append({"problem": str(problem), "name": name, **asdict(ratio), "share_of_peak": share})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
