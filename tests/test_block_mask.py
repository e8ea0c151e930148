"""`block_mask=` of the public function: what it hides, what is never read, and what fits."""

import sys

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.flop_counter import FlopCounterMode

from expressive_attention import expressive_attention
from tests.blocks import random_block_mask
from tests.budget import FUSED, ON_CPU, Case, assert_within_budget
from tests.processes import run_code


def inputs(rows=300, keys=300, heads=2, dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, n, dim, generator=generator) for n in (rows, keys, keys)]


def band(b, h, i, j):
    return (i >= j) & (i - j < 90 + 40 * h)


BAND = create_block_mask(band, None, 2, 300, 300, device="cpu", BLOCK_SIZE=64)


@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_a_block_mask_of_torch_means_its_mask(backend):
    q, k, v = inputs()
    i, j = torch.arange(300).view(-1, 1), torch.arange(300)
    mask = torch.stack([band(0, h, i, j) for h in range(2)])
    found = expressive_attention(q, k, v, block_mask=BAND, backend=backend)
    torch.testing.assert_close(found, expressive_attention(q, k, v, mask, backend="reference"))


@pytest.mark.parametrize(
    ("rows", "keys", "dtype"),
    [
        (530, 700, torch.float32),
        (150, 700, torch.bfloat16),
        (150, 700, torch.float64),
        *((1, 1500, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    ],
)
@pytest.mark.parametrize("size", [(128, 128), (64, 32), (1, 64), (100, 48)])
def test_long_problems_within_budget(rows, keys, size, dtype):
    """Several blocks of the kernels, of rows and of keys, with heads that share keys."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, rows, 32, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, 2, keys, 32, generator=generator).to(dtype)
    mask = random_block_mask(1, 4, rows, keys, size, generator)
    options = {"block_mask": mask, "is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True}
    assert_within_budget(Case(q, k, v, None, options), *FUSED, threads=(1, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="it takes the right to read memory away")
def test_blocks_that_are_not_listed_are_not_read():
    """A process that reads them is killed: forward and backward, one query and many."""
    done = run_code("""
import ctypes, mmap
import torch
from torch.nn.attention.flex_attention import BlockMask
from expressive_attention import expressive_attention

libc = ctypes.CDLL(None, use_errno=True)
keys, dim, size = 2048, 64, 128
block = size * dim * 4
assert block % mmap.PAGESIZE == 0
tensors = []
for _ in range(2):
    memory = mmap.mmap(-1, keys * dim * 4)
    x = torch.frombuffer(memory, dtype=torch.float32).view(1, 1, keys, dim)
    x.normal_()
    for i in range(keys // size):
        if i not in (1, 2, 9):
            address = ctypes.c_void_p(x.data_ptr() + i * block)
            assert libc.mprotect(address, ctypes.c_size_t(block), 0) == 0  # PROT_NONE
    tensors.append(x.requires_grad_())
key, value = tensors
for rows in (1, 3, 300):
    count = torch.full((1, 1, -(-rows // size)), 3, dtype=torch.int32)
    index = torch.tensor([1, 2, 9] + 13 * [0], dtype=torch.int32).expand(1, 1, count.shape[2], -1)
    blocks = BlockMask.from_kv_blocks(0 * count, index, count, index, BLOCK_SIZE=size)
    query = torch.randn(1, 1, rows, dim, requires_grad=True)
    output = expressive_attention(query, key, value, block_mask=blocks, backend="cpu")
    kept = [torch.cat([x[:, :, i * size : (i + 1) * size] for i in (1, 2, 9)], 2) for x in tensors]
    torch.testing.assert_close(output, expressive_attention(query, *kept))
    _, dk, dv = torch.autograd.grad(output.sum(), (query, key, value))
    assert dk[:, :, 384:1152].abs().max() == 0 and dv[:, :, 384:1152].abs().max() == 0
    assert dk[:, :, 128:384].abs().max() > 0
print("not read")
""")
    assert done.stdout.strip().endswith("not read"), done.stderr


def test_flops_are_those_of_listed_pairs():
    q, k, v = inputs()
    with FlopCounterMode(display=False) as counter:
        expressive_attention(q, k, v, block_mask=BAND)
    listed = BAND.to_dense()[0].repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :300, :300]
    assert counter.get_total_flops() == 2 * int(listed.sum()) * 2 * (16 + 16)


def test_compiled_and_mapped_calls():
    q, k, v = inputs()
    expected = expressive_attention(q, k, v, block_mask=BAND)
    compiled = torch.compile(
        lambda q: expressive_attention(q, k, v, block_mask=BAND), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), expected)
    stacked = torch.stack([q, -q, 2 * q])
    mapped = torch.vmap(lambda q: expressive_attention(q, k, v, block_mask=BAND))(stacked)
    for own, x in zip(mapped, stacked, strict=True):
        torch.testing.assert_close(own, expressive_attention(x, k, v, block_mask=BAND))


def test_the_operator_takes_blocks():
    q, k, v = (x[:1, :, :70] for x in inputs())
    mask = random_block_mask(1, 2, 70, 70, (32, 16), torch.Generator().manual_seed(1))
    torch.library.opcheck(
        torch.ops.expressive_attention.attention,
        _arguments(q, k, v, mask),
        test_utils=("test_schema", "test_faketensor"),
    )


def _arguments(q, k, v, mask):
    from expressive_attention.blocks import list_blocks
    from expressive_attention.call import Call, Visibility
    from expressive_attention.schema import flatten

    listed, tiles = list_blocks(mask, q.shape[2], k.shape[2])
    visibility = Visibility(listed=listed, tiles=tiles, block_rows=32, block_keys=16)
    return flatten(Call(q, k, v, None, visibility, 0.25, "expressive"), "cpu")


def lists(count, index, size=64, shape=(1, 1, 5, 5)):
    counts = torch.full(shape[:3], count, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        counts, torch.full(shape, index, dtype=torch.int32), BLOCK_SIZE=size, compute_q_blocks=False
    )


@pytest.mark.parametrize(
    ("block_mask", "error", "words"),
    [
        (torch.ones(300, 300), TypeError, "block_mask must be a .*BlockMask or None, got Tensor"),
        (lists(1, 0, 128), ValueError, "block_mask must have kv_indices .* 3 x 3 blocks of 128 x 128"),
        (lists(1, 0, 64, (3, 1, 5, 5)), ValueError, r"for 2 x 2 heads of 300 queries and 300 keys, got \(3, 1, 5, 5\)"),
        (lists(1, 5), ValueError, "block_mask must list blocks of keys from 0 to 4"),
        (lists(6, 0), ValueError, "block_mask must list blocks of keys from 0 to 4"),
    ],
)
def test_wrong_block_masks(block_mask, error, words):
    with pytest.raises(error, match=words):
        expressive_attention(*inputs(), block_mask=block_mask)
