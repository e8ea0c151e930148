"""Time and memory of long sequences: the squared form in linear time against all pairs, and against softmax.

    python benchmarks/long.py [--lengths L ...] [--kinds KIND ...] [--rivals NAME ...] [--plot FILE] [--json FILE]

Causal attention in float32, ``(1, H, L, E)``, forward and with gradients, and a token that is generated after L others:
from a state of constant size, and from a cache of keys and values. Sampled rows are checked against the reference in
float64 first; a wrong kernel gets no ratio. Each time is the median of three runs, and of one run where that takes over
20 seconds. Rivals beyond `--rivals-up-to` are left out. All of it takes half an hour on a quiet machine, nearly all of
it for the rivals at 65,536 and 131,072 keys.
"""

from __future__ import annotations

import sys

# This folder goes last: it has a file named like a module of the standard library.
sys.path.append(sys.path.pop(0))

import argparse
import functools
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from expressive_attention import expressive_attention
from expressive_attention.recurrent import SquaredState
from memory import bytes_beyond
from timing import seconds

KINDS = ("forward", "forward + backward", "one token")
ROUNDS = 3
_ONCE = 20.0  # seconds of a call from which on it is timed once: a first call costs milliseconds more than the next
_CHECKED = (0.25, 0.6, 1.0)  # places of the rows whose error is checked, as shares of the length

# Smallest acceptable ratios to all pairs and to softmax, at 131,072 keys, 8 heads of 64 and two threads.
GOALS = {
    ("forward", "all pairs"): 20.0,
    ("forward", "softmax"): 40.0,
    ("forward + backward", "all pairs"): 12.0,
    ("one token", "cache"): 30.0,
}
_AT = 131_072
_MEMORY = 256 << 20  # bytes beyond inputs and output
_DRIFT = 0.05  # of the time per token between the lengths 65,536 and 1,048,576


@dataclass
class Row:
    """Seconds of linear time and of its rivals, by name; the error as a share of its budget.

    Attributes:
        kind: ``"forward"``, ``"forward + backward"`` or ``"one token"``.
        length: Keys.
        ours: Median seconds; None: the error check was red.
        rivals: Median seconds of each that was timed.
        error: Largest error over its budget.
    """

    kind: str
    length: int
    ours: float | None
    rivals: dict[str, float] = field(default_factory=dict)
    error: float | None = None

    def line(self) -> str:
        own = "-" if self.ours is None else f"{self.ours * 1e3:10.2f}"
        error = "" if self.error is None else f"{self.error:.2f}"
        parts = [f"{self.kind:20} {self.length:>9} {own:>10} {error:>6}"]
        for name, rival in self.rivals.items():
            assert self.ours is not None
            goal = GOALS.get((self.kind, name)) if self.length == _AT else None
            verdict = "" if goal is None else f", goal {goal:g} {'met' if rival / self.ours >= goal else 'missed'}"
            parts.append(f"{name}: {rival * 1e3:.2f} ms, {rival / self.ours:.2f} times{verdict}")
        return "  ".join(parts)


def median(function: Callable[[], object]) -> float:
    first = seconds(function, 1)
    if first > _ONCE:
        return first
    return statistics.median(seconds(function, 1) for _ in range(ROUNDS))


def warm(tensors: Sequence[Tensor]) -> None:
    """Take the memory that a call will, and free it.

    The first use of a page costs more than the next, by far on virtual machines. A call that is timed once would pay.
    """
    copies = [torch.ones_like(x) for x in tensors]
    del copies


def inputs(heads: int, length: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, heads, length, dim, generator=generator) for _ in range(3)]


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return expressive_attention(q, k, v, is_causal=True, form="squared", backend="linear")


def all_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return expressive_attention(q, k, v, is_causal=True, form="squared", backend="cpu")


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


RIVALS = {"all pairs": all_pairs, "softmax": softmax}


def error_of(outputs: Sequence[Tensor], parts: Sequence[Sequence[Tensor]]) -> float:
    """The largest error of rows that see all keys, over twice that of the reference plus one rounding."""
    own = parts[0][0].dtype
    exact, plain = (
        torch.stack(
            [
                expressive_attention(
                    q.to(dtype), k.to(dtype), v.to(dtype), form="squared", backend="reference"
                ).double()
                for q, k, v in parts
            ]
        )
        for dtype in (torch.float64, own)
    )
    budget = 2 * (plain - exact).abs().amax() + torch.finfo(own).eps * exact.abs()
    return float(((torch.stack(list(outputs)).double() - exact).abs() / budget).max())


