"""Run all checks on a GPU in one go: are the kernels right, and how fast are they?

    python benchmarks/gpu.py [STEP ...] [--out FOLDER]

tests       the tests of the kernels, on the device
large       errors of problems up to 65536 keys, in three dtypes
sanitizer   out-of-bounds accesses, uninitialized reads and races, at small sizes, by NVIDIA's compute-sanitizer
cold        seconds of a first call
timing      the table of `operator.py --device cuda`, with the errors of every problem

All steps run, even after a failure. FOLDER/STEP.log also gets the output of each step. Exit status: 0 if all passed.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder has a file named like a module of the standard library

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
PYTEST = ["-m", "pytest", "-q", "-o", "timeout=0"]  # compilation is slow
SMALL = ["-x", "-k", "tiles_of_users or packed or filled or slopes_in or masks_of_all_shapes"]


def commands(folder: Path) -> dict[str, list[list[str]]]:
    """Commands of each step."""
    python = sys.executable
    kernels = str(TESTS / "backends" / "test_triton.py")
    sanitizer = [
        ["compute-sanitizer", "--error-exitcode", "1", "--tool", tool, python, *PYTEST, kernels, *SMALL]
        for tool in ("memcheck", "initcheck", "racecheck")
    ]
    return {
        "tests": [[python, *PYTEST, kernels]],
        "large": [[python, str(HERE / "large.py")]],
        "sanitizer": sanitizer,
        "cold": [[python, str(HERE / "cold_start.py")]],
        "timing": [[python, str(HERE / "operator.py"), "--device", "cuda", "--json", str(folder / "timing.json")]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="steps to run; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER", help="folder to write to")
    options = parser.parse_args()
    known = commands(options.out)
    for step in options.steps:
        if step not in known:
            parser.error(f"STEP must be one of {', '.join(known)}, got {step}")
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch finds none")
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for step in options.steps or known:
        start = time.perf_counter()
        results = [run(command, options.out / f"{step}.log") for command in known[step]]
        if not all(results):
            failed.append(step)
        print(
            f"---- {step}: {'failed' if step in failed else 'passed'} in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    sys.exit(bool(failed))


def run(command: list[str], log: Path) -> bool:
    """Run a command, show its output and append it to a file; return whether the command succeeded."""
    if shutil.which(command[0]) is None:
        print(f"{command[0]} is not installed", flush=True)
        return False
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    if command[0] == "compute-sanitizer":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else one block holds many tensors and hides their ends
    with (
        log.open("a") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
    return process.returncode == 0


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
