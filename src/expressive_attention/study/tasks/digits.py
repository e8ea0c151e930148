"""Images of handwritten digits, read as a sequence of patches, for a small vision transformer.

These are the 1797 images of 8 x 8 pixels in scikit-learn, the test part of E. Alpaydin and C. Kaynak, *Optical
Recognition of Handwritten Digits*, UCI Machine Learning Repository (1998), doi:10.24432/C50P49.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from .base import IGNORED, Examples, Task, always, one_in, worded
from .recurrences.recurrence import mixed

__all__ = ["DigitsTask", "images_and_classes", "part"]

_SIDE = 8  # pixels

# Mean and standard deviation of all pixels, whose values are 0 to 16.
_MEAN, _STD = 4.88, 6.02


class DigitsTask(Task):
    """A model tells which digit an image shows; every position sees all of its patches.

    The patches come row by row, each a vector of its pixels and a 0. One more position has the class as its target
    and reads zeros and a 1: what the model's input map makes of it is a learned class token (Dosovitskiy et al.,
    arXiv 2010.11929), and never the zero vector, whose query would match nothing. Images are shared out to training
    (50%), validation (20%) and test (30%) once and for all; the same people wrote those of all three.

    Attributes:
        patch: Pixels along the side of a patch: 1, 2 or 4.
        shift: Training images are moved by up to this many pixels in each direction, against a background of 0.
    """

    kind: Literal["digits"] = "digits"  # pyright: ignore[reportIncompatibleVariableOverride]
    patch: Literal[1, 2, 4] = 2
    shift: int = Field(default=1, ge=0, le=4)

    @model_validator(mode="after")
    def _images_are_installed(self) -> DigitsTask:
        if find_spec("sklearn") is None:
            raise ValueError("kind 'digits' needs scikit-learn: pip install 'expressive-attention[vision]'")
        return self

    @property
    def label(self) -> str:
        return f"digits, patch {self.patch}, shift {self.shift}"

    formula = worded("which digit does the image show?")
    vocab_size = always(10)

    @property
    def length(self) -> int:
        return (_SIDE // self.patch) ** 2 + 1

    @property
    def input_dim(self) -> int:
        return self.patch**2 + 1

    @property
    def is_causal(self) -> bool:
        return False

    # ---- images ----

    def training_examples(self, bits: np.random.Philox, count: int) -> Examples:
        images, classes = images_and_classes()
        own = part("training")
        raw = bits.random_raw(3 * count).reshape(3, count)
        chosen = own[(raw[0] % np.uint64(len(own))).astype(np.int64)]
        down, right = (raw[1:] % np.uint64(2 * self.shift + 1)).astype(np.int64)
        margin = ((0, 0), (self.shift, self.shift), (self.shift, self.shift))
        views = np.lib.stride_tricks.sliding_window_view(np.pad(images, margin), (_SIDE, _SIDE), axis=(1, 2))
        return self._examples(views[chosen, 2 * self.shift - down, 2 * self.shift - right], classes[chosen])

    def held_out_examples(self, count: int, purpose: str) -> Examples:
        images, classes = images_and_classes()
        chosen = part(purpose)[:count]
        return self._examples(images[chosen], classes[chosen])

    def _examples(self, images: np.ndarray, classes: np.ndarray) -> Examples:
        patches, across = self.length - 1, _SIDE // self.patch
        tiles = images.reshape(-1, across, self.patch, across, self.patch).swapaxes(2, 3)
        inputs = np.zeros((len(images), self.length, self.input_dim), dtype=np.float32)
        inputs[:, :-1, :-1] = (tiles.reshape(-1, patches, self.patch**2) - _MEAN) / _STD
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
        return math.log2(len(part("training")))

    chance = one_in("vocab_size")

    def facts(self) -> dict[str, Any]:
        return super().facts() | {
            "nearest_neighbour": _nearest_neighbour(),
            "training_images": len(part("training")),
        }


@lru_cache(maxsize=1)
def images_and_classes() -> tuple[np.ndarray, np.ndarray]:
    """All images ``(1797, 8, 8)``, uint8 from 0 to 16, and their classes ``(1797,)``, int64."""
    from sklearn.datasets import load_digits  # an optional dependency, and slow to import

    data: Any = load_digits()
    return data.images.astype(np.uint8), data.target.astype(np.int64)


def part(purpose: str) -> np.ndarray:
    """Indices of the images for ``"training"``, ``"validation"`` or ``"test"``, in a fixed random order."""
    count = len(images_and_classes()[0])
    order = np.argsort(mixed(np.arange(count, dtype=np.uint64)))
    cuts = [count * 5 // 10, count * 7 // 10]
    return np.split(order, cuts)[("training", "validation", "test").index(purpose)]


@lru_cache(maxsize=1)
def _nearest_neighbour() -> float:
    """Test accuracy of giving an image the class of the nearest training image, in Euclidean distance."""
    images, classes = images_and_classes()
    pixels = images.reshape(len(images), -1).astype(np.int64)
    known, test = part("training"), part("test")
    squares = (pixels**2).sum(1)
    distances = squares[known] - 2 * pixels[test] @ pixels[known].T  # less the test image's own square
    return float((classes[known[distances.argmin(1)]] == classes[test]).mean())
