"""What to measure in attention space: pure functions of queries, keys, scores and weights.

z = scale q . k is the score of a query and a key, w(z) its weight before normalization, by form:

    expressive   z^2 / (1 + z^2)     large for parallel and antiparallel, zero for orthogonal (Gros, arXiv 2407.18601)
    squared      z^2
    softmax      exp(z)              large for parallel, small for antiparallel

and a_ij = w_ij / sum_j w_ij the attention of query i to key j. Functions of `keep` look at the pairs that it marks.
"""

from __future__ import annotations

import math

import torch
from scipy.special import betainc
from torch import Tensor

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
    """w(z), of the shape of `z`; for ``"softmax"`` exp(z), which is infinite for large z.

    Raises:
        ValueError: `form` is none of `FORMS`.
    """
    if form == "softmax":
        return z.exp()
    if form == "squared":
        return z.square()
    if form == "expressive":
        square = z.clamp(-1e9, 1e9).square()  # whose square is finite, and from which on f is 1
        return square / (1 + square)
    raise ValueError(f"form must be one of {FORMS}, got {form!r}")


def attention(z: Tensor, form: str, bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """a ``(..., L, S)`` of scores ``(..., L, S)``: w exp(bias), normalized over keys; a row without weight is zero.

    Args:
        z: Scores.
        form: One of `FORMS`.
        bias: In log-weight space, broadcastable to z.
        keep: Bool, True where the key takes part, likewise.

    Raises:
        ValueError: `form` is none of `FORMS`.
    """
    w, _ = _weights(z, form, bias, keep)
    total = w.sum(-1, keepdim=True)
    return w / torch.where(total > 0, total, 1)


def log_normalizer(z: Tensor, form: str, bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """ln N of each query ``(..., L)``, N = sum_j w_ij exp(bias_ij); -inf for one without weight. As `attention`."""
    w, peak = _weights(z, form, bias, keep)
    return w.sum(-1).log() + peak


def _weights(z: Tensor, form: str, bias: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights ``(..., L, S)`` but for a factor per query, and its logarithm ``(..., L)``."""
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

    (1 - c^2)^((d - 3) / 2) / B(1/2, (d - 1)/2), for c in (-1, 1): the larger d, the closer to orthogonal.

    Raises:
        ValueError: `dim` is less than 2.
    """
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}")
    log_beta = math.lgamma(0.5) + math.lgamma((dim - 1) / 2) - math.lgamma(dim / 2)
    return torch.exp((dim - 3) / 2 * torch.log1p(-cos.square()) - log_beta)


def isotropic_share(low: float, high: float, dim: int) -> float:
    """Share of random directions whose cos with a given one is between `low` and `high`: exact, by the incomplete beta.

    P(c < x) = 1/2 + sign(x)/2 I_{x^2}(1/2, (d - 1)/2).

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
    """Share of the directions of a key whose weight is below `threshold` times the largest that it can have.

    A key of which scale |q| |k| = `size` has the score size * c, with c the cos of its angle to the query, and the
    weight w(size c). Closed forms: for f, |c| < sqrt(t / (1 - t)) / size with t = threshold f(size); for z^2,
    |c| < sqrt(threshold); for exp, c < 1 + ln(threshold) / size. In many dimensions nearly all of space is close to
    orthogonal, where f is quiet and exp has the middle of its range.

    Args:
        size: scale |q| |k|, positive.
        dim: Dimensions E of query and key.
        form: One of `FORMS`.
        threshold: In (0, 1).

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
    """Share of the attention mass of each head ``(...)`` that goes to keys with z < 0, of ``(..., L, S)``.

    sum_ij a_ij [z_ij < 0] / sum_ij a_ij: 1/2 where the sign tells nothing, and what softmax avoids.
    """
    total = a.sum((-2, -1))
    return (a * (z < 0)).sum((-2, -1)) / torch.where(total > 0, total, 1)


def entropy(a: Tensor) -> Tensor:
    """-sum_j a_ij ln a_ij of each query ``(..., L)``, in nats."""
    return torch.special.entr(a).sum(-1)


def effective_keys(a: Tensor) -> Tensor:
    """exp of the entropy ``(..., L)``: as many keys, all with equal weight, would have it."""
    return entropy(a).exp()


def evenness(effective: Tensor, visible: Tensor) -> Tensor:
    """Effective keys over visible keys: 1 where all have equal weight, 1 / visible where one has it all; 0 for none."""
    return effective / visible.clamp(min=1)


def dead(evenness: Tensor, empty: Tensor) -> Tensor:
    """Whether heads ``(H,)`` tell no key from another: mean `evenness` above 0.99, or all queries `empty`."""
    return (evenness > 0.99) | (empty == 1)


def sink_share(a: Tensor) -> Tensor:
    """Mean attention of the queries from the second on to the first key, ``(...)`` of ``(..., L, S)``."""
    return a[..., 1:, 0].mean(-1)


def saturated(z: Tensor, a: Tensor, form: str) -> Tensor:
    """Whether a score has next to no influence on attention, bool, of the shape of `z`, so that learning stalls.

    For f by its slope d ln f / d ln |z| = 2 / (1 + z^2), at most 2: below a tenth of that, for |z| > 3. f'(z) vanishes
    near 0, too, but there normalization cancels the size of z, and attention is that of z^2, whose slope is always 2.
    For softmax by that of the whole query, sum_j da_j/dz_j = 1 - sum_j a_j^2, at most 1: below a tenth, where nearly
    all attention goes to one key.

    Raises:
        ValueError: `form` is none of `FORMS`.
    """
    if form == "softmax":
        return (1 - a.square().sum(-1, keepdim=True) < 0.1).expand_as(z)
    if form == "squared":
        return torch.zeros_like(z, dtype=torch.bool)
    if form == "expressive":
        return z.abs() > 3
    raise ValueError(f"form must be one of {FORMS}, got {form!r}")


def participation_ratio(moment: Tensor) -> Tensor:
    """(tr C)^2 / tr C^2 of second moments C ``(..., E, E)``: how many directions vectors spread over, 1 to E."""
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = moment.square().sum((-2, -1))  # tr C^2 of a symmetric matrix
    return trace.square() / torch.where(square > 0, square, 1)


def numerical_rank(moment: Tensor, tolerance: float = 1e-3) -> Tensor:
    """Number of eigenvalues of second moments ``(..., E, E)`` that are at least `tolerance` times the largest one."""
    values = torch.linalg.eigvalsh(moment)
    return ((values > 0) & (values >= tolerance * values[..., -1:])).sum(-1)


def head_similarity(a: Tensor, b: Tensor) -> Tensor:
    """How alike heads attend, ``(H, H')`` of attention ``(..., H, L, S)`` and ``(..., H', L, S)`` to the same tokens.

    The Bhattacharyya coefficient sum_j sqrt(a_ij b_ij), mean over queries and leading dimensions: 1 for heads that are
    the same, 0 for heads that look at different keys.

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