def sampled(output: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The error of sampled rows of the last head."""
    ends = [int(share * q.shape[2]) for share in _CHECKED]
    return error_of(
        [output[:, -1:, end - 1 : end] for end in ends],
        [(q[:, -1:, end - 1 : end], k[:, -1:, :end], v[:, -1:, :end]) for end in ends],
    )


def with_gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor], upstream: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def operator_row(kind: str, length: int, heads: int, dim: int, rivals: Sequence[str]) -> Row:
    """Forward, or forward + backward."""
    tensors = inputs(heads, length, dim)
    row = Row(kind, length, None, error=sampled(linear(*tensors), *tensors))
    if not row.error or row.error > 1:
        return row

    def call(function: Callable[..., Tensor]) -> Callable[[], object]:
        if kind == "forward":
            return lambda: function(*tensors)
        return with_gradients(function, [x.detach().requires_grad_() for x in tensors], torch.ones_like(tensors[2]))

    warm(tensors)
    row.ours = median(call(linear))
    row.rivals = {name: median(call(RIVALS[name])) for name in RIVALS if name in rivals}
    return row


def token_row(length: int, heads: int, dim: int, rivals: Sequence[str]) -> Row:
    """One token after `length` others, whose key and value are added, too."""
    q, k, v = inputs(heads, length, dim)
    query, key, value = (x[:, :, -1:] for x in (q, k, v))
    state = SquaredState(1, heads, dim).update(k[:, :, :-1], v[:, :, :-1])
    output = state.copy().extend(query, key, value)
    row = Row("one token", length, None, error=error_of([output[:, -1:]], [(query[:, -1:], k[:, -1:], v[:, -1:])]))
    if not row.error or row.error > 1:
        return row
    row.ours = median(lambda: state.extend(query, key, value))
    if "all pairs" in rivals:
        row.rivals["cache"] = median(lambda: expressive_attention(query, k, v, form="squared"))
    if "softmax" in rivals:
        row.rivals["softmax"] = median(lambda: F.scaled_dot_product_attention(query, k, v))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16_384, 65_536, 131_072, 1_048_576])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "--rivals", nargs="*", default=list(RIVALS), choices=RIVALS, metavar="NAME", help=", ".join(RIVALS)
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rivals-up-to", type=int, default=131_072, help="longest sequence of the rivals")
    parser.add_argument(
        "--memory", action="store_true", help="print the bytes of a forward pass beyond inputs and output"
    )
    parser.add_argument("--plot", help="file for a picture of times over lengths")
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    for name in ("heads", "dim", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if min(arguments.lengths) < 2:
        parser.error(f"--lengths must be at least 2, got {min(arguments.lengths)}")
    torch.set_num_threads(arguments.threads)
    heads, dim = arguments.heads, arguments.dim

    if arguments.memory:
        linear(*inputs(heads, 300, dim))  # what the first call needs is not of this one
        tensors = inputs(heads, arguments.lengths[0], dim)
        print(bytes_beyond(lambda: [linear(*tensors)])[0])
        return

    print(
        f"causal, float32, (1, {heads}, L, {dim}), {arguments.threads} threads; times of linear time in ms, then rivals"
    )
    print(f"{'':20} {'L':>9} {'linear':>10} {'error':>6}")
    rows: list[Row] = []
    for kind in arguments.kinds:
        for length in arguments.lengths:
            rivals = arguments.rivals if length <= arguments.rivals_up_to else []
            make = token_row if kind == "one token" else functools.partial(operator_row, kind)
            rows.append(make(length, heads, dim, rivals))
            print(rows[-1].line(), flush=True)
    state = SquaredState(1, 1, dim)
    print(
        f"state of a head: {state.sums.nbytes / 1e6:.2f} MB of products with values, {state.nbytes / 1e6:.2f} MB in all"
    )
    print(drift(rows))
    longest = max(arguments.lengths)
    beyond = memory_of(longest, heads, dim, arguments.threads)
    verdict = f", goal {_MEMORY >> 20} MiB {'met' if beyond <= _MEMORY else 'missed'}" if longest >= 1 << 20 else ""
    print(f"memory beyond inputs and output at L = {longest}: {beyond / 2**20:.1f} MiB{verdict}")
    if arguments.json:
        found = {"rows": [asdict(row) for row in rows], "memory": beyond, "arguments": vars(arguments)}
        Path(arguments.json).write_text(json.dumps(found, indent=1))
    if arguments.plot:
        plot(rows, arguments.plot)


def drift(rows: Sequence[Row]) -> str:
    """The time per token at the longest length over that at 65,536, forward."""
    per_token = {row.length: row.ours / row.length for row in rows if row.kind == "forward" and row.ours is not None}
    long = {length: value for length, value in per_token.items() if length >= 65_536}
    if len(long) < 2:
        return "time per token: at least two lengths of 65,536 or more are needed to compare"
    first, last = min(long), max(long)
    change = long[last] / long[first] - 1
    verdict = "met" if abs(change) <= _DRIFT else "missed"
    return f"time per token, forward: {change:+.1%} from L = {first} to {last}, goal {_DRIFT:.0%} {verdict}"


def memory_of(length: int, heads: int, dim: int, threads: int) -> int:
    """Bytes of a forward pass beyond inputs and output, in a new process."""
    sizes = {"lengths": length, "heads": heads, "dim": dim, "threads": threads}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    done = subprocess.run([sys.executable, __file__, "--memory", *options], check=True, capture_output=True, text=True)
    return int(done.stdout)


def plot(rows: Sequence[Row], path: str) -> None:
    """Seconds over lengths, both on logarithmic axes."""
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row.kind for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 4), constrained_layout=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = [row for row in rows if row.kind == kind]
        lines = {"linear time": [(row.length, row.ours) for row in own]}
        for name in dict.fromkeys(name for row in own for name in row.rivals):
            lines[name] = [(row.length, row.rivals.get(name)) for row in own]
        for name, points in lines.items():
            there = [(length, value) for length, value in points if value is not None]
            axis.loglog(*zip(*there, strict=True), marker="o", label=name, base=2)
        axis.set(title=kind, xlabel="keys", ylabel="seconds")
        axis.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
