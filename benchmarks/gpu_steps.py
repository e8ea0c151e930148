"""The steps `smoke`, `timing`, `linear` and `blocks` of `gpu.py`, each in a process of its own.

python benchmarks/gpu_steps.py smoke|timing|linear|blocks [--out FOLDER] [--dry-run]
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder has a file named like a module of the standard library

import argparse
import itertools
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import long
from check import Judge, Settings
from expressive_attention import expressive_attention
from expressive_attention.backends.cpu import library
from implementations import GPU_RIVALS, Implementation, flex, ours, prepared, run
from lines import write_line
from problems import Problem, gpu_problems
from timing import Ratio, in_turn


def smoke(dry_run: bool) -> Iterator[dict[str, Any]]:
    """Errors of training steps, as a share of their budget."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (16,) if dry_run else (64, 128):
            for causal in (False, True):
                shape = (1, 2, 40 if dry_run else 1000, width)
                device = "cpu" if dry_run else "cuda"
                problem = Problem(
                    "causal" if causal else "full", shape, causal=causal, backward=True, dtype=dtype, device=device
                )
                share = error_of(ours("triton", dtype, device), problem)
                yield {"problem": str(problem), "dtype": str(dtype), "error": share, "right": share <= 1}


def error_of(implementation: Implementation, problem: Problem) -> float:
    """The error of an implementation, as a share of its budget."""
    inputs, upstream = problem.inputs(), problem.upstream()
    results = prepared(implementation.make(problem), problem, inputs, upstream)()
    return Judge(inputs, upstream, problem.causal).error(results)


def timing(dry_run: bool) -> Iterator[dict[str, Any]]:
    """Seconds of the problems of length 4096, the rivals in turn with ours."""
    problems = [problem for problem in gpu_problems() if problem.shape[2] == 4096]
    if dry_run:
        problems = [replace(problem, shape=(1, 1, 40, 16), device="cpu") for problem in problems]
    for problem in problems:
        own = ours("triton", problem.dtype, problem.device)
        row = {"problem": str(problem), "dtype": str(problem.dtype)}
        # A shorter problem of the same kind is judged: the judge keeps matrices of L x L in float64.
        share = error_of(own, replace(problem, shape=(1, 1, min(1024, problem.shape[2]), problem.shape[3])))
        inputs, upstream = problem.inputs(), problem.upstream()
        yield {**row, "implementation": own.name, "error": share, "right": share <= 1}
        if not share <= 1:
            continue
        mine = prepared(own.make(problem), problem, inputs, upstream)
        for rival in GPU_RIVALS:
            if dry_run and rival.name == "flex":
                yield {**row, "implementation": rival.name, "note": "left out of a dry run: it compiles"}
                continue
            try:
                theirs = prepared(rival.make(problem), problem, inputs, upstream)
                times = in_turn([mine, theirs], 1 if dry_run else 5, 0.0 if dry_run else 0.05, problem.wait)
            except Exception as error:
                yield {**row, "implementation": rival.name, "note": f"{type(error).__name__}: {error}"[:200]}
                continue
            ratios = [b / a for a, b in zip(*times, strict=True)]
            seconds, own_seconds = (statistics.median(x) for x in reversed(times))
            yield {
                **row, "implementation": rival.name, "seconds": seconds, "own_seconds": own_seconds,
                "own_flops": problem.flops / own_seconds, "ratio": statistics.median(ratios),
                "low": min(ratios), "high": max(ratios),
            }  # fmt: skip


