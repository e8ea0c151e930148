"""Which backend takes a call, and why those before it did not: for `ea info`, and a line of debugging for each call.

With ``EXPRESSIVE_ATTENTION_LOG=calls`` in the environment when the package is imported, each eager call is written to
stderr by the logger "expressive_attention"; torch.compile traces calls without it.
"""

from __future__ import annotations

import logging
import os

from .backends import AUTOMATIC, BACKENDS
from .call import Call, outline

__all__ = ["ENABLED", "log_call", "reasons"]

_NAME = "EXPRESSIVE_ATTENTION_LOG"
_LOGGER = logging.getLogger("expressive_attention")


def _is_asked_for() -> bool:
    """Whether the environment asks for calls. Raises ValueError if it asks for anything else."""
    found = os.environ.get(_NAME, "")
    if found not in ("", "calls"):
        raise ValueError(f"{_NAME} must be 'calls' or empty, got {found!r}")
    return found == "calls"


ENABLED = _is_asked_for()

if ENABLED:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    _LOGGER.addHandler(_handler)
    _LOGGER.setLevel(logging.DEBUG)
    _LOGGER.propagate = False


def reasons(call: Call, chosen: str) -> dict[str, str]:
    """The reasons of the backends that the automatic choice asks before the chosen one, by name."""
    before = AUTOMATIC[: AUTOMATIC.index(chosen)] if chosen in AUTOMATIC else ()
    found = {name: BACKENDS[name].declines(outline(call)) for name in before}
    return {name: reason for name, reason in found.items() if reason is not None}


def log_call(call: Call, chosen: str, asked: str | None) -> None:
    """Log a call, the backend that takes it, and why others do not.

    Args:
        call: The call.
        chosen: The backend that takes it.
        asked: The backend that was asked for by name; None: the choice was automatic.
    """
    parts = [f"{chosen} takes {describe(call)}"]
    if asked is not None:
        parts.append("asked for by name")
    else:
        parts += [f"not {name}: {reason}" for name, reason in reasons(call, chosen).items()]
    as_mask = BACKENDS[chosen].declines(call)
    if as_mask is not None:
        way = "one after the other" if call.visibility.query_starts is not None else "from a mask of L x S"
        parts.append(f"{way}, since {as_mask}")
    _LOGGER.debug("%s", "; ".join(parts))


def describe(call: Call) -> str:
    """Shapes, dtype, device and settings of a call, in words."""
    query, key, value, mask, seen = call[:5]
    shapes = [tuple(x.shape) for x in (query, key, value)]
    parts = [f"query {shapes[0]}, key {shapes[1]}, value {shapes[2]} of {str(query.dtype).removeprefix('torch.')}"]
    parts[0] += f" on {query.device}"
    if mask is not None:
        parts.append(f"a mask {tuple(mask.shape)} of {str(mask.dtype).removeprefix('torch.')}")
    if seen.left is not None or seen.right is not None:
        left, right = ("all" if size is None else size for size in (seen.left, seen.right))
        parts.append(f"keys from {left} before to {right} after")
    parts += ["slopes"] * (seen.slopes is not None) + ["decays"] * (call.log_decay is not None)
    parts += ["biases by distance"] * (call.relative_bias is not None)
    parts += ["key lengths"] * (seen.key_lengths is not None)
    parts += ["blocks of keys"] * (seen.listed is not None)
    parts += ["packed"] * (seen.query_starts is not None) + [f"dropout {call.dropout_p:g}"] * bool(call.dropout_p)
    return ", ".join(parts) + ("" if call.form == "expressive" else f", {call.form}")
