"""Sparse attention with a certificate: blocks that are kept, bounds against true errors, and speed against dense.

    python benchmarks/sparse.py [--lengths S ...] [--tolerances T ...] [--only NAME ...] [--json FILE]

For each input and tolerance: the share of blocks of keys that `sparse.select` keeps, its largest bound beside the
weight that is left out in truth, the error of the output as a share of what is allowed, 2 tolerance max|v|, and what as
many blocks leave out that are chosen without a proof, by the score of their mean key. Ratios are the time of dense
attention over that of ours, run in turn: to choose and attend, and to attend to chosen blocks. A cache has its moments
at hand, as decoding has; a whole sequence computes them.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from expressive_attention import expressive_attention
from expressive_attention.functional import call_hooks
from expressive_attention.sparse import moments, select
from timing import Ratio, paired

HEADS, DIM = 8, 64
TWINS = Path(__file__).parents[1] / "docs" / "notebooks" / "twins"


@dataclass
class Problem:
    """An input: ``(1, H, L, E)`` and ``(1, H, S, E)``, causal to the lower right."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    block_size: tuple[int, int]
    scale: float | None = None


@dataclass
class Row:
    """The result for an input and a tolerance, see the head of this file."""

    name: str
    queries: int
    keys: int
    tolerance: float
    kept: float
    bound: float
    left: float
    error: float
    unproved: float
    chosen: Ratio
    attended: Ratio

    def line(self) -> str:
        numbers = f"{self.kept:>7.1%} {self.bound:>9.1e} {self.left:>9.1e} {self.error:>7.1%} {self.unproved:>9.1e}"
        head = f"{self.name:16} {self.queries:>7} {self.keys:>7} {self.tolerance:>9g}"
        return f"{head} {numbers}  {self.chosen!s:24} {self.attended!s:24}"


def cache(name: str, keys: int) -> Problem:
    """One query for each head against a cache of keys that are noise.

    Half of the heads of "needles" have four keys along their query. With "sharp needles" all have, and noise is small.
    """
    generator = torch.Generator().manual_seed(keys)
    query = torch.randn(1, HEADS, 1, DIM, generator=generator)
    key, value = torch.randn(2, 1, HEADS, keys, DIM, generator=generator)
    if name != "noise":
        key *= 1e-4 if name == "sharp needles" else 0.05
        places = torch.randint(keys, (HEADS, 4), generator=generator)
        for head in range(HEADS if name == "sharp needles" else HEADS // 2):
            key[0, head, places[head]] = 8 * query[0, head, 0]
    return Problem(name, query, key, value, (1, 128))


def twin_sequences(length: int) -> Tensor:
    """Sequences of the task of the twins, x_t = x_{t-1} + x_{t-5} mod 16, longer than those of their training."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(16, (1, 5), generator=generator).tolist()[0]
    while len(digits) < length:
        digits.append((digits[-1] + digits[-5]) % 16)
    return torch.tensor([digits])


def twins(lengths: list[int]) -> Iterator[Problem]:
    """The trained head with expressive attention: on its own examples, key by key, and on long sequences in blocks."""
    from expressive_attention.study.report.twins import load_twins

    loaded = load_twins(TWINS)
    model = loaded.models["expressive"]
    for inputs, block_size in [(loaded.inputs[:64], (1, 1)), *((twin_sequences(n), (64, 64)) for n in lengths)]:
        calls = []
        call_hooks.append(calls.append)
        try:
            with torch.no_grad():
                model(inputs)
        finally:
            call_hooks.remove(calls.append)
        call = calls[0]
        query, key, value = (x.float().flatten(0, 1).unsqueeze(0) for x in call[:3])  # sequences are as many heads
        yield Problem("twin", query, key, value, block_size, call.scale)


def unproved(problem: Problem, kept: BlockMask) -> BlockMask:
    """As many blocks of each row of blocks, by the square of the score of the mean key and the mean query."""
    high, wide = problem.block_size
    query, key = problem.query, problem.key
    rows, keys = query.shape[2], key.shape[2]
    means = []
    for x, size in ((query, high), (key, wide)):
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
        means.append(x.unflatten(2, (-1, size)).mean(3))
    last = (torch.arange(means[0].shape[2]).view(-1, 1) + 1) * high - 1 + keys - rows
    score = (means[0] @ means[1].mT).square()
    score = score.masked_fill(torch.arange(means[1].shape[2]) * wide > last, -1.0)
    counts = kept.kv_num_blocks.clone()
    if kept.full_kv_num_blocks is not None:
        counts = counts + kept.full_kv_num_blocks
    order = score.argsort(dim=-1, descending=True).int()
    # All as full ones: causality is of the call.
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), order, counts, order, BLOCK_SIZE=problem.block_size, compute_q_blocks=False
    )


def measure(problem: Problem, tolerance: float, pairs: int) -> Row:
    query, key, value = problem.query, problem.key, problem.value
    options = {"is_causal": True, "causal_alignment": "lower_right", "scale": problem.scale}
    given = moments(key, problem.block_size[1]) if query.shape[2] == 1 else None
    choose = partial(select, query, key, tolerance=tolerance, block_size=problem.block_size, moments=given, **options)
    dense = partial(expressive_attention, query, key, value, **options)
    found = choose()
    sparse = partial(dense, block_mask=found.block_mask)

    def chosen() -> Tensor:
        return expressive_attention(query, key, value, block_mask=choose().block_mask, **options)

    def share_left(block_mask: BlockMask) -> float:
        q, k, v = (x.double() for x in (query, key, value))
        _, part = expressive_attention(q, k, v, block_mask=block_mask, return_normalizer=True, **options)
        return float((1 - part / total).max())

    _, total = expressive_attention(query.double(), key.double(), value.double(), return_normalizer=True, **options)
    time: Callable[[Callable[[], object]], Ratio] = lambda ours: paired(ours, dense, pairs, 0.1)  # noqa: E731
    return Row(
        problem.name,
        query.shape[2],
        key.shape[2],
        tolerance,
        found.kept,
        float(found.bound.max()),
        share_left(found.block_mask),
        float((sparse() - dense()).abs().max() / (2 * tolerance * value.abs().max())),
        share_left(unproved(problem, found.block_mask)),
        time(chosen),
        time(sparse),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16_384, 32_768])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.01, 0.001])
    names = ("sharp needles", "needles", "noise", "twin")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    for name in ("pairs", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    torch.set_num_threads(arguments.threads)
    print(
        f"{'':16} {'queries':>7} {'keys':>7} {'tolerance':>9} {'kept':>7} {'bound':>9} {'left out':>9} {'error':>7} "
        f"{'unproved':>9}  {'dense / choose, attend':24} {'dense / attend':24}"
    )
    rows = []

    def show(problem: Problem) -> None:
        for tolerance in arguments.tolerances:
            rows.append(measure(problem, tolerance, arguments.pairs))
            print(rows[-1].line(), flush=True)

    for name in arguments.only:
        if name != "twin":
            for keys in arguments.lengths:
                show(cache(name, keys))
            continue
        for problem in twins([n for n in arguments.lengths if n <= 4096]):
            show(problem)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