def blocks(dry_run: bool) -> Iterator[dict[str, Any]]:
    """Errors of seven documents one after the other, as a block mask; and seconds, others in turn with ours."""
    device, size = ("cpu", 16) if dry_run else ("cuda", 128)
    for dtype in (torch.bfloat16,) if dry_run else (torch.bfloat16, torch.float32):
        for backward in (False, True):
            problem = Problem(
                "documents", (1, 8, 4096, 64), backward=backward, backward_alone=backward, dtype=dtype, device=device
            )
            short = replace(problem, shape=(1, 1, 30, 16) if dry_run else (1, 1, 1000, 64), backward_alone=False)
            same, block_mask = documents(short, size)
            hidden = torch.zeros(1, 1, *same.shape, dtype=torch.float64, device=device).masked_fill_(~same, -torch.inf)
            inputs, upstream = short.inputs(), short.upstream()
            results = run(partial(expressive_attention, block_mask=block_mask, backend="triton"), inputs, upstream)
            share = Judge(inputs, upstream, False, Settings(hidden)).error(results)
            row = {"problem": str(problem), "dtype": str(dtype), "backward": backward}
            yield {**row, "error": share, "right": share <= 1}
            if not share <= 1:
                continue
            problem = short if dry_run else problem
            same, block_mask = documents(problem, size)
            attention = partial(expressive_attention, backend="triton")
            others = (
                {"all pairs": attention} if dry_run else {"all pairs": attention, "flex": flex(problem, block_mask)}
            )
            inputs, upstream = problem.inputs(), problem.upstream()
            mine = prepared(partial(attention, block_mask=block_mask), problem, inputs, upstream)
            for name, other in others.items():
                theirs = prepared(other, problem, inputs, upstream)
                times = in_turn([mine, theirs], 1 if dry_run else 5, 0.0 if dry_run else 0.05, problem.wait)
                ratio = Ratio.of(*times)
                yield {
                    **row, "implementation": name, "seen": float(same.double().mean()), "seconds": ratio.rival,
                    "own_seconds": ratio.ours, "ratio": ratio.median, "low": ratio.low, "high": ratio.high,
                }  # fmt: skip


def documents(problem: Problem, size: int) -> tuple[torch.Tensor, BlockMask]:
    """Which pairs are of one of seven documents, ``(L, L)``, and the same as a block mask."""
    length = problem.shape[2]
    document = torch.arange(length, device=problem.device) * 7 // length

    def of_one(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return document[i] == document[j]

    block_mask = create_block_mask(of_one, None, None, length, length, device=problem.device, BLOCK_SIZE=size)
    return document == document.view(-1, 1), block_mask


def linear(dry_run: bool) -> Iterator[dict[str, Any]]:
    """The squared form in linear time: errors of sampled rows, and seconds, all pairs and softmax in turn with it."""
    if dry_run:
        library.MISSING = "a dry run"  # or the kernels in C would be taken
    device, heads = ("cpu", 1) if dry_run else ("cuda", 16)
    rivals = {"all pairs": all_pairs, "softmax": long.softmax}
    widths, lengths, dtypes = (64, 128), (4096, 16_384, 65_536), (torch.bfloat16, torch.float32)
    if dry_run:
        widths, lengths, dtypes = (4,), (130,), (torch.bfloat16,)
    for dtype, width, length in itertools.product(dtypes, widths, lengths):
        generator = torch.Generator(device).manual_seed(length)
        shape = (1, heads, length, width)
        leaves = [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for _ in range(3)]
        tensors = [x.detach() for x in leaves]
        row = {"problem": f"causal, {shape}", "dtype": str(dtype)}
        share = long.sampled(long.linear(*tensors), *tensors)
        yield {**row, "implementation": "linear", "error": share, "right": share <= 1}
        if not share <= 1:
            continue
        for (name, rival), gradients in itertools.product(rivals.items(), (False, True)):
            functions = [partial(function, *tensors) for function in (long.linear, rival)]
            if gradients:
                functions = [long.with_gradients(f, leaves, torch.ones_like(leaves[2])) for f in (long.linear, rival)]
            wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
            own, theirs = in_turn(functions, 1 if dry_run else 3, 0.0 if dry_run else 0.05, wait)
            seconds, own_seconds = statistics.median(theirs), statistics.median(own)
            kind = "forward + backward" if gradients else "forward"
            yield {
                **row, "kind": kind, "implementation": name, "seconds": seconds, "own_seconds": own_seconds,
                "ratio": seconds / own_seconds,
            }  # fmt: skip


def all_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return expressive_attention(q, k, v, is_causal=True, form="squared", backend="triton")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("step", choices=tuple(STEPS))
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER", help="folder to write to")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch finds none")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    wrong = False
    for row in STEPS[options.step](options.dry_run):
        write_line(options.out / f"{options.step}.jsonl", row)
        wrong |= row.get("right") is False
    sys.exit(wrong)


STEPS = {"smoke": smoke, "timing": timing, "linear": linear, "blocks": blocks}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
