"""Run all checks on a GPU in one go, the most telling first: are the kernels right, and how fast are they?

    python benchmarks/gpu.py [STEP ...] [--out FOLDER] [--minutes M] [--dry-run]

smoke       errors of short training steps in three dtypes, as a share of their budget
tuning      the fastest tiles, see `tune.py`; the package reads them from then on
timing      seconds of 8 problems at length 4096, against FlashAttention, cuDNN, FlexAttention and the twin
linear      the squared form in linear time: errors of sampled rows, seconds against all pairs and softmax
tests       the tests of the kernels, on the device, in parallel where pytest-xdist is installed
blocks      errors and seconds of a block mask, against all pairs and FlexAttention
cold        seconds of a first call
large       errors of problems up to 65536 keys, in three dtypes
sanitizer   out-of-bounds accesses, uninitialized reads and races, at small sizes, by NVIDIA's compute-sanitizer

Each step has a budget, and none runs after M minutes (default: 9). Every result is at once a line of a file in FOLDER:
smoke.jsonl, tuning.jsonl, timing.jsonl, linear.jsonl, blocks.jsonl; steps.jsonl says how each step ended; STEP.log has
the output of the step. With --dry-run, every step that needs no GPU runs on the CPU, by Triton's interpreter, at tiny
sizes. Exit status: 0 if all steps passed that ran.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder has a file named like a module of the standard library

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lines import write_line

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
KERNELS = [str(TESTS / "backends" / name) for name in ("test_triton.py", "test_triton_linear.py")]
SMALL = ["-x", "-k", "tiles_of_users or packed or filled or slopes_in or masks_of_all_shapes"]


@dataclass(frozen=True)
class Step:
    """Commands of a step, and the seconds that it may take at the most."""

    budget: float
    commands: list[list[str]]
    dry: bool = True  # whether it is a part of a dry run


def steps(folder: Path, dry_run: bool) -> dict[str, Step]:
    """All steps in their order."""
    python, dry = sys.executable, ["--dry-run"] * dry_run
    pytest = [python, "-m", "pytest", "-q", "-o", "timeout=0"]  # compilation is slow
    parallel = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tests = [*pytest, *KERNELS, "-k", "test_same_bits_twice"] if dry_run else [*pytest, *parallel, *KERNELS]
    large = ["--device", "cpu", "--lengths", "40"] if dry_run else []
    sanitizer = [
        ["compute-sanitizer", "--error-exitcode", "1", "--tool", tool, *pytest, KERNELS[0], *SMALL]
        for tool in ("memcheck", "initcheck", "racecheck")
    ]
    return {
        "smoke": Step(60, [[python, str(HERE / "gpu_steps.py"), "smoke", "--out", str(folder), *dry]]),
        "tuning": Step(
            160,
            [[python, str(HERE / "tune.py"), "--out", str(folder), *(dry or ["--budget", "140", "--write"])]],
        ),
        "timing": Step(150, [[python, str(HERE / "gpu_steps.py"), "timing", "--out", str(folder), *dry]]),
        "linear": Step(120, [[python, str(HERE / "gpu_steps.py"), "linear", "--out", str(folder), *dry]]),
        "tests": Step(150, [tests]),
        "blocks": Step(60, [[python, str(HERE / "gpu_steps.py"), "blocks", "--out", str(folder), *dry]]),
        "cold": Step(60, [[python, str(HERE / "cold_start.py"), "--pairs", "1"]], dry=False),
        "large": Step(60, [[python, str(HERE / "large.py"), *large]]),
        "sanitizer": Step(120, sanitizer, dry=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="steps to run; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER", help="folder to write to")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="all steps together; default: 9")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    known = steps(options.out, options.dry_run)
    for step in options.steps:
        if step not in known:
            parser.error(f"STEP must be one of {', '.join(known)}, got {step}")
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch finds none")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is needed, and not installed")
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    ended = []
    for name in options.steps or known:
        start = time.monotonic()
        budget = min(known[name].budget, until - start)
        if options.dry_run and not known[name].dry:
            result = "needs a GPU"
        elif budget <= 0:
            result = "no time left"
        else:
            result = run(known[name].commands, options.out / f"{name}.log", start + budget, options.dry_run)
        ended.append(result)
        write_line(
            options.out / "steps.jsonl",
            {"step": name, "result": result, "seconds": round(time.monotonic() - start, 1)},
        )
    sys.exit(any(result not in ("passed", "needs a GPU", "no time left") for result in ended))


def run(commands: list[list[str]], log: Path, until: float, dry_run: bool) -> str:
    """Run commands until the time is over, with their output in a file; say how they ended."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment.pop("TRITON_INTERPRET", None)
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    results = [one(command, log, until, dict(environment)) for command in commands]
    return next((result for result in results if result != "passed"), "passed")


def one(command: list[str], log: Path, until: float, environment: dict[str, str]) -> str:
    """Run a command until the time is over; say how it ended."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    if command[0] == "compute-sanitizer":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else one block holds many tensors and hides their ends
    with log.open("a") as file:
        # In a session of its own, so that the workers of a command that takes too long end with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(max(0.0, until - time.monotonic()))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return "stopped: over its budget"
            raise
    return "passed" if status == 0 else f"failed with status {status}, see {log.name}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
