"""Sparse attention with a certificate: blocks that are kept, bounds against true errors, and speed against dense.

    python benchmarks/sparse.py [--lengths S ...] [--tolerances T ...] [--only NAME ...] [--json FILE]

For each input and tolerance: the share of blocks of keys that `sparse.select` keeps, its largest bound beside the
weight that is left out in truth, the error of the output as a share of what is allowed, 2 tolerance max|v|, and what as
many blocks leave out that are chosen without a proof, by the score of their mean key; and the share of single keys that
a query needs on average, if all weights are known, which no choice can beat. Ratios are the time of dense attention
over that of ours, run in turn: to choose and attend, and to attend to chosen blocks. A cache has its moments at hand,
as decoding has; a whole sequence computes them.

The text model is trained first, for --steps steps, some minutes of a core; MiniLM needs a package that carries it.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from expressive_attention import expressive_attention
from expressive_attention.sparse import moments, select
from sparse_inputs import Problem, cache, minilm, text_model, twins
from timing import Ratio, paired

NAMES = ("sharp needles", "needles", "noise", "twin", "text", "MiniLM")


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
    needed: float
    chosen: Ratio
    attended: Ratio

    def line(self) -> str:
        head = f"{self.name:16} {self.queries:>7} {self.keys:>7} {self.tolerance:>9g}"
        certified = f"{self.kept:>7.1%} {self.bound:>9.1e} {self.left:>9.1e} {self.error:>7.1%}"
        others = f"{self.unproved:>9.1e} {self.needed:>7.1%}"
        return f"{head} {certified} {others}  {self.chosen!s:24} {self.attended!s:24}"


def unproved(problem: Problem, kept: BlockMask) -> BlockMask:
    """As many blocks of each row of blocks, by the square of the score of the mean key and the mean query."""
    high, wide = problem.block_size
    query, key = problem.query, problem.key
    rows, keys = query.shape[2], key.shape[2]
    means = []
    for x, size in ((query, high), (key, wide)):
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
        means.append(x.unflatten(2, (-1, size)).mean(3))
    score = (means[0] @ means[1].mT).square()
    if problem.is_causal:
        last = (torch.arange(means[0].shape[2]).view(-1, 1) + 1) * high - 1 + keys - rows
        score = score.masked_fill(torch.arange(means[1].shape[2]) * wide > last, -1.0)
    counts = kept.kv_num_blocks.clone()
    if kept.full_kv_num_blocks is not None:
        counts = counts + kept.full_kv_num_blocks
    order = score.argsort(dim=-1, descending=True).int()
    # All as full ones: causality is of the call.
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), order, counts, order, BLOCK_SIZE=problem.block_size, compute_q_blocks=False
    )


def needed(problem: Problem, tolerance: float) -> float:
    """The least share of visible single keys with which every query leaves out `tolerance` at most."""
    scale = problem.query.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    kept, all_visible = 0, 0
    for query, key in zip(problem.query[0].double(), problem.key[0].double(), strict=True):
        square = (scale * query @ key.mT).square()
        weights, visible = square / (1 + square), torch.full((len(query),), len(key))
        if problem.is_causal:
            weights = weights.tril(len(key) - len(query))
            visible = torch.arange(len(query)) + 1 + len(key) - len(query)
        total = weights.sum(-1, keepdim=True)
        least_first = weights.sort(dim=-1)[0].cumsum(-1)
        kept += int((least_first > tolerance * total).sum())
        all_visible += int(visible.sum())
    return kept / all_visible


def measure(problem: Problem, tolerance: float, pairs: int) -> Row:
    query, key, value = problem.query, problem.key, problem.value
    options = {"is_causal": problem.is_causal, "causal_alignment": "lower_right", "scale": problem.scale}
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
        needed(problem, tolerance),
        time(chosen),
        time(sparse),
    )


def problems(names: Sequence[str], lengths: list[int], steps: int) -> Iterator[Problem]:
    """The inputs of these names; whole sequences of up to 4,096 keys."""
    for name in names:
        if name == "twin":
            yield from twins([n for n in lengths if n <= 4096])
        elif name == "text":
            yield from text_model(lengths, steps)
        elif name == "MiniLM":
            yield from minilm()
        else:
            yield from (cache(name, keys) for keys in lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16_384, 32_768])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.01, 0.001])
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--steps", type=int, default=400, help="of training of the text model")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    for name in ("pairs", "threads", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    torch.set_num_threads(arguments.threads)
    print(
        f"{'':16} {'queries':>7} {'keys':>7} {'tolerance':>9} {'kept':>7} {'bound':>9} {'left out':>9} {'error':>7} "
        f"{'unproved':>9} {'needed':>7}  {'dense / choose, attend':24} {'dense / attend':24}"
    )
    rows = []
    for problem in problems(arguments.only, arguments.lengths, arguments.steps):
        for tolerance in arguments.tolerances:
            rows.append(measure(problem, tolerance, arguments.pairs))
            print(rows[-1].line(), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
