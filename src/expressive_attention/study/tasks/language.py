"""Byte-level language modelling of a text that comes with every Python: the sources of its standard library."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from .base import Examples, Task, always, one_in, same_as, worded

__all__ = ["LanguageTask", "Text", "bigram_bits", "part_of", "source_files", "unigram_bits"]

# Left out: tests, what is installed besides, and tables in which held-out files would repeat those trained on.
_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "lib2to3", "pydoc_data"),
}

# Out of ten files, by the hash of their path.
_PARTS = ("training",) * 8 + ("validation", "test")


class LanguageTask(Task):
    """The next byte of windows into the Python sources of CPython's standard library.

    Each file belongs to one of training, validation and test as a whole, so nothing held out has been trained on.
    The best possible predictor is not known: what tells models apart is the cross-entropy on test windows, in nats
    per byte, divided by ln 2 in bits per byte; `facts` has those of counted frequencies to compare with.

    The text is that of the running Python, and part of the task: results from different texts never mix. It is
    distributed under the PSF license.

    Attributes:
        context: Bytes that the model reads.
        python: Version of Python; no other than the running one.
        text: Hash of the sources, which a distributor may have changed; no other than that of the ones found.
    """

    kind: Literal["language"] = "language"  # pyright: ignore[reportIncompatibleVariableOverride]
    context: int = Field(default=128, ge=1, le=1024)
    python: str = Field(default="", validate_default=True)
    text: str = Field(default="", validate_default=True)

    @field_validator("python")
    @classmethod
    def _runs_now(cls, python: str) -> str:
        if python not in ("", platform.python_version()):
            raise ValueError(f"must be the running version, {platform.python_version()!r}, got {python!r}")
        return platform.python_version()

    @field_validator("text")
    @classmethod
    def _is_found_here(cls, text: str) -> str:
        found = _standard_library().digest
        if text not in ("", found):
            raise ValueError(f"must be the hash of this Python's standard library, {found!r}, got {text!r}")
        return found

    @model_validator(mode="after")
    def _there_are_windows(self) -> LanguageTask:
        for part in dict.fromkeys(_PARTS):
            if self._part(part).windows(self.context + 1) == 0:
                raise ValueError(f"context must be shorter than the files for {part}, got {self.context}")
        return self

    @property
    def label(self) -> str:
        return f"Python sources, context {self.context}"

    formula = worded("which byte comes next in a program?")
    vocab_size = always(256)
    length = same_as("context")

    # ---- windows ----

    def _part(self, name: str) -> Text:
        return _standard_library().parts[name]

    def training_examples(self, bits: np.random.Philox, count: int) -> Examples:
        text = self._part("training")
        drawn = bits.random_raw(count) % np.uint64(text.windows(self.context + 1))
        return self._examples(text, drawn.astype(np.int64))

    def held_out_examples(self, count: int, purpose: str) -> Examples:
        text = self._part(purpose)
        windows = text.windows(self.context + 1)
        count = min(count, windows)
        return self._examples(text, np.arange(count) * windows // count)

    def _examples(self, text: Text, index: np.ndarray) -> Examples:
        windows = text.window(index, self.context + 1).astype(np.int64)
        return Examples(windows[:, :-1], windows[:, 1:])

    # ---- what is measured ----

    @property
    def fixed_data(self) -> bool:
        return True

    def solve(self, inputs: np.ndarray) -> None:
        return None

    def splits(self, examples: Examples) -> dict[str, np.ndarray]:
        """Groups by the number of bytes that were read, rounded down to a power of 2."""
        powers = np.log2(np.arange(1, self.length + 1)).astype(np.int64)
        return {"bytes read": np.broadcast_to(powers, examples.targets.shape)}

    def group_name(self, split: str, group: int) -> str:
        first, last = 1 << group, min((2 << group) - 1, self.length)
        return f"{split} {first}" if first == last else f"{split} {first} to {last}"

    @property
    def complexity(self) -> float:
        """log2 of the number of bytes in the training files: text has no state to count."""
        return math.log2(len(self._part("training").content))

    chance = one_in("vocab_size")

    def facts(self) -> dict[str, Any]:
        training, test = self._part("training"), self.held_out_examples(2048, "test")
        return super().facts() | {
            "unigram_bits": unigram_bits(training, test),
            "bigram_bits": bigram_bits(training, test),
            "training_bytes": len(training.content),
        }


# ---- files ----


@dataclass(frozen=True)
class Text:
    """Files, one after the other.

    Attributes:
        content: Their bytes, uint8.
        lengths: Number of bytes of each file.
    """

    content: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, files: Iterable[bytes]) -> Text:
        """The text of those files that are not empty."""
        kept = [file for file in files if file]
        content = np.frombuffer(b"".join(kept), dtype=np.uint8)
        return cls(content, np.array([len(file) for file in kept], dtype=np.int64))

    def windows(self, length: int) -> int:
        """Number of places for a window of `length` bytes, which never leaves its file."""
        return int(self._places(length).sum())

    def window(self, index: np.ndarray, length: int) -> np.ndarray:
        """Windows ``(n, length)`` by their numbers ``(n,)``, from 0, in the order of the text."""
        places = self._places(length)
        after = places.cumsum()  # number of windows up to the end of each file
        file = np.searchsorted(after, index, side="right")
        start = (self.lengths.cumsum() - self.lengths)[file] + index - (after - places)[file]
        return self.content[start[:, None] + np.arange(length)]

    def _places(self, length: int) -> np.ndarray:
        return np.maximum(self.lengths - length + 1, 0)

    def unigrams(self) -> np.ndarray:
        """How often each byte occurs, ``(256,)``."""
        return np.bincount(self.content, minlength=256)

    def bigrams(self) -> np.ndarray:
        """How often a byte (second index) follows another (first) within a file, ``(256, 256)``."""
        pairs = self.content[:-1].astype(np.uint16) << 8 | self.content[1:]
        pairs = np.delete(pairs, self.lengths.cumsum()[:-1] - 1)  # from one file to the next
        return np.bincount(pairs, minlength=1 << 16).reshape(256, 256)


def unigram_bits(training: Text, examples: Examples) -> float:
    """Bits per target byte under p(b) = (n_b + 1) / (n + 256), counted in the training text."""
    return float(-np.log2(_unigram(training)[examples.targets]).mean())


def bigram_bits(training: Text, examples: Examples) -> float:
    """Bits per target byte under p(b | a) = (n_ab + p(b)) / (n_a + 1), a the byte before it.

    A Dirichlet prior of weight 1 around the unigram distribution p(b) (MacKay & Peto, 1995).
    """
    counts = training.bigrams()
    probabilities = (counts + _unigram(training)) / (counts.sum(1, keepdims=True) + 1)
    return float(-np.log2(probabilities[examples.inputs, examples.targets]).mean())


def _unigram(training: Text) -> np.ndarray:
    counts = training.unigrams() + 1
    return counts / counts.sum()


def part_of(path: str) -> str:
    """Whether a file serves for training, validation or test: by a hash of its path below the library."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return _PARTS[int.from_bytes(digest, "little") % len(_PARTS)]


def source_files(root: Path) -> dict[str, bytes]:
    """The sources of a standard library by their path below its folder, in order.

    Raises:
        ValueError: There are none, as where the library is packed into a zip file.
    """
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _LEFT_OUT
        for name in names:
            # _sysconfigdata records how this interpreter was built, which is no part of the library.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    if not found:
        raise ValueError(f"no Python sources of the standard library in {root}")
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Library:
    parts: dict[str, Text]
    digest: str

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> _Library:
        parts = {
            part: Text.of(content for path, content in files.items() if part_of(path) == part)
            for part in dict.fromkeys(_PARTS)
        }
        digest = hashlib.blake2b(digest_size=8)
        for path, content in files.items():
            digest.update(f"{path} {len(content)}\n".encode() + content)
        return cls(parts, digest.hexdigest())


@lru_cache(maxsize=1)
def _standard_library() -> _Library:
    return _Library.of(source_files(Path(sysconfig.get_paths()["stdlib"])))
