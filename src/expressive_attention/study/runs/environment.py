"""Versions and machine, which each cell keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from ... import __version__
from ..training.devices import CPU, device_name

__all__ = ["environment", "threads_of"]


def environment(device: torch.device = CPU) -> dict[str, str]:
    """Versions and machine: all that may change the bits of a result trained on a device, and more.

    ``revision`` is the commit, where the package runs from a checkout; ``threads`` are those of this process.
    """
    return {**_machine(), "threads": str(torch.get_num_threads()), "device": device_name(device)}


@contextmanager
def threads_of(then: Mapping[str, str]) -> Iterator[None]:
    """As many threads as an `environment` has, one where it does not say: their number decides the last bits.

    Where it has several numbers, the first is taken.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(then.get("threads", "1").partition(",")[0]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def _machine() -> dict[str, str]:
    return {
        "expressive-attention": __version__,
        **_revision(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def _revision() -> dict[str, str]:
    """The commit that the package's own folder is of, marked if files differ from it."""
    folder = Path(__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=False
        )
        if tracked.returncode:
            return {}
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"revision": said.stdout.strip()}


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
