"""The devices that cells are trained on: the processor, or GPUs that they share."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from ..errors import StudyError

__all__ = ["CPU", "DeviceError", "available_cores", "device_name", "devices"]

CPU = torch.device("cpu")


class DeviceError(StudyError):
    """A device that does not exist; the message says which there are, in one line."""


def devices(wanted: str) -> list[torch.device]:
    """The devices that cells take turns on: one for ``"cpu"`` and ``"cuda:N"``, every GPU for ``"cuda"``.

    Raises:
        DeviceError: The name is none of these, or there is no such GPU here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = {"cpu": [CPU]} | {f"cuda:{index}": [torch.device("cuda", index)] for index in range(count)}
    if count:
        known["cuda"] = [torch.device("cuda", index) for index in range(count)]
    if wanted not in known:
        raise DeviceError(f"device must be one of {sorted(known)} on this machine, got {wanted!r}")
    return known[wanted]


def available_cores(cgroups: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int:
    """Processor cores that this process may use: by its affinity, and by the quota of its control group.

    Args:
        cgroups: Folder of the control groups, of version 2 or 1.
        groups: The file that says which one the process is in.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups(cgroups, groups) if (quota := _quota(folder)) is not None]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def _groups(cgroups: Path, groups: Path) -> list[Path]:
    """The folders of the process's control groups and of those that they are in."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    found = [cgroups]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        own = root / path.lstrip("/")
        found += [own, *(parent for parent in own.parents if parent == root or root in parent.parents)]
    return found


def _quota(folder: Path) -> float | None:
    """The cores that a control group may use, None: as many as there are."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError):
        return None


def device_name(device: torch.device) -> str:
    """``"cpu"``, or the name of the GPU."""
    return device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
