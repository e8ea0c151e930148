"""Use expressive attention in unchanged code that calls `torch.nn.functional.scaled_dot_product_attention`.

python examples/swap_sdpa.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from expressive_attention.integrations import convert, expressive_sdpa


class Attention(nn.Module):
    """Somebody's self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(32, 4), Attention(32, 4)), torch.randn(2, 10, 32)
    softmax = model(x)

    # Temporarily, around any code:
    with expressive_sdpa():
        inside = model(x)
    print(f"inside of expressive_sdpa, outputs differ by up to {(inside - softmax).abs().max():.3f}")

    # Permanently, and verified:
    conversion = convert(model)
    print(conversion)
    print(conversion.verify(x))
    print(f"the same outputs: {torch.equal(model(x), inside)}")

    conversion.undo()
    print(f"undone, outputs are as they were: {torch.equal(model(x), softmax)}")


if __name__ == "__main__":
    main()
