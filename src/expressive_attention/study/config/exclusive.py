"""The declared counts of an exclusive range: who solves nearly all seeds where the other solves fewer than half."""

from __future__ import annotations

__all__ = ["EXCLUSIVE_RANGE", "alone"]

# A mechanism has a condition to itself if it solves at least, and the other less than, this share of seeds.
EXCLUSIVE_RANGE = (0.9, 0.5)


def alone(ours: tuple[int, int], theirs: tuple[int, int]) -> bool:
    """Whether we have a condition to ourselves, by the seeds solved and the seeds of each side."""
    reached, missed = EXCLUSIVE_RANGE
    return ours[0] / ours[1] >= reached and theirs[0] / theirs[1] < missed
