"""Compile the kernels in Triton for a GPU that need not be there, and say what each of them takes there.

    python tests/backends/compile_triton.py CAPABILITY [CASE ...] [--kernel NAME ...] [--store]

Prints a line of JSON for each kernel of the cases (default: all): registers and stack of a thread (bytes; what does not
fit in registers lies there), shared memory of a program (bytes), and instructions: all of them, and those of the
innermost loop over whole tiles, by kind. With --kernel, kernels of these names are compiled alone. With --store, it is
the main kernels of the plain problems, and their numbers become the limits in `triton_limits.json` for this version of
Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expressive_attention.backends.triton import launch, linear
from expressive_attention.call import Call, Upstream, Visibility

TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Kinds of instructions that a loop is bound by, by the beginnings of their names.
KINDS = {
    "tensor": ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA"),
    "mufu": ("MUFU",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "LDGSTS"),
    "global": ("LDG", "STG", "LDL", "STL"),
}


def described(kernel: Any, given: dict[str, Any]) -> tuple[dict, dict, dict]:
    """The signature, constants and attributes that Triton would give a launch with these arguments."""
    signature, constants, attributes = {}, {}, {}

    def describe(place: tuple[int, ...], value: Any, specialize: bool) -> Any:
        if isinstance(value, tuple):
            types = [describe((*place, i), x, specialize) for i, x in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if value is None or (specialize and isinstance(value, int) and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (specialize and isinstance(value, int) and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            constants[(i,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = describe((i,), value, not parameter.do_not_specialize)
    return signature, constants, attributes


def compile_for(
    capability: int, report: Callable[[dict[str, Any]], None], wanted: Callable[[str], bool] = lambda name: True
) -> Callable[..., None]:
    """A stand-in for `launch._run`, which compiles the wanted ones of what it would launch, and reports on them."""
    target, done = GPUTarget("cuda", capability, 32), set()

    def run(kernel: Any, grid: tuple[int, ...], tile: Any, arguments: dict[str, Any], **more: Any) -> None:
        again = {**arguments, **more}.get("WIDE") and "wide" not in kernel.fn.__name__
        name = kernel.fn.__name__ + "_again" * bool(again)
        if not wanted(name):
            return
        given = {**arguments, **more, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
        if "normalizers" in given:
            given["normalizers"].zero_()  # what nobody wrote may be NaN, which has others computed
        signature, constants, attributes = described(kernel, given)
        key = (kernel.fn.__name__, tuple(tile), str(signature), str(constants))
        if key in done:
            return
        done.add(key)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target, {"num_warps": tile.warps, "num_stages": tile.stages})
        report({"kernel": name, "tile": list(tile), "shared": compiled.metadata.shared, **read(compiled.asm["cubin"])})

    return run


def read(cubin: bytes) -> dict[str, Any]:
    """Registers, stack and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*arguments: str) -> str:
            command = [str(TOOLS / "cuobjdump"), *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = tool("-res-usage"), tool("-sass")
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    lines = [
        (int(place, 16), name, rest)
        for place, name, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)([^;]*);", code)
    ]
    return {"registers": registers, "stack": stack, "instructions": len(lines), "loop": innermost(lines)}


def innermost(lines: list[tuple[int, str, str]]) -> dict[str, int] | None:
    """Count the instructions of the shortest loop with weights and products: the one whose tiles need no masks.

    Without weights in a loop, it is the shortest with products: the one that reads a state.
    """
    loops = []
    for place, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < place:
            loops.append((int(target[1], 16), place))
    counts = []
    for first, last in loops:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops):
            continue
        body = [name for place, name, _ in lines if first <= place <= last and name != "NOP"]
        kinds = {kind: sum(name.startswith(starts) for name in body) for kind, starts in KINDS.items()}
        products = kinds["tensor"] or not any(name.startswith(KINDS["tensor"]) for _, name, _ in lines)
        if products:
            counts.append({"all": len(body), **kinds})
    return min(counts, key=lambda count: (not count["mufu"], count["all"]), default=None)


