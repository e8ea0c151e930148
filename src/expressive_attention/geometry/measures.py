"""Measures of attention space: pure functions of queries, keys, scores and weights.

z = scale q . k is the score of a query and a key, w(z) its weight before normalization, by form:

    expressive   z^2 / (1 + z^2)     large for parallel and antiparallel, zero for orthogonal (Gros, arXiv 2407.18601)
    squared      z^2
    softmax      exp(z)              large for parallel, small for antiparallel

a_ij = w_ij / sum_j w_ij is the attention of query i to key j. Functions with `keep` use only the pairs that it marks.
"""

from __future__ import annotations

import math

import torch
from scipy.special import betainc
from torch import Tensor

from ..forms import weight as weight_of

__all__ = [
    "FORMS",
    "antiparallel_share",
    "attention",
    "cosine",
    "dead",
    "effective_keys",
    "entropy",
    "evenness",
    "head_similarity",
    "isotropic_density",
    "isotropic_share",
    "log_normalizer",
    "numerical_rank",
    "participation_ratio",
    "quiet_volume",
    "saturated",
    "sink_share",
    "weight",
]

FORMS = ("expressive", "squared", "softmax")


def weight(z: Tensor, form: str) -> Tensor:
    """Weight w(z), of the shape of `z`; for ``"softmax"`` exp(z), which is infinite for large z.

    Raises:
        ValueError: `form` is not one of `FORMS`.
    """
    if form == "softmax":
        return z.exp()
    if form == "squared":
        return z.square()
    if form == "expressive":
        return weight_of(z.clamp(-1e9, 1e9).square())  # the square stays finite, and f is 1 beyond
    raise ValueError(f"form must be one of {FORMS}, got {form!r}")


def attention(z: Tensor, form: str, bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Attention ``(..., L, S)``: w exp(bias), normalized over keys; a row without weight is zero.

    Args:
        z: Scores ``(..., L, S)``.
        form: One of `FORMS`.
        bias: Bias in log-weight space, broadcastable to `z`; default: no bias.
        keep: Bool, broadcastable to `z`, True where the key takes part; default: everywhere.

    Raises:
        ValueError: `form` is not one of `FORMS`.
    """
    w, _ = _weights(z, form, bias, keep)
    total = w.sum(-1, keepdim=True)
    return w / torch.where(total > 0, total, 1)


def log_normalizer(z: Tensor, form: str, bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """ln N of each query ``(..., L)``, N = sum_j w_ij exp(bias_ij); -inf for a query without weight.

    Arguments and errors are those of `attention`.
    """
    w, peak = _weights(z, form, bias, keep)
    return w.sum(-1).log() + peak


def _weights(z: Tensor, form: str, bias: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights ``(..., L, S)`` divided by a factor per query, and the logarithm of this factor ``(..., L)``."""
    bias = torch.zeros((), dtype=z.dtype, device=z.device) if bias is None else bias
    keep = torch.ones((), dtype=torch.bool, device=z.device) if keep is None else keep
    logs = (z + bias if form == "softmax" else bias.expand_as(z)).masked_fill(~keep, -torch.inf)
    peak = logs.amax(-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0, peak)
    w = (logs - peak).exp()
    return (w if form == "softmax" else w * weight(z, form)), peak.squeeze(-1)


def cosine(query: Tensor, key: Tensor) -> Tensor:
    """cos of the angle between each query and key, ``(..., L, E), (..., S, E) -> (..., L, S)``; 0 for a zero vector."""
    q, k = (x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in (query, key))
    return (q @ k.mT).clamp(-1, 1)


def isotropic_density(cos: Tensor, dim: int) -> Tensor:
    """Density of the cos between two random directions of a space of `dim` dimensions.

    The density is (1 - c^2)^((d - 3) / 2) / B(1/2, (d - 1)/2) for c in (-1, 1). Directions get closer to orthogonal as
    d grows.

    Raises:
        ValueError: `dim` is less than 2.
    """
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}")
    log_beta = math.lgamma(0.5) + math.lgamma((dim - 1) / 2) - math.lgamma(dim / 2)
    return torch.exp((dim - 3) / 2 * torch.log1p(-cos.square()) - log_beta)


def isotropic_share(low: float, high: float, dim: int) -> float:
    """Share of random directions whose cos with a given direction is between `low` and `high`.

    It is exact, by the incomplete beta function: P(c < x) = 1/2 + sign(x)/2 I_{x^2}(1/2, (d - 1)/2).

    Raises:
        ValueError: `dim` is less than 2.
    """
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}")

    def below(x: float) -> float:
        x = min(1.0, max(-1.0, x))
        return 0.5 + math.copysign(0.5, x) * float(betainc(0.5, (dim - 1) / 2, x * x))

    return max(0.0, below(high) - below(low))


