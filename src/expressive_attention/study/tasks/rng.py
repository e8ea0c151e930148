"""Streams of random numbers that are the same on every machine and independent of one another."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["stream"]


def stream(seed: int, purpose: str) -> np.random.Philox:
    """The stream of this seed for one purpose, e.g. ``"training"``.

    A bit generator (Philox; Salmon et al., 2011), not a `numpy.random.Generator`: numpy keeps the raw numbers
    of the former, ``stream.random_raw(n)``, the same in every version.
    """
    digest = hashlib.blake2b(purpose.encode(), digest_size=8).digest()
    return np.random.Philox(key=np.array([seed, int.from_bytes(digest, "little")], dtype=np.uint64))
