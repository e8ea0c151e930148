"""The checkpoint of a cell in training: one file, from which it resumes, to the same bits, after it was killed.

The file is safetensors: the tensors, and as metadata ``state`` (JSON) and ``sha256`` of both.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomically
from .devices import CPU, device_name

__all__ = ["SECONDS_BETWEEN", "Checkpoint", "CheckpointFile"]

# At most so much work is lost, and one evaluation interval.
SECONDS_BETWEEN = 60.0

# Raise it when a change of the code changes what a checkpoint holds.
_FORMAT = 2


class Checkpoint(NamedTuple):
    """All that the rest of a training depends on: tensors by name, and values in types that JSON has."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFile:
    """The checkpoint of one cell.

    A file that cannot be used is named and removed: it is damaged, or it belongs to another cell, or to circumstances
    in which the rest of the training would round differently.

    Args:
        path: Path of the file, which need not exist.
        identity: Identity of the cell.
        note: Called with a line for the user.
        seconds: Time between two checkpoints.
        device: Device of the training.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        note: Callable[[str], None],
        seconds: float = SECONDS_BETWEEN,
        device: torch.device = CPU,
    ) -> None:
        self.path, self.note, self.seconds = path, note, seconds
        self.about = {
            "identity": identity,
            "format": _FORMAT,
            # The order of additions, and so the last bits, depend on these.
            "torch": str(torch.__version__),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "device": device_name(device),
        }
        self.written = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return time.monotonic() - self.written >= self.seconds

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the file atomically; a full disk does not end the training."""
        text = json.dumps({**self.about, **checkpoint.state})
        content = save(checkpoint.tensors, {"state": text, "sha256": _digest(checkpoint.tensors, text)})
        try:
            write_atomically(self.path, content)
        except OSError as error:
            self.note(f"{self.path} cannot be written: {error.strerror}; the training goes on without it")
        self.written = time.monotonic()

    def read(self) -> Checkpoint | None:
        """The last checkpoint; None: there is none that can be used."""
        if not self.path.exists():
            return None
        try:
            checkpoint = self._read()
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            reason = str(error) if isinstance(error, _UnusableError) else f"is corrupt ({error})"
            self.note(f"{self.path} {reason}; the cell is trained from its start")
            self.path.unlink(missing_ok=True)
            return None
        return checkpoint

    def _read(self) -> Checkpoint:
        with safe_open(self.path, framework="pt") as file:
            # Copies: a tensor in the file is not aligned as the processor's widest instructions want it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 it is no dict
            metadata = file.metadata() or {}
        if _digest(tensors, metadata["state"]) != metadata["sha256"]:
            raise ValueError("its checksum is not that of its content")
        state = json.loads(metadata["state"])
        for key, value in self.about.items():
            if state.get(key) != value:
                raise _UnusableError(f"is of {key} {state.get(key)}, not {value}")
        return Checkpoint(tensors, state)


class _UnusableError(ValueError):
    """An intact checkpoint from which this training cannot resume."""


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    return hashlib.sha256(text.encode() + save(tensors)).hexdigest()
