"""Expressive attention in the models that people have: one file per library, and `convert` for all of them."""

from ..decomposition import decompositions
from .calibration import Calibration, calibrate
from .conversion import Conversion, ConversionError, Layer, Verification, convert
from .linearization import HeadScores, Linearization, linearize
from .merging import merge_gains
from .sdpa import expressive_sdpa

__all__ = [
    "Calibration",
    "Conversion",
    "ConversionError",
    "HeadScores",
    "Layer",
    "Linearization",
    "Verification",
    "calibrate",
    "convert",
    "decompositions",
    "expressive_sdpa",
    "linearize",
    "merge_gains",
]
