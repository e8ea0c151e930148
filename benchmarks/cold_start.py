"""Time the first call on a GPU, in a new process: with kernels to compile, and with compiled kernels on disk.

    python benchmarks/cold_start.py [--pairs N]

The script prints seconds from the call to its result for a causal training step (forward and backward) in bfloat16,
(1, 16, 4096, 128): ours, and SDPA, whose kernels are already compiled. Triton keeps compiled kernels in a folder, which
is empty at first.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import os
import statistics
import subprocess
import tempfile
import time

import torch

from implementations import SDPA, ours, run
from problems import Problem

PROBLEM = Problem("cold start", (1, 16, 4096, 128), causal=True, backward=True, dtype=torch.bfloat16, device="cuda")


def first_call(name: str) -> float:
    """Seconds of the first call in this process, after the GPU is initialized."""
    implementation = SDPA if name == SDPA.name else ours(None, PROBLEM.dtype, "cuda")
    inputs, upstream = PROBLEM.inputs(), PROBLEM.upstream()
    torch.ones(1, device="cuda").sum().item()
    start = time.perf_counter()
    run(implementation.make(PROBLEM), inputs, upstream)
    PROBLEM.wait()
    return time.perf_counter() - start


def in_new_process(name: str, folder: str) -> float:
    """Run `first_call` in a new process, with Triton's kernels in `folder`."""
    command = [sys.executable, __file__, "--first", name]
    environment = {**os.environ, "TRITON_CACHE_DIR": folder}
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="processes of each kind")
    parser.add_argument("--first", choices=("ours", SDPA.name), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch finds none")
    if options.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {options.pairs}")
    if options.first:
        print(first_call(options.first))
        return
    times: dict[str, list[float]] = {"compiled at the call": [], "compiled before": [], "sdpa": []}
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            times["compiled at the call"].append(in_new_process("ours", folder))
            times["compiled before"].append(in_new_process("ours", folder))
            times["sdpa"].append(in_new_process(SDPA.name, folder))
    for name, seconds in times.items():
        print(f"{name:22} {statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
