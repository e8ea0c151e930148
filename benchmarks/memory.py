"""Measure peak memory of one call beyond its inputs and outputs, in a new process.

    python benchmarks/memory.py BACKEND|sdpa|automatic LENGTH forward|backward THREADS

The command prints bytes as JSON, for ``(1, 1, LENGTH, 64)``, with the error of the output as a share of its budget. On
a GPU, `measured_on_gpu` counts torch's allocations there, for ``(1, 16, LENGTH, 64)``.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from check import Judge
from implementations import SDPA, Implementation, ours, run
from problems import Problem

LENGTHS = (8192, 16384)
_RESOLUTION = 1 << 20  # bytes; one matrix of L x L takes 1 GiB
_CHECKED_ROWS = 256


@dataclass(frozen=True)
class Usage:
    """Bytes beyond inputs and outputs, and the error as a share of its budget (None without expressive attention)."""

    bytes: int
    error: float | None


def measured(implementation: str, length: int, backward: bool, threads: int) -> Usage:
    """`Usage` of one call, in a new process.

    Raises:
        RuntimeError: The measurement failed; the message is one line.
    """
    passes = "backward" if backward else "forward"
    command = [sys.executable, __file__, implementation, str(length), passes, str(threads)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return Usage(**json.loads(done.stdout))


def measured_on_gpu(implementation: Implementation, length: int, backward: bool) -> Usage:
    """`Usage` of one call on the current GPU, in bfloat16, with kernels already compiled."""
    problem = Problem("memory", (1, 16, length, 64), backward=backward, dtype=torch.bfloat16, device="cuda")
    inputs, upstream, attention = problem.inputs(), problem.upstream(), implementation.make(problem)
    results = run(attention, inputs, upstream)
    del results
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(attention, inputs, upstream)
    beyond = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    return Usage(beyond, _error(inputs, results) if implementation.expressive else None)


def is_linear(shorter: int, longer: int) -> bool:
    """Whether memory at twice the length is at most twice as much, to the resolution of the measurement."""
    return longer <= 2 * max(shorter, 0) + _RESOLUTION


def usage(implementation: Implementation, length: int, backward: bool) -> Usage:
    """`Usage` of one call in this process, which should be fresh."""
    small = Problem("memory", (1, 1, 64, 64), backward=backward)
    run(implementation.make(small), small.inputs(), small.upstream())
    problem = Problem("memory", (1, 1, length, 64), backward=backward)
    inputs, upstream, attention = problem.inputs(), problem.upstream(), implementation.make(problem)
    beyond, results = bytes_beyond(lambda: run(attention, inputs, upstream))
    return Usage(beyond, _error(inputs, results) if implementation.expressive else None)


def bytes_beyond(call: Callable[[], list[Tensor]]) -> tuple[int, list[Tensor]]:
    """Bytes that a call needs beyond its results at the peak, and these."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident size
    before = _status("VmRSS")
    results = call()
    return _status("VmHWM") - before - sum(x.nbytes for x in results), results


def _error(inputs: list[Tensor], results: list[Tensor]) -> float:
    """The error of the last rows of the output, as a share of its budget."""
    query, key, value = inputs
    judge = Judge([query[..., -_CHECKED_ROWS:, :], key, value], None, causal=False)
    return judge.error([results[0][..., -_CHECKED_ROWS:, :]])


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def main() -> None:
    name, length, passes, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    implementation = SDPA if name == SDPA.name else ours(None if name == "automatic" else name, torch.float32)
    found = usage(implementation, int(length), passes == "backward")
    print(json.dumps(found.__dict__))


if __name__ == "__main__":
    main()
