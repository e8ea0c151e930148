"""The implementations of expressive attention, one module each.

A backend has ``supports(problem)``, the reason why it declines or None, and ``forward``; the fused ones also
have ``backward`` and run behind the operators of `expressive_attention.ops`.
"""

from types import ModuleType

from . import blockwise, cpu, reference, triton

__all__ = ["AUTOMATIC", "BACKENDS"]

BACKENDS: dict[str, ModuleType] = {"reference": reference, "blockwise": blockwise, "cpu": cpu, "triton": triton}

# The order in which the automatic choice asks them.
AUTOMATIC = ("cpu", "triton", "blockwise", "reference")
