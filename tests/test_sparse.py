"""Blocks of keys chosen with a certificate: bounds that hold, the fewest blocks, and an error that is bounded."""

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from expressive_attention import expressive_attention
from expressive_attention.call import float32_precision
from expressive_attention.sparse import moments, select
from tests.blocks import seen

FORMS = ["expressive", "squared"]
LOWER_RIGHT = {"is_causal": True, "causal_alignment": "lower_right"}


def weights(query, key, form, scale=None, hidden=None):
    """The weights of a row over the largest score, ``(B, Hq, L, S)`` of float64, by their definition."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    z = (scale or 1 / math.sqrt(query.shape[-1])) * query @ key.mT
    if hidden is not None:
        z = z.masked_fill(hidden, 0.0)
    unit = z.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    unit = unit.clamp(max=1.0) if form == "expressive" else unit
    return (z / unit).square() / (1 + z.square() if form == "expressive" else 1.0)


def causal(rows, keys, lengths=None):
    """Which pairs are hidden, ``(B | 1, 1, L, S)``, by causality to the lower right, and by lengths."""
    place = torch.arange(rows).view(1, 1, -1, 1) - rows + (keys if lengths is None else lengths.view(-1, 1, 1, 1))
    return torch.arange(keys) > place


def needles(generator, *shape):
    keys = 0.01 * torch.randn(shape, generator=generator)
    keys[:, :, torch.randint(shape[2], (3,), generator=generator)] = 10.0
    return keys


def equal(generator, *shape):
    return torch.randn(*shape[:2], 1, shape[3], generator=generator).expand(shape).clone()


def turning(generator, *shape):
    """Each key is followed by its negative: their scores cancel, and their weights do not."""
    keys = torch.randn(shape, generator=generator)
    keys[:, :, 1::2] = -keys[:, :, : 2 * (shape[2] // 2) : 2]
    return keys


def sizes(generator, *shape):
    """Norms of all sizes."""
    return torch.randn(shape, generator=generator) * 10 ** (
        12 * torch.rand(*shape[:3], 1, generator=generator, dtype=torch.float64) - 6
    )


def orthogonal(generator, *shape):
    """To queries that have their first component alone: all but a few keys have no weight."""
    keys = torch.randn(shape, generator=generator)
    keys[..., 0] *= torch.rand(shape[:3], generator=generator) < 0.02
    return keys


def plain(generator, *shape):
    return torch.randn(shape, generator=generator)


KEYS = [needles, equal, turning, sizes, orthogonal, plain]


@st.composite
def problems(draw):
    """Query, key, value, and settings of `select`, on inputs that are made to mislead."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    rows, keys = draw(st.sampled_from([1, 1, 2, 19])), draw(st.integers(1, 90))
    dim, dtype = (
        draw(st.sampled_from([1, 5, 16])),
        draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    )
    make = draw(st.sampled_from(KEYS))
    size = draw(st.sampled_from([1.0, 1.0, 1e-15, 1e-3, 1e3, 1e15]))
    query = size * torch.randn(batch, kv_heads * groups, rows, dim, generator=generator, dtype=torch.float64)
    if make is orthogonal:
        query[..., 1:] = 0.0
    if draw(st.integers(0, 5)) == 0:
        query[:, :, -1] = 0.0
    key = make(generator, batch, kv_heads, keys, dim)
    value = torch.randn(batch, kv_heads, keys, 3, generator=generator)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    options = {"form": draw(st.sampled_from(FORMS)), "scale": draw(st.sampled_from([None, -2.5]))}
    if draw(st.booleans()):
        options |= LOWER_RIGHT
    if draw(st.booleans()):
        lengths = torch.tensor([draw(st.integers(0, keys)) for _ in range(batch)])
        options["key_lengths"] = lengths
        beyond = torch.arange(keys) >= lengths.view(-1, 1, 1)
        key, value = (x.masked_fill(beyond.unsqueeze(-1), torch.nan) for x in (key, value))
    block = draw(st.sampled_from([(1, 4), (4, 8), (16, 16), (128, 128)]))
    return query, key, value, options, block, draw(st.sampled_from([0.3, 0.01, 1e-4]))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems())
