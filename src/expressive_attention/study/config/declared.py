"""Declarations made before a study runs: its claims, their family, and the counts of an exclusive range.

docs/protocol.md has the declarations.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules

__all__ = ["EXCLUSIVE_RANGE", "PRIMARY_COMPARISONS", "alone", "claim_names"]

# Comparisons of EA with DPA in the primary family, over which errors are controlled. A comparison is a task, a model, a
# training and a range of seeds; one that stands in several presets counts once. A preset belongs to the family if it
# says `family = "primary"`. A test counts them in the presets. It is a number here, and not counted, so that a report
# needs neither the data of other presets nor the packages that their tasks need, and so that a changed preset cannot
# change the past.
PRIMARY_COMPARISONS = 102

# A mechanism has a condition to itself if it solves at least, and the other less than, this share of seeds.
EXCLUSIVE_RANGE = (0.9, 0.5)

_CLAIMS = Path(__file__).parents[1] / "analysis" / "claims"


def claim_names() -> list[str]:
    """The claims that a study can test, by the names of their files, which are not imported for it."""
    return sorted(module.name for module in iter_modules([str(_CLAIMS)]) if not module.name.startswith("_"))


def alone(ours: tuple[int, int], theirs: tuple[int, int]) -> bool:
    """Whether we have a condition to ourselves, by the seeds solved and the seeds of each side."""
    reached, missed = EXCLUSIVE_RANGE
    return ours[0] / ours[1] >= reached and theirs[0] / theirs[1] < missed
