"""The C kernels make nothing of numbers that a row does not see, whatever they are."""

import pytest
import torch

from expressive_attention import expressive_attention
from expressive_attention.backends.cpu import library
from tests.budget import fused, threads_of_torch

pytestmark = pytest.mark.skipif(library.MISSING is not None, reason=str(library.MISSING))

NUMBERS = [torch.nan, torch.inf, -torch.inf]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows and keys: decoding, one block, several blocks and parts.
SIZES = [(2, 40), (9, 21), (130, 700)]


@pytest.fixture(params=library.BUILDS)
def build(request):
    with fused(f"cpu {request.param}"), threads_of_torch(3):
        yield


def attend(inputs, upstream, mask=None, **options):
    """Output, normalizer and all gradients, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    bias = mask is not None and mask.is_floating_point()
    mask = mask.detach().clone().requires_grad_(bias) if mask is not None else None
    output, normalizer = expressive_attention(*leaves, mask, return_normalizer=True, backend="cpu", **options)
    wanted = [*leaves, mask] if bias else leaves
    gradients = torch.autograd.grad((output, normalizer), wanted, upstream)
    names = ("output", "normalizer", "query", "key", "value", "mask")
    return dict(zip(names, (output.detach(), normalizer.detach(), *gradients), strict=False))


def drawn(rows, keys, dtype, heads=2):
    torch.manual_seed(0)
    inputs = [torch.randn(1, h, n, 16).to(dtype) for h, n in ((heads, rows), (heads, keys), (heads, keys))]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return inputs, (torch.randn(1, heads, rows, 16).to(dtype), torch.randn(1, heads, rows, dtype=sums))


def assert_same(got, want):
    for name, x in want.items():
        rtol, atol = (1e-2, 1e-2) if x.dtype.itemsize == 2 else (2e-5, 1e-5)
        # Pairs of bfloat16 round the terms of a sum, and take no part where anything is not finite: numbers of 16 bits
        # differ by as much as a row has terms.
        unit = x.abs().amax(-1, keepdim=True).clamp(min=1) if x.dtype.itemsize == 2 else torch.ones_like(x)
        unit = unit.nan_to_num(1.0, 1.0)
        torch.testing.assert_close(got[name] / unit, x / unit, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "keys"), SIZES)
@pytest.mark.parametrize("kind", ["lengths", "causal", "window", "bool", "-inf", "lengths and bias"])
def test_hidden_keys_and_values(build, kind, rows, keys, dtype):
    for number in (*NUMBERS, torch.finfo(dtype).max, torch.finfo(dtype).min):
        check_hidden_keys_and_values(kind, rows, keys, dtype, number)


def check_hidden_keys_and_values(kind, rows, keys, dtype, number):
    inputs, upstream = drawn(rows, keys, dtype)
    seen, bias = keys // 2, torch.randn(rows, keys)
    hidden = torch.arange(keys) >= seen
    mask, options = None, {}
    if "lengths" in kind:
        options["key_lengths"] = torch.tensor([seen])
    if "bias" in kind:
        mask = bias.to(dtype).masked_fill(hidden, number)
    if kind == "-inf":
        mask = bias.masked_fill(hidden, -torch.inf)
    elif kind == "bool":
        mask = ~hidden.expand(rows, keys)
    elif kind == "causal":
        hidden = torch.arange(keys) >= rows
        options["is_causal"] = True
    elif kind == "window":
        hidden = torch.arange(keys) < keys - rows - 2
        options |= {"window_size": (2, -1), "causal_alignment": "lower_right"}
    want = attend(inputs, upstream, mask, **options)
    query, key, value = inputs
    key, value = (x.masked_fill(hidden[:, None], number) for x in (key, value))
    got = attend((query, key, value), upstream, mask, **options)
    assert_same(got, want)
    for name in ("key", "value"):
        assert got[name][:, :, hidden].count_nonzero() == 0
    if mask is not None and mask.is_floating_point():
        assert got["mask"][:, hidden].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "keys"), SIZES)
@pytest.mark.parametrize(("kind", "form"), [("bool", "squared"), ("-inf", "expressive")])
@pytest.mark.parametrize("where", ["query", "key", "value", "upstream"])
def test_rows_and_keys_that_do_not_see_one_another(build, where, kind, form, rows, keys, dtype):
    for number in NUMBERS:
        check_rows_and_keys(where, kind, form, rows, keys, dtype, number)


def check_rows_and_keys(where, kind, form, rows, keys, dtype, number):
    """The first rows see the first keys, the others the others, where a vector is not finite; one row sees nothing."""
    inputs, upstream = drawn(rows, keys, dtype)
    first, keep = torch.arange(rows) < rows // 2, torch.arange(keys) < keys // 3
    keep = first[:, None] == keep
    keep[0] = False
    mask = keep if kind == "bool" else torch.randn(rows, keys).masked_fill(~keep, -torch.inf)
    want = attend(inputs, upstream, mask, form=form)
    tensors = dict(zip(("query", "key", "value", "upstream"), (*inputs, upstream[0]), strict=True))
    changed = {name: x.clone() for name, x in tensors.items()}
    changed[where][:, :, -1] = number
    if where == "query":
        changed[where][:, :, 0] = number
    got = attend(
        [changed[name] for name in ("query", "key", "value")], (changed["upstream"], upstream[1]), mask, form=form
    )

    def clean(name, x):
        own = torch.arange(keys) < keys // 3 if name in ("key", "value") else first
        return torch.where(own if name == "normalizer" else own[:, None], x, 0)

    assert_same({name: clean(name, x) for name, x in got.items()}, {name: clean(name, x) for name, x in want.items()})
    for name in ("output", "normalizer", "query"):
        assert got[name][:, :, 0].count_nonzero() == 0
    if kind == "-inf":
        assert got["mask"][~keep].count_nonzero() == 0
    shows = {"query": "query", "key": "key", "value": "output", "upstream": "value"}[where]
    assert not got[shows][:, :, -1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
def test_a_key_with_score_0_leaves_its_weight_to_others(build, rows, dtype):
    """However much larger its bias is."""
    (query, key, value), upstream = drawn(rows, 300, dtype)
    key[:, :, 5] = 0
    bias = torch.randn(rows, 300)
    apart = [bias.masked_fill(torch.arange(300) == 5, b) for b in (1e4, -torch.inf)]
    got, want = (attend((query, key, value), upstream, mask.to(dtype)) for mask in apart)
    assert want["output"].abs().min() > 0
    assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("spread", [False, True])
def test_a_key_with_all_the_weight_leaves_no_gradient(build, rows, spread, dtype):
    """In grouped heads, too, where the forward pass of decoding sums scores in another order; and beside NaN."""
    torch.manual_seed(0)
    query = 1e-3 * torch.randn(2, 4, rows, 48, dtype=dtype)
    key, value = torch.randn(2, 2, 4, 600, 48, dtype=dtype).unbind(0)
    key, value = key[:, :2], value[:, :2]
    keep = torch.arange(600) == torch.randint(600, (rows, 1))
    upstream = torch.randn(2, 4, rows, 48, dtype=dtype), torch.zeros(2, 4, rows, dtype=dtype)
    mask = torch.where(keep, 0.0, -1e3).to(dtype) if spread else keep
    hidden = ~keep.any(0)
    for number in (0.0,) if spread else (0.0, torch.nan):
        inputs = query, key, value.masked_fill(hidden[:, None], number)
        got = attend(inputs, upstream, mask, enable_gqa=True)
        assert got["query"].count_nonzero() == 0
        assert got["key"].count_nonzero() == 0
        if spread:
            assert got["mask"].count_nonzero() == 0


@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0])
@pytest.mark.parametrize("kind", ["none", "bias", "causal"])
@pytest.mark.parametrize("rows", [2, 200])
def test_the_gradient_along_the_query_is_exact(build, kind, rows, size):
    """With head dimension 1 it is all there is of it."""
    torch.manual_seed(0)
    query, key, value = size * torch.randn(1, 2, rows, 1), torch.randn(1, 2, 500, 1), torch.randn(1, 2, 500, 8)
    mask = torch.randn(rows, 500) if kind == "bias" else None
    upstream = torch.randn(1, 2, rows, 8), torch.zeros(1, 2, rows)
    leaf = query.double().requires_grad_()
    options = {"is_causal": kind == "causal", "causal_alignment": "lower_right"}
    exact = expressive_attention(
        leaf, key.double(), value.double(), None if mask is None else mask.double(), backend="reference", **options
    )
    (want,) = torch.autograd.grad(exact, leaf, upstream[0].double())
    got = attend((query, key, value), upstream, mask, **options)["query"].double()
    assert (got - want).norm() <= 1e-5 * want.norm()
