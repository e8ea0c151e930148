"""Modules: self-attention, torch's multi-head attention, position encodings and a small decoder-only transformer."""

from .attention import HeadGain, SelfAttention
from .cache import KeyValueCache, NearFarCache, SquaredCache
from .mechanisms import MECHANISMS, attend
from .multihead import MultiheadAttention
from .near_far import NearFarAttention
from .positions import (
    POSITIONS,
    LearnedAlibi,
    LearnedPositions,
    RelativeBias,
    RotaryPositions,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    position_codes,
)
from .transformer import NORMS, Transformer, TransformerBlock

__all__ = [
    "MECHANISMS",
    "NORMS",
    "POSITIONS",
    "HeadGain",
    "KeyValueCache",
    "LearnedAlibi",
    "LearnedPositions",
    "MultiheadAttention",
    "NearFarAttention",
    "NearFarCache",
    "RelativeBias",
    "RotaryPositions",
    "SelfAttention",
    "SinusoidalPositions",
    "SquaredCache",
    "Transformer",
    "TransformerBlock",
    "alibi_bias",
    "alibi_slopes",
    "attend",
    "position_codes",
]
