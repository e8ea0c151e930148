"""Check the errors of long problems against float64, for some rows of each, as a share of their budget.

    python benchmarks/large.py [--device cpu|cuda] [--lengths N ...] [--backend NAME]

Problems are in float32, float16 and bfloat16, of lengths that end inside a tile, full and causal. The script checks the
output, and up to length 16384 also the gradients. Exit status: 0 if every error is within its budget, else 1.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import math
from functools import partial

import torch
from torch import Tensor

from check import Judge
from expressive_attention import expressive_attention
from expressive_attention.backends import BACKENDS
from implementations import run, why_not
from problems import Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (1000, 4097, 16383, 65536)
LONGEST_GRADIENT = 16384  # the judge keeps matrices of L x L in float64
_ROWS = 256


def error(problem: Problem, backend: str) -> float:
    """The error of a problem, as a share of its budget."""
    inputs, upstream = problem.inputs(), problem.upstream()
    if problem.backward:
        return judged(inputs, upstream, problem.causal, backend)
    query, key, value = inputs
    attention = partial(expressive_attention, is_causal=problem.causal, backend=backend)
    (output,) = run(attention, [query, key, value], None)
    if not problem.causal:
        return Judge([query[..., -_ROWS:, :], key, value], None, causal=False).error([output[..., -_ROWS:, :]])
    # Each row sees only the keys up to its own position.
    length = problem.shape[2]
    shares = []
    for stop in (min(_ROWS, length), length // 2, length):
        row = [query[..., stop - 1 : stop, :], key[..., :stop, :], value[..., :stop, :]]
        shares.append(Judge(row, None, causal=False).error([output[..., stop - 1 : stop, :]]))
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def judged(inputs: list[Tensor], upstream: Tensor | None, causal: bool, backend: str) -> float:
    attention = partial(expressive_attention, is_causal=causal, backend=backend)
    return Judge(inputs, upstream, causal).error(run(attention, inputs, upstream))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N")
    parser.add_argument("--backend", choices=BACKENDS, default="triton")
    options = parser.parse_args()
    if min(options.lengths) < 2:
        parser.error(f"--lengths must be at least 2, got {min(options.lengths)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none")
    failed = False
    for dtype in DTYPES:
        reason = why_not(options.backend, dtype, options.device)
        if reason is not None:
            parser.error(f"--backend {options.backend} does not run here: {reason}")
        for length in options.lengths:
            for causal in (False, True):
                for backward in (False, True)[: 1 + (length <= LONGEST_GRADIENT)]:
                    label = f"{'gradients' if backward else 'output'}, {'causal' if causal else 'full'}"
                    problem = Problem(label, (1, 2, length, 64), causal=causal, backward=backward, dtype=dtype,
                                      device=options.device)  # fmt: skip
                    share = error(problem, options.backend)
                    failed |= not share <= 1
                    print(
                        f"{dtype!s:15} {problem!s:40} {share:5.2f} {'' if share <= 1 else 'RED'}".rstrip(), flush=True
                    )
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
