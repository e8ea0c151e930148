"""Expressive attention in the models that people have: one file per library, and `convert` for all of them."""

from .conversion import Conversion, ConversionError, Layer, Verification, convert
from .sdpa import expressive_sdpa

__all__ = ["Conversion", "ConversionError", "Layer", "Verification", "convert", "expressive_sdpa"]
