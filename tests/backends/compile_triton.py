"""Compile the kernels in Triton for a GPU that need not be there, and say what each of them takes there.

    python tests/backends/compile_triton.py CAPABILITY [CASE ...]

Prints a line of JSON for each kernel of the cases (default: all): registers and stack of a thread (bytes; what does not
fit in registers lies there), shared memory of a program (bytes), and instructions: all of them, and those of the
innermost loop over whole tiles, by kind.
"""

from __future__ import annotations

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

from expressive_attention.backends.triton import launch
from expressive_attention.call import Call, Upstream, Visibility

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
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


def compile_for(capability: int, report: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """A stand-in for `launch._run`, which compiles what it would launch and reports on it."""
    target, done = GPUTarget("cuda", capability, 32), set()

    def run(kernel: Any, grid: tuple[int, ...], tile: Any, arguments: dict[str, Any], **more: Any) -> None:
        given = {**arguments, **more, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
        signature, constants, attributes = described(kernel, given)
        key = (kernel.fn.__name__, tuple(tile), str(signature), str(constants))
        if key in done:
            return
        done.add(key)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target, {"num_warps": tile.warps, "num_stages": tile.stages})
        name = kernel.fn.__name__ + ("_again" if given.get("WIDE") and "wide" not in kernel.fn.__name__ else "")
        report(
            {"kernel": name, "tile": list(tile), "shared": compiled.metadata.shared, **read(compiled.asm["cubin"])}
        )

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
    """Count the instructions of the shortest loop that multiplies tiles: the one whose tiles need no masks."""
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
        if kinds["tensor"] or not any(name.startswith(KINDS["tensor"]) for _, name, _ in lines):
            counts.append({"all": len(body), **kinds})
    return min(counts, key=lambda count: count["all"], default=None)


def attend(dtype, width, mask=None, visibility=None, length=512, form="expressive", groups=2, seeds=None):
    """Forward and backward, for query heads that share a key head; causal by default."""
    query = torch.empty(1, groups, length, width, dtype=dtype)
    key = value = torch.empty(1, 1, 512, width, dtype=dtype)
    visibility = Visibility(right=0) if visibility is None else visibility
    call = Call(query, key, value, mask, visibility, 0.125, form, 0.0 if seeds is None else 0.1, seeds)
    result = launch.forward(call)
    has_bias = mask is not None and mask.dtype != torch.bool
    launch.backward(call, result, Upstream(result.output, result.normalizer, has_bias))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BIAS = torch.zeros(1, 2, 512, 512)
SLOPES = torch.ones(1, 2)
STARTS = torch.tensor([0, 200, 512], dtype=torch.int32)
PACKED = {"query_starts": STARTS, "key_starts": STARTS, "longest_query": 312, "longest_key": 312}
LENGTHS = torch.tensor([300])
SEEDS = torch.zeros(1, 3, dtype=torch.int64)

# The plain problems, of which limits are stored.
MAIN: dict[str, Callable[[], None]] = {
    f"{name}-{width}": lambda dtype=dtype, width=width: attend(dtype, width, groups=1)
    for name, dtype in (("bfloat16", BF16), ("float16", FP16), ("float32", FP32))
    for width in (64, 128, 256)
}

OTHERS: dict[str, Callable[[], None]] = {
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
    "dropout, decoding": lambda: attend(FP16, 256, visibility=Visibility(), length=1, seeds=SEEDS),
}


def main() -> None:
    """Compile the cases that are asked for."""
    cases = {**MAIN, **OTHERS}
    case = ""

    def report(row: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps({"case": case, **row}) + "\n")
        sys.stdout.flush()

    launch._run = compile_for(int(sys.argv[1]), report)
    launch._processors = lambda device: 128  # as many as let decoding split the keys
    for case in sys.argv[2:] or cases:
        cases[case]()


if __name__ == "__main__":
    main()