def attend(dtype, width, mask=None, visibility=None, length=512, form="expressive", groups=2, seeds=None):
    """Forward and backward, for query heads that share a key head; causal by default."""
    query = torch.empty(1, groups, length, width, dtype=dtype)
    key = value = torch.empty(1, 1, 512, width, dtype=dtype)
    visibility = Visibility(right=0) if visibility is None else visibility
    call = Call(query, key, value, mask, visibility, 0.125, form, 0.0 if seeds is None else 0.1, seeds)
    result = launch.forward(call)
    has_bias = mask is not None and mask.dtype != torch.bool
    launch.backward(call, result, Upstream(result.output, result.normalizer, has_bias))


def attend_in_linear_time(dtype, width, visibility=None, decay_heads=None, groups=1):
    """Forward and backward of the squared form, for four chunks of keys and as many of rows; causal by default."""
    length = 4 * launch.tuning.linear_chunk(width)
    query = torch.empty(1, 2 * groups, length, width, dtype=dtype)
    key = value = torch.empty(1, 2, length, width, dtype=dtype)
    decays = None if decay_heads is None else torch.zeros(1, decay_heads, length, dtype=torch.float64)
    call = Call(query, key, value, None, Visibility(right=0) if visibility is None else visibility, 0.125, "squared")
    output, normalizer = linear.forward(call, decays)
    linear.backward(call, decays, Upstream(output, normalizer, False))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BIAS = torch.zeros(1, 2, 512, 512)
SLOPES = torch.ones(1, 2)
STARTS = torch.tensor([0, 200, 512], dtype=torch.int32)
PACKED = {"query_starts": STARTS, "key_starts": STARTS, "longest_query": 312, "longest_key": 312}
LENGTHS = torch.tensor([300])
SEEDS = torch.zeros(1, 3, dtype=torch.int64)
BLOCKS = {
    "listed": torch.tensor([[1, 0, 0, 0], [2, 1, 0, 0], [0, 3, 1, 0], [1, 1, 0, 2]], dtype=torch.int32)[None, None],
    "tiles": torch.ones(2, 128, 128, dtype=torch.bool),
    "block_rows": 128,
    "block_keys": 128,
}

# The plain problems, of which limits are stored.
MAIN: dict[str, Callable[[], None]] = {
    f"{name}-{width}": lambda dtype=dtype, width=width: attend(dtype, width, groups=1)
    for name, dtype in (("bfloat16", BF16), ("float16", FP16), ("float32", FP32))
    for width in (64, 128, 256)
}
MAIN |= {
    f"linear, {name}-{width}": lambda dtype=dtype, width=width: attend_in_linear_time(dtype, width)
    for name, dtype in (("bfloat16", BF16), ("float32", FP32))
    for width in (64, 128)
}


