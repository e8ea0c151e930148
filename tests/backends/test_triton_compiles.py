"""The kernels in Triton, compiled for GPUs that are not here: what the interpreter does not see."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).with_name("compile_triton.py")
LIMITS = json.loads(SCRIPT.with_name("triton_limits.json").read_text())

# Shared memory that a program may have, in KiB, by compute capability.
SHARED_MEMORY = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}


def compiled(folder, capability, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "TRITON_CACHE_DIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def above(rows, limits):
    """The kernels that exceed a limit of registers, stack, shared memory or instructions, and by how much."""
    found = {}
    for row in rows:
        name = f"{row['case']} {row['kernel']}"
        if name in limits:
            taken = [row["registers"], row["stack"], row["shared"], (row["loop"] or {"all": 0})["all"]]
            registers, stack, shared, loop = limits[name]
            # Compilers of one minor version differ by a few instructions.
            room = [registers + 4, stack + 16, shared, loop * 1.03]
            if any(number > most for number, most in zip(taken, room, strict=True)):
                found[name] = {"takes": taken, "limits": limits[name]}
    return found


def limits_of(capability):
    import triton

    return LIMITS.get(".".join(triton.__version__.split(".")[:2]), {}).get(str(capability), {})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_and_stay_within_their_limits(capability, tmp_path):
    rows = compiled(tmp_path, capability)
    assert len(rows) > 30
    most = 1024 * SHARED_MEMORY[capability]
    assert {row["kernel"]: row["shared"] for row in rows if row["shared"] > most} == {}
    limits = limits_of(capability)
    assert limits.keys() <= {f"{row['case']} {row['kernel']}" for row in rows}
    assert above(rows, limits) == {}


def test_the_forward_kernels_of_an_h100_stay_within_their_limits(tmp_path):
    """Two of all kernels, in seconds, and with dropout and blocks, whose code the interpreter takes in more forms."""
    limits = limits_of(90)
    if not limits:
        pytest.skip("no limits are stored for this version of Triton")
    cases = ["bfloat16-64", "linear, bfloat16-64", "dropout, blocks"]
    rows = compiled(tmp_path, 90, *cases, "--kernel", "forward_kernel", "--kernel", "linear_forward_kernel")
    assert sorted({row["case"] for row in rows}) == sorted(cases)
    assert above(rows, limits) == {}
    lower = {name: [number - 20 for number in limit] for name, limit in limits.items()}
    main = {"bfloat16-64 forward_kernel", "linear, bfloat16-64 linear_forward_kernel"} & limits.keys()
    assert above(rows, lower).keys() == main
