"""The implementations of expressive attention, one module each.

A backend is what `call.Backend` says. They run behind the operators of `ops`; the reference does so only on request,
and otherwise as the plain torch that it is.
"""

from ..call import Backend
from . import blockwise, cpu, linear, reference, triton

__all__ = ["AUTOMATIC", "BACKENDS"]

BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "blockwise": blockwise,
    "cpu": cpu,
    "triton": triton,
    "linear": linear,
}

# The order in which the automatic choice asks them, where "linear" does not pay.
AUTOMATIC = ("cpu", "triton", "blockwise", "reference")
