"""Time and memory of near and far keys against all keys by EA, a window alone, the squared form alone, and softmax.

    python benchmarks/near_far.py [--lengths L ...] [--kinds KIND ...] [--window N] [--no-memory] [--json FILE]

Causal attention in float32, ``(1, H, L, E)``, forward, with gradients, and one token after L others. Sampled rows are
checked against the definition in float64 first; a wrong result gets no ratio. All kinds run in turn; ratios are of
times of a round, ours the divisor. Calls of more than five seconds are timed once.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from expressive_attention import expressive_attention
from expressive_attention.near_far import near_far_attention
from expressive_attention.nn import NearFarCache
from expressive_attention.recurrent import SquaredState
from long import inputs, warm, with_gradients
from memory import bytes_beyond
from timing import Ratio, seconds

KINDS = ("forward", "forward + backward", "one token")
OURS = "near and far"
ROUNDS = 3
_ONCE = 5.0
_CHECKED = (0.25, 0.6, 1.0)  # places of the rows whose error is checked, as shares of the length


def attentions(window: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Near and far, and its rivals."""
    return {
        OURS: lambda q, k, v: near_far_attention(q, k, v, window),
        "EA": lambda q, k, v: expressive_attention(q, k, v, is_causal=True),
        "EA in a window": lambda q, k, v: expressive_attention(
            q, k, v, is_causal=True, window_size=(window - 1, -1)
        ),
        "squared": lambda q, k, v: expressive_attention(q, k, v, is_causal=True, form="squared"),
        "softmax": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }  # fmt: skip


def of_one_token(window: int, tensors: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """Each kind of attention for one token, after all others of the tensors."""
    _, k, v = tensors
    before, last = [x[:, :, :-1] for x in tensors], [x[:, :, -1:] for x in tensors]
    cache, state = NearFarCache(window), SquaredState(1, k.shape[1], k.shape[3])
    cache.attend(*before)
    state.update(*before[1:])
    near_keys, near_values = (x[:, :, -window:] for x in (k, v))
    return {
        OURS: lambda: cache.attend(*last),
        "EA": lambda: expressive_attention(last[0], k, v),
        "EA in a window": lambda: expressive_attention(last[0], near_keys, near_values),
        "squared": lambda: state.extend(*last),
        "softmax": lambda: F.scaled_dot_product_attention(last[0], k, v),
    }


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The last row, from all of its pairs."""
    squares = (q @ k.mT * q.shape[-1] ** -0.5).square()
    squares[..., -window:] /= 1 + squares[..., -window:]
    return squares / squares.sum(-1, keepdim=True) @ v


def error_of(output: Tensor, tensors: Sequence[Tensor], window: int) -> float:
    """The largest error of sampled rows, over twice that of the definition in float32 and one rounding."""
    worst = 0.0
    for share in _CHECKED:
        end = int(share * output.shape[2])
        q, k, v = (x[:, :, max(0, end - 1) if i == 0 else 0 : end] for i, x in enumerate(tensors))
        exact = by_definition(q.double(), k.double(), v.double(), window)
        plain = by_definition(q, k, v, window).double()
        budget = 2 * (plain - exact).abs().amax() + torch.finfo(torch.float32).eps * exact.abs()
        worst = max(worst, float(((output[:, :, end - 1 : end].double() - exact).abs() / budget).max()))
    return worst


def times(functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each, in turn; one number where it takes long."""
    found = {name: [seconds(function, 1)] for name, function in functions.items()}
    if max(map(max, found.values())) > _ONCE:
        return found
    repeats = {name: max(1, round(0.05 / max(own[0], 1e-6))) for name, own in found.items()}
    found = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            found[name].append(seconds(function, repeats[name]))
    return found


def measured(kind: str, length: int, arguments: argparse.Namespace) -> dict[str, object]:
    """A row of the table: error, milliseconds of ours, and ratios of the others."""
    tensors = inputs(arguments.heads, length, arguments.dim)
    calls = attentions(arguments.window)
    error = error_of(calls[OURS](*tensors), tensors, arguments.window)
    if not error <= 1:
        return {"kind": kind, "length": length, "error": error}
    warm(tensors)
    if kind == "one token":
        functions = of_one_token(arguments.window, tensors)
    elif kind == "forward":
        functions = {name: lambda call=call: call(*tensors) for name, call in calls.items()}
    else:
        leaves = [x.detach().requires_grad_() for x in tensors]
        functions = {name: with_gradients(call, leaves, torch.ones_like(leaves[2])) for name, call in calls.items()}
    found = times(functions)
    ratios = {name: Ratio.of(found[OURS], own) for name, own in found.items() if name != OURS}
    own = next(iter(ratios.values())).ours
    return {"kind": kind, "length": length, "error": error, "seconds": own, "ratios": ratios}


def line(row: dict[str, object]) -> str:
    """A row in words."""
    start = f"{row['kind']:20} {row['length']:>8} {row['error']:6.2f}"
    ratios = row.get("ratios")
    if not isinstance(ratios, dict):
        return f"{start}  wrong: no times"
    parts = [f"{name}: {ratio.rival * 1e3:.2f} ms, {ratio}" for name, ratio in ratios.items()]
    return "  ".join([f"{start} {float(str(row['seconds'])) * 1e3:10.2f} ms", *parts])


def memory_of(name: str, length: int, arguments: argparse.Namespace) -> int:
    """Bytes of a forward pass beyond inputs and output, in a new process."""
    words = ["--heads", arguments.heads, "--dim", arguments.dim, "--window", arguments.window, "--threads",
             arguments.threads, "--memory-of", name, "--lengths", length]  # fmt: skip
    done = subprocess.run([sys.executable, __file__, *map(str, words)], check=True, capture_output=True, text=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32_768, 131_072])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    for name, default in (("window", 256), ("heads", 2), ("dim", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    for name in ("window", "heads", "dim", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if min(arguments.lengths) < 4:
        parser.error(f"--lengths must be at least 4, got {min(arguments.lengths)}")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        call = attentions(arguments.window)[arguments.memory_of]
        call(*inputs(arguments.heads, 300, arguments.dim))  # what the first call needs is not of this one
        tensors = inputs(arguments.heads, arguments.lengths[0], arguments.dim)
        print(bytes_beyond(lambda: [call(*tensors)])[0])
        return

    print(
        f"causal, float32, (1, {arguments.heads}, L, {arguments.dim}), window {arguments.window}, {arguments.threads} "
        "threads; near and far in ms, then rivals in ms and as multiples of it, median (low to high)"
    )
    print(f"{'':20} {'L':>8} {'error':>6}")
    rows = []
    for kind in arguments.kinds:
        for length in arguments.lengths:
            rows.append(measured(kind, length, arguments))
            print(line(rows[-1]), flush=True)
    used: dict[str, dict[int, int]] = {}
    if not arguments.no_memory:
        for name in attentions(1):
            used[name] = {length: memory_of(name, length, arguments) for length in arguments.lengths}
            parts = (f"{length}: {size / 2**20:.1f} MiB" for length, size in used[name].items())
            print(f"forward, memory beyond inputs and output, {name:15}", "  ".join(parts), flush=True)
    if arguments.json:
        for row in rows:
            row["ratios"] = {name: asdict(ratio) for name, ratio in row.get("ratios", {}).items()}
        Path(arguments.json).write_text(
            json.dumps({"rows": rows, "memory": used, "arguments": vars(arguments)}, indent=1)
        )


if __name__ == "__main__":
    main()
