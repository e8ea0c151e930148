"""Small images of handwritten digits.

These are the 1797 images of 8 x 8 pixels in scikit-learn, the test part of E. Alpaydin and C. Kaynak, *Optical
Recognition of Handwritten Digits*, UCI Machine Learning Repository (1998), doi:10.24432/C50P49.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from .image_task import ImageTask, Shift

__all__ = ["DigitsTask"]


class DigitsTask(ImageTask):
    """Digits of 8 x 8 pixels; the same people wrote those of training, validation and test."""

    side = 8
    scale = (4.88, 6.02)  # of values from 0 to 16
    package = "scikit-learn"

    kind: Literal["digits"] = "digits"  # pyright: ignore[reportIncompatibleVariableOverride]
    patch: Literal[1, 2, 4] = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    shift: Shift = 1

    @staticmethod
    def read() -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits  # an optional dependency, and slow to import

        data: Any = load_digits()
        return data.images.astype(np.uint8), data.target.astype(np.int64)
