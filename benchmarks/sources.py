"""Python's own sources as text for language models."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["sources", "spread"]


def sources() -> tuple[Tensor, Tensor]:
    """The bytes of the modules of the standard library, and those of every tenth file, which is held out."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    held_out = files[::10]
    training, test = (
        torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in part)), dtype=torch.uint8).long()
        for part in (sorted(set(files) - set(held_out)), held_out)
    )
    return training, test


def spread(text: Tensor, count: int, length: int) -> Tensor:
    """Pieces ``(count, length)`` of a text, as far from each other as they can be."""
    return text[torch.arange(count).view(-1, 1) * ((len(text) - length) // count) + torch.arange(length)]
