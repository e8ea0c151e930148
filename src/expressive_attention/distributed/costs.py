"""The cost of a layer of attention on many ranks: operations, bytes and seconds, by formulas.

Bytes are those that a rank sends itself, and are counted exactly. Operations are those of products of matrices, two for
a multiplication and an addition. Seconds follow from both for a machine with given rates.
"""

from __future__ import annotations

from typing import NamedTuple

from .moving import Heads

__all__ = ["Cost", "Layer", "Machine", "cost", "seconds"]

_SUMS = 4  # bytes of a number in sums of 16-bit numbers
_BLOCK = 16  # components of a block of a state, as in `backends.linear.state`


class Layer(NamedTuple):
    """A layer of attention: B, Hq, Hkv, E = Ev, and the bytes of a number."""

    heads: int
    kv_heads: int
    width: int
    batch: int = 1
    itemsize: int = 2

    @property
    def products(self) -> int:
        """Rows of a state: the products of components, in blocks of 16 by 16 on and above the diagonal."""
        blocks = [min(_BLOCK, self.width - at) for at in range(0, self.width, _BLOCK)]
        return sum(a * b for i, a in enumerate(blocks) for b in blocks[i:])

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all heads of keys: sums in float32, the moment and the decay in float64."""
        one = _SUMS * self.products * self.width + 8 * self.width**2 + 8
        return self.batch * self.kv_heads * one


class Cost(NamedTuple):
    """The work of a rank for a layer.

    Attributes:
        operations: Floating-point operations of its products of matrices.
        sent: Bytes that it sends.
        rounds: How often it has to wait for others, one after the other.
        overlaps: Whether bytes travel while it computes.
    """

    operations: float
    sent: float
    rounds: int
    overlaps: bool


def cost(method: str, layer: Layer, length: int, ranks: int, backward: bool = False) -> Cost:
    """The cost of a causal layer in zigzag order, for the rank that sends most.

    Args:
        method: One of `METHODS`.
        layer: The layer.
        length: L, a multiple of 2 P.
        ranks: P.
        backward: Count the backward pass in place of the forward pass.

    Raises:
        ValueError: The method is another one.
    """
    tokens = length // ranks
    if method == "ring":
        return _ring(layer, length, ranks, tokens, backward)
    if method == "all_to_all":
        return _all_to_all(layer, length, ranks, tokens, backward)
    if method == "states":
        return _states(layer, ranks, tokens, backward)
    raise ValueError(f"method must be 'ring', 'all_to_all' or 'states', got {method!r}")


def _pairs(layer: Layer, length: int, ranks: int) -> float:
    """Visible pairs of a rank, of all heads."""
    return layer.batch * layer.heads * length * (length + 1) / 2 / ranks


def _ring(layer: Layer, length: int, ranks: int, tokens: int, backward: bool) -> Cost:
    pairs = _pairs(layer, length, ranks)
    numbers = layer.batch * layer.kv_heads * tokens * 2 * layer.width  # keys and values of a rank
    operations = 4 * layer.width * pairs
    sent = (ranks - 1) * numbers * layer.itemsize
    if backward:  # results once more, and five products; gradients of keys and values go all the way round
        operations += 10 * layer.width * pairs
        sent += (ranks if ranks > 1 else 0) * numbers * max(layer.itemsize, _SUMS)
    return Cost(operations, sent, ranks - 1, True)


def _all_to_all(layer: Layer, length: int, ranks: int, tokens: int, backward: bool) -> Cost:
    of_queries = Heads.of_queries(layer.heads, ranks)
    of_keys = of_queries.of_keys(layer.heads, layer.kv_heads)

    def heads(own: Heads, rank: int) -> int:
        return own.ranges[rank][1] - own.ranges[rank][0]

    def to_heads(own: Heads, rank: int) -> int:  # vectors that it sends of its tokens
        return tokens * sum(heads(own, other) for other in range(ranks) if other != rank)

    def to_tokens(own: Heads, rank: int) -> int:  # vectors that it sends of its heads
        return (length - tokens) * heads(own, rank)

    vector = layer.width * layer.itemsize
    first, last = (to_tokens, to_heads) if backward else (to_heads, to_tokens)
    sent = max(
        first(of_queries, rank) * vector
        + 2 * first(of_keys, rank) * vector
        + last(of_queries, rank) * (vector + max(layer.itemsize, _SUMS))
        for rank in range(ranks)
    )
    operations = (10 if backward else 4) * layer.width * _pairs(layer, length, ranks)
    return Cost(operations, layer.batch * sent, 2, False)


def _states(layer: Layer, ranks: int, tokens: int, backward: bool) -> Cost:
    distances = [1 << i for i in range(max(0, ranks - 1).bit_length())]
    # A zigzag has two scans, up and down.
    messages = max(
        sum((rank + d < ranks) + (rank >= d) for d in distances) for rank in range(ranks)
    )  # fmt: skip
    # Keys are added and queries answered, for what is before a piece and once more inside of it.
    passes = 2 * tokens * layer.batch * (layer.heads + layer.kv_heads)
    operations = 2 * layer.products * layer.width * passes * (3 if backward else 1)
    return Cost(operations, messages * layer.state_bytes, 2 * len(distances), False)


class Machine(NamedTuple):
    """Rates of a rank.

    Attributes:
        operations: Per second, of attention.
        bandwidth: Bytes per second that a rank sends.
        latency: Seconds until others have an answer.
        overlap: Which share of bytes travels while a rank computes, if a method lets it.
    """

    operations: float
    bandwidth: float
    latency: float
    overlap: float = 1.0


def seconds(found: Cost, machine: Machine) -> float:
    """The time of a rank: steps of equal size, in each of which it computes and sends."""
    computes = found.operations / machine.operations
    sends = found.sent / machine.bandwidth + found.rounds * machine.latency
    if not found.overlaps:
        return computes + sends
    hidden = machine.overlap * sends
    steps = found.rounds + 1
    in_steps = max(computes * found.rounds / steps, hidden) if steps > 1 else 0.0
    return in_steps + computes / steps + (sends - hidden)