def test_the_certificate_holds(problem):
    """The weight left out is within the bound, the bound within the tolerance, and the error what follows from it."""
    query, key, value, options, block, tolerance = problem
    found = select(query, key, tolerance=tolerance, block_size=block, enable_gqa=True, **options)
    shape = (*query.shape[:3], key.shape[2])
    lengths = options.get("key_lengths")
    hidden = torch.zeros(1, 1, *shape[2:], dtype=torch.bool)
    if options.get("is_causal"):
        hidden = causal(shape[2], shape[3], lengths)
    if lengths is not None:
        hidden = hidden | (torch.arange(shape[3]) >= lengths.view(-1, 1, 1, 1))
        key, value = (x.nan_to_num(0.0) for x in (key, value))
    weight = weights(query, key, options["form"], options["scale"], hidden)
    total = weight.sum(-1)
    left = weight.masked_fill(seen(found.block_mask, *shape), 0.0).sum(-1)
    assert (found.bound <= tolerance).all()
    assert (left <= found.bound * total * (1 + 1e-12)).all()

    exact = [x.double() for x in (query, key, value)]
    if exact[0].abs().max() * exact[1].abs().max() > 1e25:
        return  # the reference has f = 1 there, beyond what is asked here
    attend = partial(expressive_attention, *exact, enable_gqa=True, backend="reference", **options)
    error = (attend(block_mask=found.block_mask) - attend()).abs().amax()
    assert error <= 2 * tolerance * exact[2].abs().max() + 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", KEYS)
@pytest.mark.parametrize("rows", [1, 130])
def test_the_error_of_attention_within_a_tolerance(form, make, rows):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, rows, 16, generator=generator)
    key = make(generator, 2, 2, 700, 16).float()
    value = torch.randn(2, 2, 700, 8, generator=generator)
    lengths = torch.tensor([700, 431])
    key[1, :, 431:] = value[1, :, 431:] = torch.nan
    attend = partial(expressive_attention, enable_gqa=True, form=form, key_lengths=lengths, **LOWER_RIGHT)
    whole = attend(query, key, value)
    for tolerance in (0.2, 0.01, 1e-3):
        output = attend(query, key, value, tolerance=tolerance)
        assert (output - whole).abs().max() <= 2 * tolerance * value.nan_to_num(0.0).abs().max() + 1e-5
        found = select(query, key, tolerance=tolerance, form=form, key_lengths=lengths, enable_gqa=True, **LOWER_RIGHT)
        torch.testing.assert_close(output, attend(query, key, value, block_mask=found.block_mask))


