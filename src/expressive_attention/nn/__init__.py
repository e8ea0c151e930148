"""Modules: self-attention, position encodings and a small decoder-only transformer."""

from .attention import MECHANISMS, HeadGain, SelfAttention
from .positions import POSITIONS, LearnedPositions, RotaryPositions, alibi_bias, alibi_slopes
from .transformer import NORMS, Transformer, TransformerBlock

__all__ = [
    "MECHANISMS",
    "NORMS",
    "POSITIONS",
    "HeadGain",
    "LearnedPositions",
    "RotaryPositions",
    "SelfAttention",
    "Transformer",
    "TransformerBlock",
    "alibi_bias",
    "alibi_slopes",
]
