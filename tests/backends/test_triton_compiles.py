"""The kernels in Triton, compiled for GPUs that are not here: what the interpreter does not see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# Shared memory that a program may have, in KiB, by compute capability.
SHARED_MEMORY = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_and_fit(capability, tmp_path):
    script = Path(__file__).with_name("compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [line.split() for line in done.stdout.splitlines()]
    assert len(sizes) > 30
    assert {name: size for name, size in sizes if int(size) > 1024 * SHARED_MEMORY[capability]} == {}