def quiet_volume(size: float, dim: int, form: str, threshold: float = 0.1) -> float:
    """Share of a key's directions in which its weight is below `threshold` times its largest possible weight.

    A key with scale |q| |k| = `size` has the score size * c and the weight w(size c), where c is the cos of its angle
    to the query. The closed forms are |c| < sqrt(t / (1 - t)) / size with t = threshold f(size) for f,
    |c| < sqrt(threshold) for z^2, and c < 1 + ln(threshold) / size for exp. In many dimensions nearly all of space is
    close to orthogonal, where f is quiet and exp is in the middle of its range.

    Args:
        size: scale |q| |k|, positive.
        dim: Dimension E of query and key.
        form: One of `FORMS`.
        threshold: Fraction of the largest weight, in (0, 1).

    Raises:
        ValueError: An argument is out of range.
    """
    if not size > 0:
        raise ValueError(f"size must be positive, got {size}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    if form == "softmax":
        return isotropic_share(-1.0, 1 + math.log(threshold) / size, dim)
    if form == "squared":
        edge = math.sqrt(threshold)
    elif form == "expressive":
        quiet = threshold * size**2 / (1 + size**2)
        edge = math.sqrt(quiet / (1 - quiet)) / size
    else:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    return isotropic_share(-edge, edge, dim)


def antiparallel_share(z: Tensor, a: Tensor) -> Tensor:
    """Share of each head's attention ``(...)`` on keys with z < 0, from scores and attention ``(..., L, S)``.

    The share is sum_ij a_ij [z_ij < 0] / sum_ij a_ij. It is 1/2 if the sign carries no information; softmax avoids
    these keys.
    """
    total = a.sum((-2, -1))
    return (a * (z < 0)).sum((-2, -1)) / torch.where(total > 0, total, 1)


def entropy(a: Tensor) -> Tensor:
    """Entropy -sum_j a_ij ln a_ij of each query ``(..., L)``, in nats, from attention ``(..., L, S)``."""
    return torch.special.entr(a).sum(-1)


def effective_keys(a: Tensor) -> Tensor:
    """exp of the entropy ``(..., L)``: the number of equally weighted keys that have the same entropy."""
    return entropy(a).exp()


def evenness(effective: Tensor, visible: Tensor) -> Tensor:
    """Effective keys over visible keys: 1 if all have equal weight, 1 / visible if one has it all, 0 for none."""
    return effective / visible.clamp(min=1)


def dead(evenness: Tensor, empty: Tensor) -> Tensor:
    """Whether heads ``(H,)`` do not distinguish keys: mean `evenness` above 0.99, or all queries `empty`."""
    return (evenness > 0.99) | (empty == 1)


def sink_share(a: Tensor) -> Tensor:
    """Mean attention ``(...)`` to the first key, over queries from the second on, from attention ``(..., L, S)``."""
    return a[..., 1:, 0].mean(-1)


def saturated(z: Tensor, a: Tensor, form: str) -> Tensor:
    """Whether a score hardly affects attention, so that learning stalls: bool, of the shape of `z`.

    For f, the slope d ln f / d ln |z| = 2 / (1 + z^2) is at most 2. A score is saturated if its slope is below a tenth
    of 2, for |z| > 3. f'(z) also vanishes near 0, but normalization cancels the size of z there, and attention is that
    of z^2, whose slope is always 2. For softmax, the slope of the whole query, sum_j da_j/dz_j = 1 - sum_j a_j^2, is at
    most 1. Its scores are saturated if this is below a tenth, where nearly all attention goes to one key.

    Raises:
        ValueError: `form` is not one of `FORMS`.
    """
    if form == "softmax":
        return (1 - a.square().sum(-1, keepdim=True) < 0.1).expand_as(z)
    if form == "squared":
        return torch.zeros_like(z, dtype=torch.bool)
    if form == "expressive":
        return z.abs() > 3
    raise ValueError(f"form must be one of {FORMS}, got {form!r}")


def participation_ratio(moment: Tensor) -> Tensor:
    """Number of directions that vectors spread over, 1 to E: (tr C)^2 / tr C^2 of second moments C ``(..., E, E)``."""
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = moment.square().sum((-2, -1))  # tr C^2 of a symmetric matrix
    return trace.square() / torch.where(square > 0, square, 1)


def numerical_rank(moment: Tensor, tolerance: float = 1e-3) -> Tensor:
    """Number of eigenvalues of second moments ``(..., E, E)`` that are at least `tolerance` times the largest one."""
    values = torch.linalg.eigvalsh(moment)
    return ((values > 0) & (values >= tolerance * values[..., -1:])).sum(-1)


def head_similarity(a: Tensor, b: Tensor) -> Tensor:
    """How alike heads attend, ``(H, H')`` from attention ``(..., H, L, S)`` and ``(..., H', L, S)`` to the same tokens.

    This is the Bhattacharyya coefficient sum_j sqrt(a_ij b_ij), averaged over queries and leading dimensions: 1 for
    equal heads, 0 for heads that look at different keys.

    Raises:
        ValueError: The shapes do not fit.
    """
    if a.shape[:-3] != b.shape[:-3] or a.shape[-2:] != b.shape[-2:]:
        raise ValueError(
            "a and b must be attention to the same tokens, of shape (..., H, L, S), "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    overlap = torch.einsum("...hls,...gls->...hg", a.sqrt(), b.sqrt()) / a.shape[-2]
    return overlap.reshape(-1, *overlap.shape[-2:]).mean(0)
