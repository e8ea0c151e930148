"""Expressive attention against scaled_dot_product_attention, FlexAttention and the plain formula, on this machine.

    python benchmarks/operator.py [--device cpu|cuda] [--threads N ...] [--pairs N] [--only TEXT] [--backend NAME]
                                  [--json FILE]

ONNX Runtime takes part where it is installed (`pip install onnx onnxruntime`). "plain" and "float32" are our own
kernels without what the problem adds, and in float32. On a GPU, SDPA is forced to FlashAttention and to cuDNN, and our
own kernels run with exp in the place of f ("twin").

The script first checks the error of each problem against float64, then times all implementations in turn. A red check
gives no speed-up. Goals are printed as met or missed, and nothing is left out.
"""

from __future__ import annotations

import sys

# This folder goes last: this file is named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memory
import peak
from check import Judge, judged_settings
from expressive_attention.backends import BACKENDS
from implementations import GPU_RIVALS, RIVALS, SDPA, Implementation, automatic, ours, prepared, why_not
from problems import Problem, gpu_problems, problems
from table import HEADER, MEMORY_HEADER, MemoryRow, Row
from timing import Ratio, in_turn

RED = "error over budget: no speed-up"
MEMORY = {  # rows for CPU and GPU, and whether they include gradients
    "cpu": {"memory, forward, (1, 1, L, 64)": False, "memory, forward + backward, (1, 1, L, 64)": True},
    "cuda": {"memory, forward, (1, 16, L, 64)": False, "memory, forward + backward, (1, 16, L, 64)": True},
}


@cache
def judge(problem: Problem, softmax: bool) -> Judge:
    settings = judged_settings(problem)
    return Judge(problem.inputs(), problem.upstream(), problem.causal, settings, softmax=softmax)


def measure(
    problem: Problem, own: Implementation, rivals: Iterable[Implementation], pairs: int, peaks: peak.Peaks
) -> list[Row]:
    """The rows of a problem: ours, then the rivals."""
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for implementation in (own, *(rival for rival in rivals if rival.fits(problem))):
        name = implementation.name
        goal = problem.goal.share if implementation is own else getattr(problem.goal, name, None)
        rows[name] = {"goal": goal, "is_ours": implementation is own}
        try:
            given = implementation.on(problem)
            call = prepared(implementation.make(given), given, given.inputs(), given.upstream())
            results = call()
        except Exception as error:
            rows[name]["note"] = f"does not run: {first_line(error)}"
            continue
        if implementation.expressive or implementation.softmax:
            error = judge(given, implementation.softmax).error(results)
            rows[name]["error"] = error if math.isfinite(error) else None
            if not error <= 1:
                rows[name]["note"] = RED
                continue
        calls[name] = call
    if own.name not in calls:  # nothing to compare with
        for name in calls:
            rows[name]["note"] = "ours was not timed"
        calls = {}
    times = dict(zip(calls, in_turn(list(calls.values()), pairs, wait=problem.wait), strict=True))
    for name, seconds in times.items():
        ratio = Ratio.of(times[own.name], seconds)
        rows[name] |= {"seconds": ratio.rival, "share": problem.share(ratio.rival, peaks)}
        if name != own.name:
            rows[name]["ratio"] = ratio
    return [Row(str(problem), name, **row) for name, row in rows.items()]


