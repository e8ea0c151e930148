"""Names and numbers in words, the same in sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

from .estimators import LEVEL, MINIMUM_FOR_INTERVAL, Interval

__all__ = ["describe_interval", "describe_p", "divided", "mechanism_name"]


_NAMES = {
    "expressive": "EA",
    "dot_product": "DPA",
    "squared": "z²",
    "one_sided": "one-sided EA",
    "relu_squared": "ReLU²",
    "sigmoid": "sigmoid",
    "softmax_abs": "softmax of |z|",
    "sigmoid_abs": "sigmoid of |z|",
    "absolute": "|z|",
    "relu": "ReLU",
    "quartic": "z⁴/(1 + z⁴)",
    "one_sided_quartic": "one-sided z⁴/(1 + z⁴)",
}


def mechanism_name(mechanism: str) -> str:
    """Returns the name that people use: ``"EA"``, ``"DPA"``, or the mechanism itself."""
    first = mechanism.removesuffix("_again")
    return _NAMES.get(first, first) + (" again" if first != mechanism else "")


def divided(labels: Sequence[str]) -> tuple[str, list[str]]:
    """The parts that labels of conditions have in common, and the others of each.

    The parts of ``"sum, basis 16, rope"`` are between its commas. A label that has nothing else keeps all labels whole.
    """
    parts = [label.split(", ") for label in labels]
    shared = [part for part in parts[0] if all(part in others for others in parts)]
    rest = [", ".join(part for part in each if part not in shared) for each in parts]
    return (", ".join(shared), rest) if all(rest) else ("", list(labels))


def describe_interval(interval: Interval | None, n: int, spec: str) -> str:
    """``"95% interval 0.912 to 0.998"``, or the reason why there is no interval."""
    if interval is not None:
        return f"{LEVEL:.0%} interval {interval:{spec}}"
    if n < MINIMUM_FOR_INTERVAL:
        return f"no interval: fewer than {MINIMUM_FOR_INTERVAL} seeds"
    return "no interval: all equal"


def describe_p(p: float) -> str:
    """``"p = 0.031"`` or ``"p < 0.001"``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
