"""The cost of context parallelism: a table for many GPUs by formulas, and the formulas against two processes here.

    python benchmarks/scaling.py                 the table of docs/scaling.md
    python benchmarks/scaling.py --measure       two gloo processes of one thread: measured times beside simulated ones

The simulation knows two rates of each process, both measured in the same run on other sizes: operations per second of
attention alone, and bytes per second between the processes alone. `expressive_attention.distributed.costs` has the
rest.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expressive_attention import expressive_attention
from expressive_attention.distributed import context_parallel
from expressive_attention.distributed.costs import Cost, Layer, Machine, cost, seconds
from expressive_attention.distributed.links import Links

METHODS = ("ring", "all_to_all", "states")

# A layer of a model of 8 billion parameters, and a GPU with its share of a network: assumptions, not measurements.
LAYER = Layer(heads=32, kv_heads=8, width=128)
GPU = Machine(operations=400e12, bandwidth=50e9, latency=10e-6)
LENGTH = 1 << 20
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)

# The layer that two processes are timed on.
SMALL = Layer(heads=4, kv_heads=4, width=32, itemsize=4)
ROUNDS = 5


def table(length: int = LENGTH) -> str:
    """The table of a training step of a layer, forward and backward, in Markdown."""
    lines = [
        "| GPUs | tokens each | method | TFLOP | MB sent | waits | ms computing | ms sending | ms together |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        for method in METHODS:
            tokens = f"{length // ranks:,}"
            if method == "all_to_all" and ranks > LAYER.heads:
                lines.append(f"| {ranks} | {tokens} | {method} | more ranks than heads |" + " |" * 5)
                continue
            both = [cost(method, LAYER, length, ranks, backward) for backward in (False, True)]
            operations, sent, rounds = (sum(x[i] for x in both) for i in range(3))
            numbers = (
                f"{operations / 1e12:.2f}", f"{sent / 1e6:,.0f}", f"{rounds}",
                f"{1e3 * operations / GPU.operations:.2f}",
                f"{1e3 * (sent / GPU.bandwidth + rounds * GPU.latency):.2f}",
                f"{1e3 * sum(seconds(x, GPU) for x in both):.2f}",
            )  # fmt: skip
            lines.append(f"| {ranks} | {tokens} | {method} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def _median(run: Callable[[], object]) -> float:
    """Median seconds, of which the slowest process counts."""
    found = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        run()
        taken = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        found.append(float(taken))
    return statistics.median(found[1:])


def _tensors(layer: Layer, tokens: int) -> list[torch.Tensor]:
    shapes = ((layer.batch, heads, tokens, layer.width) for heads in (layer.heads, layer.kv_heads, layer.kv_heads))
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def _rates(links: Links, tokens: int) -> tuple[Machine, Machine]:
    """The rates of attention over all pairs, and of states, while both processes compute; and those of the link."""
    query, key, value = _tensors(SMALL, tokens)
    single = 14 * SMALL.width * SMALL.heads * tokens * (tokens + 1) / 2

    def attend() -> None:
        expressive_attention(query, key, value, is_causal=True).sum().backward()

    pairs = single / _median(attend)
    mesh = _alone()

    def with_states() -> None:
        options: dict[str, Any] = {"method": "states", "form": "squared", "backend": "linear"}
        context_parallel(query, key, value, mesh, is_causal=True, **options).sum().backward()

    operations = sum(cost("states", SMALL, tokens, 1, backward).operations for backward in (False, True))
    of_states = operations / _median(with_states)
    times = []
    for size in (1 << 10, 1 << 24):
        x, room = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        other = 1 - links.rank
        times.append(
            _median(lambda x=x, room=room, other=other: links.start([(x, other)], [(room, other)], "a test").wait())
        )
    bandwidth = (1 << 24) / (times[1] - times[0])
    # Both processes have one core each, on which bytes are copied too: nothing is hidden.
    return Machine(pairs, bandwidth, times[0], 0.0), Machine(of_states, bandwidth, times[0], 0.0)


def _alone() -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    groups: list[Any] = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return DeviceMesh.from_group(groups[dist.get_rank()], "cpu", mesh_dim_names=("cp",))


def _worker(rank: int, rendezvous: str, lengths: list[int]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    machine, of_states = _rates(Links(mesh), 1024)
    if rank == 0:
        print(f"{machine.operations / 1e9:.1f} GFLOP/s of pairs, {of_states.operations / 1e9:.1f} of states, "
              f"{machine.bandwidth / 1e9:.2f} GB/s, {1e6 * machine.latency:.0f} us\n")  # fmt: skip
        print("| method | L | measured, ms | simulated, ms | measured / simulated |\n|---|---|---|---|---|")
    for method in METHODS:
        for length in lengths:
            parts = _tensors(SMALL, length // 2)
            options: dict[str, Any] = {"is_causal": True, "method": method}
            options |= {"form": "squared", "backend": "linear"} if method == "states" else {}

            def step(parts: list[torch.Tensor] = parts, options: dict[str, Any] = options) -> None:
                context_parallel(parts[0], parts[1], parts[2], mesh, **options).sum().backward()

            measured = _median(step)
            rates = of_states if method == "states" else machine
            found: list[Cost] = [cost(method, SMALL, length, 2, backward) for backward in (False, True)]
            simulated = sum(seconds(x, rates) for x in found)
            if rank == 0:
                print(f"| {method} | {length:,} | {1e3 * measured:.1f} | {1e3 * simulated:.1f} | "
                      f"{measured / simulated:.2f} |", flush=True)  # fmt: skip
    dist.destroy_process_group()


def main() -> None:
    """Print the table, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="time two processes here")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="of --measure, multiples of 4"
    )
    options = parser.parse_args()
    if not options.measure:
        print(table())
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _worker, (str(Path(folder) / "rendezvous"), options.lengths), nprocs=2, start_method="spawn"
        )  # fmt: skip


if __name__ == "__main__":
    main()
