"""Parts that tasks of images share: patches, the class token, shifts, and which images are for training and test."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from ...errors import ConfigError
from ..base import IGNORED, Examples, Task, always, one_in, worded
from ..recurrences.recurrence import mixed

__all__ = ["ImageTask", "Shift"]

Shift = Annotated[int, Field(ge=0, le=4)]


class ImageTask(Task):
    """A model tells which of ten classes an image is of; every position sees all of its patches.

    The patches come row by row, each a vector of its pixels and a 0. One more position has the class as its target
    and reads zeros and a 1: what the model's input map makes of it is a learned class token (Dosovitskiy et al.,
    arXiv 2010.11929), and never the zero vector, whose query would match nothing. Images are shared out to training
    (50%), validation (20%) and test (30%) once and for all, in an order that does not depend on what they show.

    Attributes:
        patch: Pixels along the side of a patch, a divisor of `side`.
        shift: Training images are moved by up to this many pixels in each direction, against a background of 0.
    """

    side: ClassVar[int]  # of an image, in pixels
    scale: ClassVar[tuple[float, float]]  # mean and standard deviation of all pixels
    package: ClassVar[str]  # that carries the images, by its name to pip

    patch: int
    shift: Shift

    @staticmethod
    @abstractmethod
    def read() -> tuple[np.ndarray, np.ndarray]:
        """All images ``(n, side, side)``, uint8, and their classes ``(n,)``, int64."""

    def check_images(self) -> None:
        """Read the images, which is done once.

        Raises:
            ConfigError: Their package is missing or cannot be used.
        """
        _read(type(self))

    @property
    def label(self) -> str:
        return f"{self.kind}, patch {self.patch}, shift {self.shift}"

    formula = worded("which digit does the image show?")
    vocab_size = always(10)

    @property
    def length(self) -> int:
        return (self.side // self.patch) ** 2 + 1

    @property
    def input_dim(self) -> int:
        return self.patch**2 + 1

    @property
    def is_causal(self) -> bool:
        return False

    # ---- images ----

    @classmethod
    def part(cls, purpose: str) -> np.ndarray:
        """Indices of the images for ``"training"``, ``"validation"`` or ``"test"``, in a fixed random order."""
        count = len(_read(cls)[0])
        order = np.argsort(mixed(np.arange(count, dtype=np.uint64)))
        cuts = [count * 5 // 10, count * 7 // 10]
        return np.split(order, cuts)[("training", "validation", "test").index(purpose)]

    def training_examples(self, bits: np.random.Philox, count: int) -> Examples:
        images, classes = _read(type(self))
        own = self.part("training")
        raw = bits.random_raw(3 * count).reshape(3, count)
        chosen = own[(raw[0] % np.uint64(len(own))).astype(np.int64)]
        down, right = (raw[1:] % np.uint64(2 * self.shift + 1)).astype(np.int64)
        margin = ((0, 0), (self.shift, self.shift), (self.shift, self.shift))
        views = np.lib.stride_tricks.sliding_window_view(np.pad(images, margin), (self.side, self.side), axis=(1, 2))
        return self._examples(views[chosen, 2 * self.shift - down, 2 * self.shift - right], classes[chosen])

    def held_out_examples(self, count: int, purpose: str) -> Examples:
        images, classes = _read(type(self))
        chosen = self.part(purpose)[:count]
        return self._examples(images[chosen], classes[chosen])

    def _examples(self, images: np.ndarray, classes: np.ndarray) -> Examples:
        (mean, deviation), patches, across = self.scale, self.length - 1, self.side // self.patch
        tiles = images.reshape(-1, across, self.patch, across, self.patch).swapaxes(2, 3)
        inputs = np.zeros((len(images), self.length, self.input_dim), dtype=np.float32)
        inputs[:, :-1, :-1] = (tiles.reshape(-1, patches, self.patch**2) - mean) / deviation
        inputs[:, -1, -1] = 1
        targets = np.full((len(images), self.length), IGNORED)
        targets[:, -1] = classes
        return Examples(inputs, targets)

    # ---- what is measured ----

    @property
    def fixed_data(self) -> bool:
        return True

    def solve(self, inputs: np.ndarray) -> None:
        return None

    def splits(self, examples: Examples) -> dict[str, np.ndarray]:
        return {"digit": examples.targets}

    @property
    def complexity(self) -> float:
        """log2 of the number of training images: an image has no state to count."""
        return math.log2(len(self.part("training")))

    chance = one_in("vocab_size")

    def facts(self) -> dict[str, Any]:
        return super().facts() | {
            "nearest_neighbour": _nearest_neighbour(type(self)),
            "training_images": len(self.part("training")),
        }


@lru_cache
def _read(of: type[ImageTask]) -> tuple[np.ndarray, np.ndarray]:
    """All images of a task.

    Raises:
        ConfigError: Their package is missing or cannot be used.
    """
    try:
        return of.read()
    except Exception as error:  # an installation can be broken in any way
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"kind {of.model_fields['kind'].default!r} needs {of.package}, which cannot be used: {problem}; the extra "
            "'vision' installs it: pip install 'expressive-attention[vision]'"
        ) from None


@lru_cache
def _nearest_neighbour(of: type[ImageTask]) -> float:
    """Test accuracy of giving an image the class of the nearest training image, in Euclidean distance."""
    images, classes = _read(of)
    pixels = images.reshape(len(images), -1).astype(np.float64)  # whole numbers, so that sums are exact
    known, test = of.part("training"), of.part("test")
    squares = (pixels**2).sum(1)
    distances = squares[known] - 2 * pixels[test] @ pixels[known].T  # less the test image's own square
    return float((classes[known[distances.argmin(1)]] == classes[test]).mean())
