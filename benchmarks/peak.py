"""Peak rates of this machine: float32 multiply-adds and bytes read per second, measured by `peak.c`.

On a GPU, torch measures matrix products in bfloat16 and bytes copied.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import torch

from timing import seconds

_SOURCE = Path(__file__).with_name("peak.c")
_BUFFER = 512 << 20  # bytes, more than any last-level cache
_PIECE = 8 * 64  # bytes that `read_all` takes at a time, with the widest vectors


@dataclass(frozen=True)
class Peaks:
    """FLOP/s and bytes/s of some threads together; None if not measured, and `missing` says why."""

    flops: float | None
    bandwidth: float | None
    missing: str | None = None

    def __str__(self) -> str:
        if self.flops is None or self.bandwidth is None:
            return f"no peaks, hence no shares: {self.missing}"
        return f"peaks: {self.flops / 1e9:.0f} GFLOP/s multiply-adds, {self.bandwidth / 1e9:.1f} GB/s of memory"


def measure(threads: int) -> Peaks:
    """Peaks of `threads` threads that run at once."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = _compile(Path(folder) / "peak.so")
        except (OSError, subprocess.SubprocessError) as error:
            return Peaks(None, None, _first_line(error))
        return Peaks(_flops(library, threads), _bandwidth(library, threads))


def measure_gpu(size: int = 8192) -> Peaks:
    """Peaks of the current GPU: a matrix product in bfloat16, and a copy, which reads and writes."""
    a, b = torch.randn(2, size, size, device="cuda").bfloat16().unbind(0)
    source = torch.ones(_BUFFER, device="cuda")
    target = torch.empty_like(source)

    def best(function: Callable[[], object]) -> float:
        return min(seconds(function, 10, torch.cuda.synchronize) for _ in range(10))

    return Peaks(2 * size**3 / best(lambda: a @ b), 2 * source.nbytes / best(lambda: target.copy_(source)))


def _compile(target: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler cc")
    command = [*compiler.split(), "-O3", "-march=native", "-shared", "-fPIC", "-o", str(target), str(_SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    library = ctypes.CDLL(str(target))
    library.multiply_add.argtypes, library.multiply_add.restype = [ctypes.c_int64], ctypes.c_int64
    library.read_all.argtypes, library.read_all.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    return library


def _first_line(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _flops(library: ctypes.CDLL, threads: int, rounds: int = 10_000_000) -> float:
    return _best_rate(lambda _: library.multiply_add(rounds), threads)


def _bandwidth(library: ctypes.CDLL, threads: int) -> float:
    buffer = torch.ones(_BUFFER // 4 + 16)  # written, so that every page exists
    start = -(-buffer.data_ptr() // 64) * 64
    part = _BUFFER // threads // _PIECE * _PIECE
    return _best_rate(lambda i: library.read_all(start + i * part, part), threads)


def _best_rate(work: Callable[[int], int], threads: int, runs: int = 10) -> float:
    """Work per second of the best of `runs` runs, from the start of the first thread to the end of the last."""
    barrier = Barrier(threads)

    def timed(i: int) -> tuple[float, int, float]:
        barrier.wait()
        start = time.perf_counter()
        done = work(i)
        return start, done, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:
        best = 0.0
        for _ in range(runs):
            starts, done, ends = zip(*pool.map(timed, range(threads)), strict=True)
            best = max(best, sum(done) / (max(ends) - min(starts)))
    return best