def test_one_needle_is_one_block():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 1, 16), 1e-3 * torch.randn(1, 2, 4096, 16)
    key[:, 0, 1300], key[:, 1, 77] = 8 * query[:, 0, 0], -8 * query[:, 1, 0]
    found = select(query, key, tolerance=0.01)
    assert found.block_mask.full_kv_num_blocks.flatten().tolist() == [1, 1]
    assert found.block_mask.full_kv_indices[0, :, 0, 0].tolist() == [1300 // 128, 0]
    assert found.kept == 1 / 32
    value = torch.randn(1, 2, 4096, 3)
    value[:, :, 128:1280] = torch.nan  # in no block that is kept: nothing tells of it
    assert expressive_attention(query, key, value, tolerance=0.01).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
def test_one_query_has_the_fewest_blocks(form, tolerance):
    """The fewest that would do with all weights known; in the form "expressive", within a tenth."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 20, 1, 8, generator=generator)
    key = torch.randn(1, 20, 640, 8, generator=generator) * torch.rand(1, 20, 640, 1, generator=generator) ** 8
    key = key * (0.05 if form == "expressive" else 1.0)
    found = select(query, key, tolerance=tolerance, form=form, block_size=(1, 16))
    of_blocks = weights(query, key, form).unflatten(-1, (40, 16)).sum(-1).squeeze(2)
    left = 1 - of_blocks.sort(dim=-1, descending=True).values.cumsum(-1) / of_blocks.sum(-1, keepdim=True)
    fewest = 1 + (left > tolerance * (1 - 1e-5)).sum(-1)
    kept = (found.block_mask.kv_num_blocks + found.block_mask.full_kv_num_blocks).squeeze(2)
    assert fewest.float().mean() < 36
    if form == "squared":
        assert torch.equal(kept, fewest.int())
    else:
        assert ((kept >= fewest) & (0.9 * kept <= fewest)).all()


def test_exact_sums_keep_fewer_blocks_than_bounds_alone():
    """Scores that are large and of all sizes: f is far from its bounds, but the sums of what is kept are exact."""
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(1, 1, 1, 32, generator=generator), torch.randn(1, 1, 4096, 32, generator=generator)
    size = torch.where(torch.arange(4096) < 1024, 3.0, 0.1)
    found = select(query, key * size[:, None], tolerance=0.05, block_size=(1, 64))
    assert found.kept == 16 / 64


@pytest.mark.parametrize("form", FORMS)
def test_blocks_with_numbers_that_are_not_finite_are_kept(form):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 1, 3, 8), 1e-3 * torch.randn(1, 1, 320, 8), torch.randn(1, 1, 320, 2)
    key[:, :, 7] = 9 * query[:, :, 0]
    clean = expressive_attention(query[:, :, :2], key, value, form=form, tolerance=0.01, **LOWER_RIGHT)
    key[0, 0, 319] = torch.nan  # which the last query alone sees
    output = expressive_attention(query, key, value, form=form, tolerance=0.01, **LOWER_RIGHT)
    assert output[:, :, 2].isnan().all()
    assert output[:, :, :2].isfinite().all()
    assert clean.isfinite().all()
    query[0, 0, 1, 3] = torch.inf
    found = select(query, key, tolerance=0.01, form=form, **LOWER_RIGHT)
    assert found.kept == 1
    assert (found.bound <= 0.01).all()


def test_moments_of_a_cache_that_grows():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1000, 16)
    given = moments(key[:, :, :300], 64)
    for end in (301, 320, 640, 1000):
        given = given.update(key[:, :, :end])
    for x, y in zip(given.__dict__.values(), moments(key, 64).__dict__.values(), strict=True):
        torch.testing.assert_close(x, y)
    options = {"tolerance": 0.1, "block_size": (1, 64), "enable_gqa": True}
    found, other = select(query, key, moments=given, **options), select(query, key, **options)
    torch.testing.assert_close(found.bound, other.bound)
    assert found.kept == other.kept < 1
    with pytest.raises(ValueError, match=r"key must be \(2, 2, S, 16\) with S of at least 1000, got \(2, 2, 9, 16\)"):
        given.update(key[:, :, :9])
    with pytest.raises(ValueError, match="moments must be of 1000 keys in blocks of 128"):
        select(query, key, tolerance=0.1, enable_gqa=True, moments=given)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_bound_does_not_rest_on_products_of_fewer_digits(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        made = moments(torch.randn(1, 1, 100, 8))
    finally:
        torch.set_float32_matmul_precision(before)
    assert made.matrices.dtype == (torch.float32 if precision == "highest" else torch.float64)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one for all")
def test_the_precision_of_products_is_that_of_the_device():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = {device: float32_precision(torch.device(device)) for device in ("cuda", "cpu")}
        made = moments(torch.randn(1, 1, 100, 8))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert found == {"cuda": "high", "cpu": "highest"}
    assert made.matrices.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [{}, LOWER_RIGHT])
def test_flex_attention_takes_the_blocks(options):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 256, 16), torch.randn(1, 2, 640, 16), torch.randn(1, 2, 640, 16)
    key[:, :, 128:512] *= 1e-3
    found = select(query, key, tolerance=0.05, **options)
    assert found.kept < 1
    mask = seen(found.block_mask, 1, 2, 256, 640)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=found.block_mask), expected)


Q, K = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"tolerance": 0.0}, ValueError, "tolerance must be in"),
        ({"tolerance": 1}, TypeError, "tolerance must be a float, got int"),
        ({"query": Q[0]}, ValueError, "query must be"),
        ({"key": 3}, TypeError, "key must be a torch.Tensor, got int"),
        ({"key": K[..., :7]}, ValueError, "key must be"),
        ({"key": K[:, :1]}, ValueError, "query must have the 1 heads of key"),
        ({"form": "cubed"}, ValueError, "form must be one of"),
        ({"causal_alignment": "left"}, ValueError, "causal_alignment must be one of"),
        ({"block_size": 0}, ValueError, "block_size must be a positive int"),
        ({"block_size": (4, 4, 4)}, ValueError, "block_size must be a positive int"),
        ({"key_lengths": torch.tensor([10])}, ValueError, "key_lengths must be from 0 to the 9 keys"),
    ],
)
def test_wrong_arguments_of_select(changed, error, words):
    with pytest.raises(error, match=words):
        select(**({"query": Q, "key": K, "tolerance": 0.1} | changed))


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("attn_mask", torch.zeros(5, 9)),
        ("window_size", (3, 0)),
        ("alibi_slopes", torch.ones(2)),
        ("relative_bias", torch.zeros(2, 17)),
        ("dropout_p", 0.1),
        ("block_mask", select(Q, K, tolerance=0.1).block_mask),
    ],
)
def test_what_a_tolerance_does_not_go_with(name, x):
    with pytest.raises(ValueError, match=f"tolerance must be None beside {name}"):
        expressive_attention(Q, K, K, tolerance=0.1, **{name: x})


def test_gradients_are_those_of_what_is_kept():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 3, 8), 1e-3 * torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 4)
    key[:, :, 150] = 5.0
    leaves = [x.requires_grad_() for x in (query, key, value)]
    found = torch.autograd.grad(expressive_attention(*leaves, tolerance=0.05).square().sum(), leaves)
    kept = slice(128, 256)
    parts = [query, key[:, :, kept], value[:, :, kept]]
    expected = torch.autograd.grad(expressive_attention(*parts).square().sum(), leaves)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