def measure_memory(
    label: str, own: str, rival: str, slack: float, usage: Callable[[str, int], memory.Usage]
) -> list[MemoryRow]:
    """The rows of peak memory: ours, whose goal is the rival's, then the rival's; `usage` takes a name and a length."""
    limit = rival + (f" + {slack:.0%}" if slack else "")
    try:
        mine, theirs = ([usage(name, length) for length in memory.LENGTHS] for name in (own, rival))
    except Exception as error:
        return [MemoryRow(label, own, is_ours=True, note=first_line(error), limit=limit)]
    row = MemoryRow(label, rival, theirs[0].bytes, theirs[1].bytes)
    errors = [use.error for use in mine if use.error is not None]
    if not all(error <= 1 for error in errors):
        return [MemoryRow(label, own, is_ours=True, note="error over budget", limit=limit), row]
    linear = memory.is_linear(mine[0].bytes, mine[1].bytes)
    goal = int(theirs[1].bytes * (1 + slack))
    return [
        MemoryRow(label, own, mine[0].bytes, mine[1].bytes, max(errors), goal, linear, is_ours=True, limit=limit), row
    ]  # fmt: skip


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:100]


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run; default: cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of threads")
    parser.add_argument("--pairs", type=int, default=7, metavar="N", help="pairs of runs per ratio")
    parser.add_argument("--only", default="", metavar="TEXT", help="only problems whose name contains this")
    parser.add_argument("--backend", choices=BACKENDS, help="backend to time; default: the automatic choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    found = parser.parse_args()
    if min(found.threads) < 1:
        parser.error(f"--threads must be at least 1, got {min(found.threads)}")
    if found.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {found.pairs}")
    on_gpu = found.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none")
    if found.json is not None and (found.json.is_dir() or not found.json.absolute().parent.is_dir()):
        parser.error(f"--json must be a file in a folder that exists, got {found.json}")
    known = gpu_problems() if on_gpu else problems(torch.cpu._is_avx512_bf16_supported())
    found.problems = [p for p in known if found.only in str(p)]
    found.memory = {label: backward for label, backward in MEMORY[found.device].items() if found.only in label}
    if not found.problems and not found.memory:
        parser.error(f"--only must be part of a problem's name, like 'forward, causal' or 'tiny', got {found.only!r}")
    if found.backend is not None:
        for dtype in {p.dtype for p in found.problems} or {torch.float32}:
            reason = why_not(found.backend, dtype, found.device)
            if reason is not None:
                parser.error(f"--backend {found.backend} does not run here: {reason}")
    return found


def shown(rows: Sequence[Row] | Sequence[MemoryRow]) -> list[dict[str, Any]]:
    """Print rows of one problem, and return them for the JSON file."""
    for i, row in enumerate(rows):
        print(row.line(first=i == 0), flush=True)
    return [row.as_dict() for row in rows]


def section(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Measure and print everything for one number of threads, or on the GPU."""
    torch.set_num_threads(threads)
    on_gpu = options.device == "cuda"
    peaks = peak.measure_gpu() if on_gpu else peak.measure(threads)
    print(f"\n{'GPU' if on_gpu else f'{threads} thread' + 's' * (threads > 1)}, {peaks}", flush=True)
    rows, memory_rows = [], []
    if options.problems:
        print(HEADER, flush=True)
    for problem in options.problems:
        own = ours(options.backend, problem.dtype, options.device)
        rows += shown(measure(problem, own, GPU_RIVALS if on_gpu else RIVALS, options.pairs, peaks))
    if options.memory:
        print(f"{MEMORY_HEADER}, L = {' and '.join(map(str, memory.LENGTHS))}", flush=True)
    own, rival, slack = options.backend or automatic(torch.float32, options.device), SDPA.name, 0.0
    on_gpu_by_name = {}
    if on_gpu:
        rival, slack = "flash", 0.01
        on_gpu_by_name = {c.name: c for c in (ours(own, torch.bfloat16, "cuda"), *GPU_RIVALS)}

    def usage(backward: bool, name: str, length: int) -> memory.Usage:
        if on_gpu:
            return memory.measured_on_gpu(on_gpu_by_name[name], length, backward)
        return memory.measured(name, length, backward, threads)

    for label, backward in options.memory.items():
        memory_rows += shown(measure_memory(label, own, rival, slack, partial(usage, backward)))
    verdicts = Counter(row["verdict"] for row in rows + memory_rows if row["verdict"])
    print("goals: " + ", ".join(f"{verdicts[v]} {v}" for v in ("met", "missed", "not measured")), flush=True)
    return {"threads": threads, "peaks": asdict(peaks), "rows": rows, "memory": memory_rows}


def main() -> None:
    options = arguments()
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
        options.threads = [torch.get_num_threads()]
    print(f"torch {torch.__version__}, {machine}, {options.pairs} pairs")
    document: dict[str, Any] = {"torch": torch.__version__, "machine": machine, "pairs": options.pairs, "sections": []}
    for threads in options.threads:
        document["sections"].append(section(options, threads))
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
