"""On what cells are trained: the processor, or GPUs that they share."""

from __future__ import annotations

import torch

from .errors import StudyError

__all__ = ["CPU", "DeviceError", "device_name", "devices"]

CPU = torch.device("cpu")


class DeviceError(StudyError):
    """A device that there is not; the message says which there are, in one line."""


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


def device_name(device: torch.device) -> str:
    """``"cpu"``, or what the GPU is called."""
    return device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
