"""Generate many tokens with the squared form: time per token and memory stay as they are, however long the context.

    python examples/long_generation.py [--tokens N]

A small untrained model continues a prompt of 8 tokens, from a state of constant size and from keys and values.
The default of 1,024 tokens takes less than a minute; ``--tokens 131072`` shows the constant time to a context of 131k.
"""

import argparse
import time

import torch

from expressive_attention.nn import KeyValueCache, SquaredCache, Transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to generate")
    count = parser.parse_args().tokens
    torch.manual_seed(0)
    model = Transformer(256, 128, embed_dim=64, num_layers=2, num_heads=2, mechanism="squared", position="rope").eval()
    prompt = torch.randint(256, (1, 8))
    reports = sorted({count // 8, count // 4, count // 2, count})

    texts = {}
    for name in ("state", "keys and values"):
        caches = [SquaredCache() if name == "state" else KeyValueCache(8 + count) for _ in model.blocks]
        tokens, start, done = [prompt], time.perf_counter(), 0
        with torch.no_grad():
            for step in range(1, count + 1):
                tokens.append(model(tokens[-1], caches)[:, -1].argmax(-1, keepdim=True))
                if step in reports:
                    now = time.perf_counter()
                    size = sum(_bytes(cache) for cache in caches)
                    rate = (now - start) / (step - done) * 1e3
                    print(f"{name}: {step} tokens, {rate:.2f} ms each since the line before, {size / 1e6:.2f} MB")
                    start, done = now, step
        texts[name] = torch.cat(tokens, -1)
    # `model.generate` takes a state by itself where that is smaller.
    same = (texts["state"] == texts["keys and values"]).float().mean().item()
    print(f"the same tokens: {same:.1%}")


def _bytes(cache: SquaredCache | KeyValueCache) -> int:
    if isinstance(cache, SquaredCache):
        assert cache.state is not None
        return cache.state.nbytes
    return cache.nbytes


if __name__ == "__main__":
    main()
