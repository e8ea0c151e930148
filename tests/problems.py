"""Random problems for the operator: every feature, odd sizes, masks and strides of all kinds."""

import torch
from hypothesis import strategies as st

from tests.blocks import random_block_mask
from tests.budget import Case
from tests.poison import Poison, replaced


def strided(shape, dtype, layout, generator):
    """Random numbers of a shape whose last dimensions lie in memory as `layout` says."""
    b, h, n, e = shape
    if layout == "repeated":
        return torch.randn(b, 1, 1, e, generator=generator).to(dtype).expand(shape)
    if layout == "columns first":
        return torch.randn(b, h, e, n, generator=generator).to(dtype).mT
    if layout == "transposed":
        return torch.randn(b, n, h, e, generator=generator).to(dtype).transpose(1, 2)
    if layout == "gaps":
        return torch.randn(b, h, n + 1, 2 * e, generator=generator).to(dtype)[:, :, 1:, ::2]
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def problems(draw, largest=40, drops=False, batches=3, kv_heads=3):
    """Problems of sizes up to `largest`, or twice that where vectors are full; with `drops`, most have dropout."""
    # Odd numbers, and those at which vectors and tiles are full.
    size = st.integers(1, largest) | st.sampled_from([n for n in (8, 16, 32, 48, 64, 128) if n <= 2 * largest])
    batch, kv_heads, groups = draw(st.integers(0, batches)), draw(st.integers(1, kv_heads)), draw(st.integers(1, 3))
    length, keys = (draw(st.integers(0, 4) | size) for _ in range(2))
    e, ev = draw(size), draw(size)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads = kv_heads * groups
    layouts = st.sampled_from(["contiguous", "contiguous", "transposed", "gaps", "columns first", "repeated"])
    query = strided((batch, heads, length, e), dtype, draw(layouts), generator)
    key = strided((batch, kv_heads, keys, e), dtype, draw(layouts), generator)
    value = strided((batch, kv_heads, keys, ev), dtype, draw(layouts), generator)
    if draw(st.integers(0, 3)) == 0:  # scores that are 0
        query = replaced(query, torch.rand(batch, heads, length, 1, generator=generator) < 0.1, 0.0)
        key = replaced(key, torch.rand(batch, kv_heads, keys, 1, generator=generator) < 0.3, 0.0)
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "bias", "float32 bias"]))
    size_of_bias = draw(st.sampled_from([1.0, 1.0, 1.0, 30.0, 1e4, torch.inf])) if "bias" in kind else 1.0
    if kind != "none":
        full = (batch, heads, length, keys)
        shape = [draw(st.sampled_from([1, n])) for n in full]
        first = draw(st.integers(0, 4)) if all(n == 1 for n in shape[:2]) else 0
        numbers = torch.randn(shape[min(first, 2) :], generator=generator)
        mask = numbers > -0.5
        if kind != "bool":
            mask_dtype = torch.float32 if kind == "float32 bias" else dtype
            mask = biases(numbers, mask_dtype, size_of_bias, generator)
            if draw(st.booleans()):
                mask = mask.masked_fill(numbers > 1.0, -torch.inf)
        if draw(st.booleans()):
            mask = mask.mT.contiguous().mT
    options = {
        "is_causal": draw(st.booleans()),
        "causal_alignment": draw(st.sampled_from(["upper_left", "lower_right"])),
        "enable_gqa": True,
        "form": draw(st.sampled_from(["expressive", "squared"])),
        "scale": draw(st.sampled_from([None, 1.0, 0.03, -2.5])),
    }
    if draw(st.booleans()):
        options |= draw(visibilities(batch, heads, keys))
    if draw(st.integers(0, 3)) == 0:
        shape = draw(st.sampled_from([(1,), (heads,), (batch, heads)]))
        reach = max(length, keys, 1) + draw(st.sampled_from([0, 0, 5]))
        options["relative_bias"] = torch.randn(*shape, 2 * reach - 1, generator=generator) * draw(
            st.sampled_from([1, 40])
        )
    if draw(st.integers(0, 3)) == 0 and batch and length and keys:
        block_size = draw(st.sampled_from([(1, 16), (16, 32), (64, 64), (128, 128), (5, 7), (3, 1), (40, 24)]))
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads)]
        masked = draw(st.booleans())
        options["block_mask"] = random_block_mask(*shape, length, keys, block_size, generator, masked)
    if drops:
        options["dropout_p"] = draw(st.sampled_from([0.0, 0.1, 0.6]))
    relative = options.get("relative_bias")
    size_of_bias = 40.0 if relative is not None and relative.numel() and relative.abs().max() > 9 else size_of_bias
    through_normalizer = size_of_bias == 1.0 and draw(st.booleans())  # it overflows with a large bias
    poison = draw(poisons) if draw(st.booleans()) else None
    return Case(query, key, value, mask, options, through_normalizer, poison)


poisons = st.builds(
    Poison,
    number=st.sampled_from([torch.nan, torch.nan, torch.inf, -torch.inf]),
    bias=st.sampled_from([torch.nan, torch.inf, 100.0, 6e4]),
    seen=st.sampled_from(["nothing", "nothing", "query", "key", "value", "mask"]),
    seed=st.integers(0, 2**31),
)


def biases(numbers, dtype, size, generator):
    """Biases of about a size; infinity: the largest and smallest numbers of the dtype, and their halves."""
    if size < torch.inf:
        return (numbers * size).to(dtype)
    limits = torch.finfo(dtype)
    ends = torch.tensor([limits.max, limits.max / 2, 0.0, limits.min / 2, limits.min], dtype=dtype)
    return ends[torch.randint(len(ends), numbers.shape, generator=generator)]


@st.composite
def visibilities(draw, batch, heads, keys):
    """Settings that say which keys are seen and how far they are, each of them or not."""
    options = {}
    if draw(st.booleans()):
        options["window_size"] = draw(st.tuples(st.integers(-1, 9), st.integers(-1, 9)))
    if draw(st.booleans()):
        options["key_lengths"] = torch.tensor([draw(st.integers(0, keys)) for _ in range(batch)], dtype=torch.int32)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        shape = draw(st.sampled_from([(heads,), (batch, heads)]))
        options["alibi_slopes"] = 2 * torch.rand(shape, generator=generator)
    return options
