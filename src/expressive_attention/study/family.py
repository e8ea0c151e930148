"""The primary family: all comparisons of EA with DPA that the presets declare, over which errors are controlled.

docs/protocol.md has the declaration. A comparison is a task, a model, a training and a range of seeds; one that stands
in several presets counts once. A preset belongs to the family if it says ``family = "primary"``.
"""

from __future__ import annotations

__all__ = ["PRIMARY_COMPARISONS"]

# A test counts them in the presets. It is a number here, and not counted, so that a report needs neither the data of
# other presets nor the packages that their tasks need, and so that a changed preset cannot change the past.
PRIMARY_COMPARISONS = 102