def with_precision(precision: str) -> None:
    """Products of float32 that torch allows to be less exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    attend(FP32, 64)
    torch.set_float32_matmul_precision(before)


OTHERS: dict[str, Callable[[], None]] = {
    "float32, high": lambda: with_precision("high"),
    "float32, medium": lambda: with_precision("medium"),
    "groups": lambda: attend(BF16, 64),
    "bool mask, squared": lambda: attend(BF16, 128, BIAS > 0, Visibility(), form="squared"),
    "decoding": lambda: attend(BF16, 64, visibility=Visibility(), length=1),
    "bias, float16": lambda: attend(FP16, 128, BIAS),
    "bias, wide": lambda: attend(BF16, 256, BIAS),
    "bias, wide, float32": lambda: attend(FP32, 256, BIAS, Visibility()),
    "packed": lambda: attend(BF16, 128, visibility=Visibility(right=0, lower_right=True, **PACKED)),
    "window, slopes": lambda: attend(
        BF16, 128, visibility=Visibility(left=128, right=0, slopes=SLOPES[:, :1]), groups=1
    ),
    "packed, slopes": lambda: attend(FP16, 64, visibility=Visibility(slopes=SLOPES, **PACKED)),
    "bias, window, lengths": lambda: attend(BF16, 64, BIAS, Visibility(left=128, key_lengths=LENGTHS)),
    "decoding, lengths": lambda: attend(
        BF16, 128, visibility=Visibility(right=0, lower_right=True, key_lengths=LENGTHS), length=1
    ),
    "dropout": lambda: attend(BF16, 64, seeds=SEEDS),
    "dropout, bias": lambda: attend(BF16, 128, BIAS, seeds=SEEDS),
    "dropout, window, slopes": lambda: attend(
        FP32, 64, visibility=Visibility(left=128, right=0, slopes=SLOPES), seeds=SEEDS
    ),
    "blocks": lambda: attend(BF16, 64, visibility=Visibility(**BLOCKS), groups=1),
    "blocks, causal, groups, float32": lambda: attend(FP32, 64, visibility=Visibility(right=0, **BLOCKS)),
    "blocks, bool mask, dropout": lambda: attend(
        FP16, 128, BIAS > 0, Visibility(left=128, key_lengths=LENGTHS, **BLOCKS), seeds=SEEDS
    ),
    "blocks, decoding": lambda: attend(
        BF16, 64, visibility=Visibility(**{**BLOCKS, "listed": BLOCKS["listed"][:, :, :1]}), length=1
    ),
    "dropout, blocks": lambda: attend(BF16, 64, visibility=Visibility(right=0, **BLOCKS), seeds=SEEDS),
    "linear, full, float16": lambda: attend_in_linear_time(FP16, 32, Visibility(), groups=2),
    "linear, decays": lambda: attend_in_linear_time(BF16, 64, decay_heads=2, groups=2),
    "linear, decays of queries": lambda: attend_in_linear_time(FP32, 64, decay_heads=4, groups=2),
    "dropout, decoding": lambda: attend(FP16, 256, visibility=Visibility(), length=1, seeds=SEEDS),
}


LIMITS = Path(__file__).with_name("triton_limits.json")


def version() -> str:
    """The version of Triton that limits are stored for: what it compiles changes from one to the next."""
    return ".".join(triton.__version__.split(".")[:2])


def numbers(row: dict[str, Any]) -> list[int]:
    """The numbers of a kernel that have limits: registers, stack, shared memory, instructions of the loop."""
    return [row["registers"], row["stack"], row["shared"], (row["loop"] or {"all": 0})["all"]]


def store(capability: str, rows: list[dict[str, Any]]) -> None:
    """Replace the limits of this version of Triton for a GPU."""
    table = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    found: dict[str, list[int]] = {}
    for row in rows:  # a case may compile a kernel more than once
        name = f"{row['case']} {row['kernel']}"
        found[name] = [max(pair) for pair in zip(numbers(row), found.get(name, [0] * 4), strict=True)]
    table.setdefault(version(), {})[capability] = found
    text = json.dumps({name: dict(sorted(table[name].items())) for name in sorted(table)}, indent=1)
    LIMITS.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", text) + "\n")


def is_main(kernel: str) -> bool:
    """Whether limits are stored for a kernel: it does the work of nearly all rows."""
    return "wide" not in kernel and "again" not in kernel


def main() -> None:
    """Compile the cases that are asked for."""
    cases, rows = {**MAIN, **OTHERS}, []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("capability", type=int)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--kernel", metavar="NAME", action="append")
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args()
    if unknown := {*options.cases} - {*cases}:
        parser.error(f"CASE must be one of {', '.join(cases)}, got {', '.join(sorted(unknown))}")
    capability = options.capability

    def wanted(name: str) -> bool:
        return (is_main(name) or not options.store) and (not options.kernel or name in options.kernel)

    case = ""

    def report(row: dict[str, Any]) -> None:
        rows.append({"case": case, **row})
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()

    launch._run = compile_for(capability, report, wanted)
    launch._processors = lambda device: 128  # as many as let decoding split the keys
    launch.tuning.capability_of = lambda device: capability
    launch.tuning.measured = dict  # the defaults, whatever was measured
    for case in options.cases or (MAIN if options.store else cases):
        cases[case]()
    if options.store:
        store(str(capability), rows)


if __name__ == "__main__":
    main()
