"""Find the fastest tiles of the Triton kernels on this GPU, for head dimensions 64 and 128.

    python benchmarks/tune.py [--out FOLDER] [--budget SECONDS] [--write] [--dry-run]

All candidates are compiled in parallel beforehand. Each is then launched 20 times on a causal problem of length 4096,
and what it took is at once a line of FOLDER/tuning.jsonl. FOLDER/tuned.json is the table of the fastest; --write puts
it in the package, which reads it at launch. A candidate whose result differs from that of the default has no time.
With --dry-run, few candidates run on the CPU, by Triton's interpreter.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder has a file named like a module of the standard library

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lines import write_line

KERNELS = {
    "forward": "forward_kernel", "row": "row_kernel", "query": "query_kernel", "key_value": "key_value_kernel",
}  # fmt: skip
LAUNCHES = 20


class Candidate(NamedTuple):
    """A tile ``(rows, keys, warps, stages)`` of a kernel, for a dtype and a head dimension."""

    kernel: str
    dtype: str
    width: int
    tile: tuple[int, int, int, int]


def candidates(dry_run: bool) -> list[Candidate]:
    """All tiles to compare; the default of each kernel need not be among them."""
    if dry_run:
        return [Candidate(kernel, "bfloat16", 16, (16, keys, 4, 1)) for kernel in KERNELS for keys in (16, 32)]
    found = []
    for dtype in ("bfloat16", "float16", "float32"):
        for width in (64, 128):
            narrow = dtype != "float32"
            tiles = {
                "forward": [
                    (rows, keys, warps, stages)
                    for rows, warps in ((64, 4), (128, 4), (128, 8))
                    for keys in ((32, 64, 128) if narrow else (32,))
                    for stages in ((2, 3) if narrow else (2,))
                ],
                "query": [
                    (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (64, 64, 4, 1), (128, 32, 8, 2), (32, 32, 4, 2),
                ],
                "key_value": [
                    (64, 64, 4, 2), (32, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 1), (32, 32, 4, 2),
                ],
                "row": [(64, 64, 4, 1), (32, 64, 4, 1)],
            }  # fmt: skip
            found += [Candidate(kernel, dtype, width, tile) for kernel, own in tiles.items() for tile in own]
    # bfloat16 is what is trained with most.
    return sorted(found, key=lambda x: (x.dtype != "bfloat16", x.dtype == "float32"))


def launches(candidate: Candidate, length: int, heads: int) -> tuple[list[Callable[[], None]], list[torch.Tensor]]:
    """The launches of a kernel with a tile in a training step, to repeat, and the results of the step."""
    from expressive_attention.backends.triton import launch, tuning
    from expressive_attention.backends.triton.tiles import Tile
    from expressive_attention.call import Call, Upstream, Visibility

    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, candidate.dtype)
    query, key, value, upstream = (
        torch.randn(4, 1, heads, length, candidate.width, device=device, dtype=dtype, generator=generator)
    )  # fmt: skip
    call = Call(query, key, value, None, Visibility(right=0), candidate.width**-0.5, "expressive")
    found: list[Callable[[], None]] = []
    run, choose = launch._run, tuning.choose

    def record(kernel: Any, grid: Any, tile: Any, arguments: dict[str, Any], **more: Any) -> None:
        run(kernel, grid, tile, arguments, **more)
        if kernel.fn.__name__ == KERNELS[candidate.kernel] and not arguments.get("WIDE"):
            found.append(lambda: run(kernel, grid, tile, arguments, **more))

    def chosen(kernel: str, *problem: Any) -> Tile:
        return Tile(*candidate.tile) if kernel == candidate.kernel and any(candidate.tile) else choose(kernel, *problem)

    launch._run, tuning.choose = record, chosen
    try:
        result = launch.forward(call)
        results = [result.output]
        if candidate.kernel != "forward":
            results = list(launch.backward(call, result, Upstream(upstream, None, False))[:3])
    finally:
        launch._run, tuning.choose = run, choose
    return found, results


def compiled(candidate: Candidate) -> str:
    """Compile a candidate, in a process of its own; why it does not run, or nothing."""
    try:
        launches(candidate, 64, 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def seconds(function: Callable[[], None]) -> float:
    """The median seconds of a launch."""
    times = []
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    function()
    for _ in range(LAUNCHES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def tuned(found: list[Candidate], length: int, heads: int, workers: int, until: float) -> Iterator[dict[str, Any]]:
    """Seconds of each candidate, as rows of the file, until the time is over."""
    wrong: dict[Candidate, str] = {}
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            waiting = [(candidate, pool.apply_async(compiled, (candidate,))) for candidate in found]
            for candidate, answer in waiting:
                answer.wait(max(0.0, until - time.monotonic()))
                wrong[candidate] = answer.get() if answer.ready() else "not compiled in time"
    expected: dict[tuple[str, str, int], list[torch.Tensor]] = {}
    for candidate in found:
        if time.monotonic() > until:
            return
        row: dict[str, Any] = {**candidate._asdict(), "seconds": None, "note": wrong.get(candidate, "")}
        if not row["note"]:
            try:
                if candidate[:3] not in expected:
                    default, results = launches(candidate._replace(tile=(0, 0, 0, 0)), length, heads)
                    expected[candidate[:3]] = results
                    yield {**row, "tile": "default", "seconds": seconds(default[0])}
                own, results = launches(candidate, length, heads)
                if all(
                    (a.float() - b.float()).abs().max() <= 0.02 * b.float().abs().max()
                    for a, b in zip(results, expected[candidate[:3]], strict=True)
                ):
                    row["seconds"] = seconds(own[0])
                else:
                    row["note"] = "the result is another one than that of the default"
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield row


def table(rows: list[dict[str, Any]], capability: int) -> dict[str, Any]:
    """The fastest tile of each kernel, dtype and width, as `tuned.json` has it, where it is faster than the default."""
    best: dict[tuple[str, str, int], tuple[float, Any]] = {}
    for row in rows:
        if row["seconds"] is not None:
            key = row["kernel"], row["dtype"], row["width"]
            best[key] = min(best.get(key, (float("inf"), None)), (row["seconds"], row["tile"]), key=lambda x: x[0])
    found: dict[str, Any] = {}
    for (kernel, dtype, width), (_, tile) in sorted(best.items()):
        if tile != "default":
            found.setdefault(kernel, {}).setdefault(dtype, {})[str(width)] = list(tile)
    return {str(capability): found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER", help="folder to write to")
    parser.add_argument("--budget", type=float, default=150.0, metavar="SECONDS", help="stop after this time")
    parser.add_argument("--write", action="store_true", help="write the table into the package, too")
    parser.add_argument("--dry-run", action="store_true", help="few candidates on the CPU")
    options = parser.parse_args()
    if options.budget <= 0:
        parser.error(f"--budget must be above 0, got {options.budget:g}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch finds none")
    if options.dry_run and options.write:
        parser.error("--write needs what was measured, and --dry-run measures nothing")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    until = time.monotonic() + options.budget
    length, heads, workers = (64, 1, 1) if options.dry_run else (4096, 32, os.cpu_count() or 1)
    rows = []
    for row in tuned(candidates(options.dry_run), length, heads, workers, until):
        rows.append(row)
        write_line(options.out / "tuning.jsonl", row)
    from expressive_attention.backends.triton import tuning

    capability = 0 if options.dry_run else tuning.capability_of(torch.device("cuda", torch.cuda.current_device()))
    found = table(rows, capability)
    (options.out / "tuned.json").write_text(json.dumps(found, indent=2) + "\n")
    if options.write:
        path = Path(tuning.__file__).with_name("tuned.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **found}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
