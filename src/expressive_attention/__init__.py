"""Expressive attention for PyTorch: weights proportional to z^2 / (1 + z^2) of the scaled dot product z."""

from importlib.metadata import version as _version

from . import nn
from .functional import expressive_attention
from .varlen import expressive_attention_varlen

__all__ = ["expressive_attention", "expressive_attention_varlen", "nn"]

__version__ = _version("expressive-attention")
