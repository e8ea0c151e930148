"""The weight function f, once for all that compute it in torch.

    f(z) = z^2 / (1 + z^2)  ("expressive"; Gros, arXiv 2407.18601)   or   z^2  ("squared")

Squares have to be finite: callers clamp scores, beyond which f is 1 to the last bit. The definition
in C is in ``backends/cpu/kernels/simd.h``, that in Triton in ``backends/triton/tiles.py``.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["FORMS", "check_form", "weight", "weight_", "weight_and_half_derivative_"]

FORMS = ("expressive", "squared")


def check_form(form: str) -> None:
    """Raise ValueError if `form` is none of `FORMS`."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")


def weight(square: Tensor, form: str = "expressive", relative: Tensor | None = None) -> Tensor:
    """f(z) of ``z^2``.

    Args:
        square: z^2.
        form: One of `FORMS`.
        relative: z^2 / m^2, where m is a factor of each row: the result is f(z) / m^2. It changes no share, and f of
            small scores does not underflow.
    """
    numerator = square if relative is None else relative
    return numerator if form == "squared" else numerator / (1.0 + square)


def weight_(square: Tensor, form: str) -> Tensor:
    """`weight` in the memory of `square`."""
    return square if form == "squared" else square.div_(square + 1.0)


def weight_and_half_derivative_(z: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """f(z) and f'(z) / 2, the latter in the memory of z. The weight has the bits of `weight`."""
    square = z * z
    if form == "squared":
        return square, z
    denominator = square + 1.0
    return square.div_(denominator), z.div_(denominator).div_(denominator)
