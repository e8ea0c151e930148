"""Associative recall: how many pairs of key and value a state of constant size tells apart, and keys and values do.

    python examples/recall.py [--pairs N ...] [--dims E ...]

Each of N random keys of width E has a random value of width E, one of N. All keys are asked for again, and the answer
is the value that is nearest to the output. No model is trained: this is what the weights themselves allow where keys
are as different as random ones. The form ``"squared"`` from its state is compared with EA and with softmax, which keep
all keys, at scores of the size that suits each best (`--gains`).
"""

import argparse

import torch
import torch.nn.functional as F

from expressive_attention import expressive_attention
from expressive_attention.recurrent import SquaredState

TRIALS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument(
        "--gains", type=float, nargs="+", default=[0.1, 1.0, 4.0, 16.0, 64.0], help="sizes of z of a match"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print("share of values that are recalled, of chance 1 / pairs")
    print(f"{'E':>4} {'numbers of a state':>18} {'pairs':>6} {'z² (state)':>11} {'EA':>6} {'softmax':>8}")
    for dim in arguments.dims:
        for pairs in arguments.pairs:
            keys, values = (F.normalize(torch.randn(TRIALS, 1, pairs, dim), dim=-1) for _ in range(2))
            state = SquaredState(TRIALS, 1, dim).update(keys, values)
            squared = _recalled(state.attend(keys), values)
            expressive = max(
                _recalled(expressive_attention(keys, keys, values, scale=gain), values) for gain in arguments.gains
            )
            softmax = max(
                _recalled(F.scaled_dot_product_attention(keys, keys, values, scale=gain), values)
                for gain in arguments.gains
            )
            numbers = state.sums[0].numel()
            print(f"{dim:>4} {numbers:>18} {pairs:>6} {squared:>11.1%} {expressive:>6.1%} {softmax:>8.1%}")


def _recalled(output: torch.Tensor, values: torch.Tensor) -> float:
    """The share of outputs that are nearest to their own value, as an angle."""
    nearest = (output @ values.mT).argmax(-1)
    return (nearest == torch.arange(values.shape[-2])).float().mean().item()


if __name__ == "__main__":
    main()
