"""The kernels in Triton: on a GPU where there is one, else under Triton's interpreter on the CPU."""

import itertools
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from expressive_attention import checks, expressive_attention, expressive_attention_varlen, sparse
from expressive_attention.backends import triton
from expressive_attention.call import Call, Upstream, Visibility
from tests.blocks import random_block_mask
from tests.budget import Case, assert_within_budget
from tests.packed import packed_problems
from tests.problems import problems
from tests.stand_ins import call_on, declined_by_func

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Only while the kernels are imported: whatever else uses Triton in this process is compiled, as always.
with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the reference to be deterministic
    from expressive_attention.backends.triton import decode, launch
    from expressive_attention.backends.triton.blocks import Blocks
    from expressive_attention.backends.triton.tiles import Tile
    from tests.backends import interpreter

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # the largest of NaN alone
]


@pytest.fixture
def integers_checked():
    """Integers are checked for overflow in a test that asks for this; others have small ones alone."""


@pytest.fixture(autouse=True)
def _quick(request):
    if DEVICE == "cuda":
        yield
        return
    with interpreter.quick(checks_overflow="integers_checked" in request.fixturenames):
        yield


HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


@contextmanager
def tiles(forward, backward):
    """Kernels with tiles of these sizes ``(rows, keys)``, inside of the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_forward_tile", lambda inputs: Tile(*forward, 4, 1))
        patch.setattr(launch.tuning, "choose", lambda *problem: Tile(*backward, 4, 1))
        yield


@contextmanager
def split_keys(shortest=16):
    """Decoding in parts of at least `shortest` keys, inside of the block; the number of parts of every call."""
    parts = []

    def count(kernel, grid, tile, arguments, **more):
        if kernel is decode.merge_kernel:
            parts.append(more["parts"])
        run(kernel, grid, tile, arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        run = launch._run
        patch.setattr(decode, "_SHORTEST", shortest)
        patch.setattr(launch, "_processors", lambda device: 16)
        patch.setattr(launch, "_run", count)
        yield parts


def on_device(case):
    moved = {name: getattr(case, name).to(DEVICE) for name in ("query", "key", "value")}
    mask = None if case.mask is None else case.mask.to(DEVICE)
    options = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor | BlockMask) else x for name, x in case.settings.items()
    }
    return replace(case, **moved, mask=mask, settings=options)


def judge(*arguments, **more):
    assert_within_budget(on_device(Case(*arguments, **more)), "triton")


def tensors(dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


SIZES = st.sampled_from([(16, 16), (16, 32), (32, 16)])


@pytest.mark.parametrize("drops", [False, True])
def test_random_problems_within_budget(drops):
    """Up to two batches and key heads: the interpreter takes milliseconds for each tile."""

    @settings(
        max_examples=14 if drops else 24, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(problems(largest=16, drops=drops, batches=2, kv_heads=2), SIZES, SIZES)
    def check(case, forward, backward):
        assume(case.query.dtype != torch.float64)
        with tiles(forward, backward):
            assert_within_budget(on_device(case), "triton")

    check()


@pytest.mark.slow
@settings(max_examples=180, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems(largest=16) | problems(largest=16, drops=True), SIZES, SIZES)
def test_random_problems_of_more_heads_within_budget(case, forward, backward):
    assume(case.query.dtype != torch.float64)
    with tiles(forward, backward):
        assert_within_budget(on_device(case), "triton")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(packed_problems(largest=14), SIZES, SIZES)
def test_random_packed_sequences_within_budget(packed, forward, backward):
    assume(packed.cases[0].query.dtype != torch.float64)
    with tiles(forward, backward):
        packed.check("triton")


@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(largest=40), SIZES, SIZES)
def test_many_random_problems_within_budget(case, forward, backward):
    assume(case.query.dtype != torch.float64)
    with tiles(forward, backward):
        assert_within_budget(on_device(case), "triton")


@pytest.mark.parametrize("keys", [16, 32, 64])
def test_dropout_has_the_pattern_of_every_backend(keys):
    """Values are one-hot: the output is the weights, the gradient of the values their sum over the rows."""
    q, k = tensors(torch.float32, (2, 4, 12, 8), (2, 2, 140, 8))
    v = torch.eye(140, device=DEVICE).expand(2, 2, 140, 140).contiguous().requires_grad_()
    results = {}
    with tiles((16, keys), (32, keys)):
        for backend in ("reference", "triton"):
            torch.manual_seed(5)
            output = expressive_attention(q, k, v, None, 0.4, enable_gqa=True, backend=backend)
            results[backend] = output.detach(), *torch.autograd.grad(output.sum(), v)
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want)
        assert torch.equal(got == 0, want == 0)
    assert 0.55 < (results["triton"][0] != 0).double().mean() < 0.65


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "bias", "slopes"])
def test_dropout_within_budget(kind, dtype):
    q, k, v = tensors(dtype, (1, 4, 20, 16), (1, 2, 70, 16), (1, 2, 70, 8))
    mask = torch.randn(1, 4, 20, 70) if kind == "bias" else None
    options = {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 3.0])} if kind == "slopes" else {}
    for p in (0.3, 1.0) if kind == "bias" else (0.3,):
        judge(q, k, v, mask, {**options, "dropout_p": p, "enable_gqa": True, "causal_alignment": "lower_right"})


def test_dropout_of_decoding_and_of_packed_sequences():
    (q,) = tensors(torch.float32, (1, 4, 2, 20))
    k, v = tensors(torch.float32, (1, 2, 300, 20), (1, 2, 300, 12), seed=1)
    with split_keys(64) as parts:
        judge(q, k, v, None, {"dropout_p": 0.5, "enable_gqa": True})
    assert parts == [3]
    x = tensors(torch.float32, (60, 2, 8))[0].requires_grad_()
    starts, results = torch.tensor([0, 25, 60], device=DEVICE), {}
    for backend in ("reference", "triton"):
        torch.manual_seed(8)
        y = expressive_attention_varlen(x, x, x, starts, starts, 35, 35, 0.5, causal=True, backend=backend)
        results[backend] = y.detach(), *torch.autograd.grad(y.square().sum(), x)
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["full", "causal", "bool", "bias"])
def test_the_tiles_of_users_within_budget(dtype, kind):
    q, k, v = tensors(dtype, (1, 2, 90, 33), (1, 1, 110, 33), (1, 1, 110, 17))
    mask = {"bool": torch.rand(90, 110) < 0.6, "bias": torch.randn(2, 90, 110)}.get(kind)
    options = {"is_causal": kind != "full", "causal_alignment": "lower_right", "enable_gqa": True}
    judge(q, k, v, mask, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("e", "ev"), [(1, 1), (64, 64), (65, 128), (200, 16), (16, 256)])
def test_head_dimensions_within_budget(dtype, e, ev):
    q, k, v = tensors(dtype, (1, 1, 20, e), (1, 1, 35, e), (1, 1, 35, ev))
    judge(q, k, v, None, {"is_causal": True})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("bias", [False, True])
def test_decoding_adds_the_parts(dtype, form, bias):
    """Few queries against a cache that lies in memory as (B, S, H, E)."""
    (q,) = tensors(dtype, (1, 4, 2, 20))
    k, v = (x.transpose(1, 2) for x in tensors(dtype, (1, 99, 2, 20), (1, 99, 2, 12), seed=1))
    options = {"is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True, "form": form}
    with split_keys() as parts:
        judge(q, k, v, torch.randn(1, 1, 1, 99) if bias else None, options)
    assert parts == [4]


@pytest.mark.parametrize("lengths", [[0, 99], [60, 33]])
@pytest.mark.parametrize("slopes", [False, True])
def test_decoding_against_a_cache_that_is_filled_in_part(lengths, slopes):
    """With a window, which hides whole parts of it."""
    q, k, v = tensors(torch.bfloat16, (2, 4, 2, 20), (2, 2, 99, 20), (2, 2, 99, 12))
    options = {"is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True, "window_size": (40, -1)}
    options["key_lengths"] = torch.tensor(lengths)
    options |= {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 3.0])} if slopes else {}
    with split_keys() as parts:
        judge(q, k, v, None, options)
    assert parts == [4]


@pytest.mark.parametrize("capability", [0, 80, 86, 90, 120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_are_what_was_measured_or_else_the_default(dtype, capability, monkeypatch):
    name = str(dtype).removeprefix("torch.")
    table = {(90, "query", name, 64): Tile(16, 128, 8, 5)}
    defaults = {kernel: launch.tuning.choose(kernel, dtype, 64, capability) for kernel in launch.tuning.KERNELS}
    monkeypatch.setattr(launch.tuning, "measured", lambda: table)
    found = {kernel: launch.tuning.choose(kernel, dtype, 64, capability) for kernel in launch.tuning.KERNELS}
    assert found == (defaults | {"query": Tile(16, 128, 8, 5)} if capability == 90 else defaults)
    assert launch.tuning.choose("query", dtype, 128, capability) != Tile(16, 128, 8, 5)


def test_the_table_of_tiles_is_read_from_its_file(tmp_path, monkeypatch):
    (tmp_path / "tuned.json").write_text('{"90": {"forward": {"bfloat16": {"64": [128, 64, 4, 3]}}}}')
    monkeypatch.setattr(launch.tuning, "__file__", str(tmp_path / "tuning.py"))
    launch.tuning.measured.cache_clear()
    assert launch.tuning.measured() == {(90, "forward", "bfloat16", 64): Tile(128, 64, 4, 3)}
    launch.tuning.measured.cache_clear()


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-8, 0.1, -0.5, 2.0**8, 2.0**20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_any_size_within_budget(dtype, scale):
    """Between 2^-8 and 2^8 the weight is s^2 / (1 / scale^2 + s^2) of the product s, outside of it f(scale s)."""
    q, k, v = tensors(dtype, *[(1, 1, 30, 16)] * 3, seed=3)
    size = min(max(1 / abs(scale), 2.0**-6), 2.0**6) if dtype == torch.float16 else 1 / abs(scale)
    judge((q * size).to(dtype), k, v, torch.randn(30, 30), {"scale": scale, "is_causal": True})


@pytest.mark.parametrize("heads", [3, 17])
def test_few_programs_find_all_rows_to_compute_once_more(heads, monkeypatch):
    """Heads with lost rows among others without, and one with hidden NaN; more tiles than programs that look."""
    monkeypatch.setattr(launch, "_FEW", 2)
    q, k, v = tensors(torch.float32, *[(1, heads, 24, 8)] * 3, seed=4)
    q[:, 1::2, ::3] *= 1e-18
    mask = torch.ones(24, 24, dtype=torch.bool, device=DEVICE).tril()
    mask[:, -1] = False
    hidden = v.clone()
    hidden[:, 2, -1] = torch.nan
    results = []
    for dtype, values, backend in ((torch.float32, hidden, "triton"), (torch.float64, v, "reference")):
        with tiles((16, 16), (16, 16)):
            monkeypatch.setattr(launch.tuning, "wide_tile", lambda width: Tile(16, 16, 4, 1))
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, values)]
            output = expressive_attention(*leaves, mask, backend=backend)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        for head in range(heads):
            x, y = got[:, head].double(), want[:, head]
            assert (x - y).abs().max() <= 2e-5 * y.abs().max()


@pytest.mark.parametrize("programs", [1, 3, 16, 1000])
@pytest.mark.parametrize("keys", [0, 1, 512, 1023, 1025, 100_000])
def test_parts_cover_the_keys(programs, keys):
    part = decode.part_of_keys(programs, keys, 128)
    assert part == keys or (part % decode._SHORTEST == 0 and 0 < part < keys)
    assert keys == part or -(-keys // part) * programs <= 256
    assert programs < 256 or part == keys


# Half of all shapes, among which each three dimensions take all of their sizes.
@pytest.mark.parametrize(
    "shape", [s for s in itertools.product((1, 2), (1, 2), (1, 19), (1, 21)) if s.count(1) % 2 == 0]
)
def test_gradients_of_masks_of_all_shapes(shape):
    q, k, v = tensors(torch.bfloat16, (2, 2, 19, 8), (2, 1, 21, 8), (2, 1, 21, 8))
    with tiles((32, 32), (16, 16)):
        judge(q, k, v, torch.randn(shape), {"is_causal": True, "enable_gqa": True})


@pytest.mark.parametrize(("heads", "dtype"), [(2, torch.float32), (4, torch.bfloat16)])
@pytest.mark.parametrize("window", [(-1, -1), (20, 12), (-1, 0)])
def test_slopes_in_tiles_of_all_kinds(window, heads, dtype):
    """Tiles before the places of all of their rows, among them and after them; heads that share keys or do not."""
    q, k, v = tensors(dtype, (1, heads, 40, 16), (1, 2, 55, 16), (1, 2, 55, 16))
    options = {"window_size": window, "alibi_slopes": torch.tensor([0.01, 0.2, 1.0, 40.0][:heads]), "enable_gqa": True}
    with tiles((16, 16), (16, 16)):
        judge(q, k, v, None, {**options, "causal_alignment": "lower_right"})


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float16),
        ({"causal": True, "window_size": (9, 2)}, torch.float32),
        ({"slopes": True}, torch.float16),
        ({"used": True}, torch.float32),
    ],
)
def test_packed_sequences_have_the_bits_of_each_alone(options, dtype):
    lengths = [(40, 33), (0, 7), (1, 50), (18, 0), (17, 17)]
    cu_q, cu_k = (torch.tensor([0, *(pair[i] for pair in lengths)], device=DEVICE).cumsum(0) for i in (0, 1))
    q, k, v, do = (x.requires_grad_() for x in tensors(dtype, (80, 2, 16), (110, 1, 16), (110, 1, 8), (80, 2, 8)))
    own = {name: x for name, x in options.items() if name == "window_size"}
    causal, slopes, used = options.get("causal", False), None, None
    if options.get("slopes"):
        slopes = torch.linspace(0.1, 2, 10, device=DEVICE).view(5, 2)
    if options.get("used"):
        used = torch.tensor([20, 7, 60, 0, 3], device=DEVICE, dtype=torch.int32)
    with tiles((16, 32), (32, 16)):
        output, normalizer = expressive_attention_varlen(
            q, k, v, cu_q, cu_k, 40, 50, causal=causal, alibi_slopes=slopes, seqused_k=used, return_normalizer=True,
            backend="triton", **own,
        )  # fmt: skip
        gradients = torch.autograd.grad(output, (q, k, v), do)
        for b, (length, keys) in enumerate(lengths):
            rows, columns = slice(cu_q[b], cu_q[b] + length), slice(cu_k[b], cu_k[b] + keys)
            leaves = [x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, columns), (v, columns))]
            alone, total = expressive_attention(
                *leaves, is_causal=causal, causal_alignment="lower_right", enable_gqa=True, return_normalizer=True,
                alibi_slopes=None if slopes is None else slopes[b],
                key_lengths=None if used is None else used[b : b + 1].clamp(max=keys), backend="triton", **own,
            )  # fmt: skip
            wanted = torch.autograd.grad(alone, leaves, do[rows].transpose(0, 1)[None])
            assert torch.equal(output[rows], alone[0].transpose(0, 1))
            assert torch.equal(normalizer[:, rows], total[0])
            for whole, part, want in zip(gradients, (rows, columns, columns), wanted, strict=True):
                assert torch.equal(whole[part], want[0].transpose(0, 1))
    beside = [whole[end:] for whole, end in zip((output, *gradients), (76, 76, 107, 107), strict=True)]
    assert all(x.numel() and x.abs().max() == 0 for x in beside)


@pytest.mark.parametrize("right", [13, 14, 15, 16])
def test_the_band_that_a_row_sees_ends_anywhere_in_a_tile_of_keys(right):
    q, k, v = tensors(torch.float32, (1, 1, 18, 8), (1, 1, 40, 8), (1, 1, 40, 8))
    with tiles((16, 16), (16, 16)):
        judge(q, k, v, None, {"window_size": (16 - right, right)})


@pytest.mark.usefixtures("integers_checked")
@pytest.mark.parametrize("size", [2**28, 2**30 - 1, 2**31 - 1, 2**62])
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
def test_windows_that_are_wider_than_everything(size, alignment):
    q, k, v = tensors(torch.float32, (1, 4, 20, 8), (1, 2, 50, 8), (1, 2, 50, 8))
    for window in ((size, -1), (-1, size)):
        judge(q, k, v, None, {"enable_gqa": True, "causal_alignment": alignment, "window_size": window})


def test_lengths_and_starts_lie_in_memory_in_any_way():
    q, k, v = tensors(torch.float32, (2, 2, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    for lengths in (
        torch.tensor(4),
        torch.tensor([4]),
        torch.tensor([4, 9, 7, 0])[::2],
        torch.tensor([[3, 0], [8, 0]])[:, 0],
    ):
        judge(q, k, v, None, {"key_lengths": lengths.to(DEVICE).expand(2)})
        got = expressive_attention(q, k, v, key_lengths=lengths.to(DEVICE), backend="triton")
        torch.testing.assert_close(
            got, expressive_attention(q, k, v, key_lengths=lengths.to(DEVICE), backend="reference")
        )
    x = tensors(torch.float32, (9, 2, 8))[0].requires_grad_()
    starts = torch.tensor([0, -1, 4, -1, 9, -1], device=DEVICE)[::2]
    outputs = [
        expressive_attention_varlen(x, x, x, s, s, 5, 5, backend="triton") for s in (starts, starts.contiguous())
    ]
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in outputs))


@pytest.mark.usefixtures("integers_checked")
@pytest.mark.parametrize(
    ("starts", "longest"),
    [([-8, 10, 30], 30), ([0, 40, 30], 40), ([0, 2**40, 30], 30), ([0, 10, 30], 7), ([5, 3, 2], 9)],
)
def test_starts_that_nobody_has_looked_at_touch_nothing_else(starts, longest, monkeypatch):
    """As on a GPU, where to read them is to wait."""
    monkeypatch.setattr(checks, "_is_readable", lambda x: False)
    room = torch.full((90, 2, 8), torch.nan, device=DEVICE)
    x = room[30:60].copy_(tensors(torch.float32, (30, 2, 8))[0]).requires_grad_()
    starts = torch.tensor(starts, device=DEVICE)
    output = expressive_attention_varlen(x, x, x, starts, starts, longest, longest, causal=True, backend="triton")
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    assert output.isfinite().all()
    assert gradient.isfinite().all()
    assert room[:30].isnan().all()
    assert room[60:].isnan().all()


@pytest.mark.parametrize("kind", ["slopes", "window", "lengths"])
def test_lost_rows_of_patterns(kind):
    """Rows that are computed once more see the same keys, at the same distance."""
    q, k, v = tensors(torch.float32, (2, 4, 6, 8), (2, 2, 20, 8), (2, 2, 20, 5), seed=4)
    q[0, 1:] *= torch.tensor([1e-18, 1.0, 1e18, 0.0, 1e-9, 1e9], device=DEVICE)[:, None]
    options = {
        "slopes": {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 3.0])},
        "window": {"window_size": (5, 1)},
        "lengths": {"key_lengths": torch.tensor([7, 20]), "is_causal": True},
    }[kind]
    with tiles((16, 16), (16, 16)):
        judge(
            q, k, v, None, {**options, "enable_gqa": True, "causal_alignment": "lower_right"}, through_normalizer=False
        )


@pytest.mark.parametrize("keys", [5, 35])
def test_steep_slopes_far_behind_the_last_key(keys):
    """Some keys of the last tile do not exist: how far the rows are from those must not count."""
    q, k, v = tensors(torch.float32, (1, 2, 60, 16), (1, 2, keys, 16), (1, 2, keys, 16))
    with tiles((16, 16), (16, 16)):
        judge(q, k, v, None, {"alibi_slopes": torch.tensor([2.0, 30.0])}, through_normalizer=False)


@pytest.mark.parametrize("exponent", [-18, -12, -6, 6, 12, 18])
@pytest.mark.parametrize("form", ["expressive", "squared"])
def test_float32_scores_of_any_size(exponent, form):
    q, k, v = tensors(torch.float32, *[(1, 2, 8, 16)] * 3, seed=1)
    judge(q * 10.0**exponent, k, v * 1e-3, None, {"form": form}, through_normalizer=False)


@pytest.mark.parametrize("exponent", [-38, -30, -20, -10, 10, 20, 30, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_of_any_size(exponent, dtype):
    q, k, v = tensors(dtype, *[(1, 2, 8, 16)] * 3, seed=2)
    factor = torch.tensor(10.0**exponent).to(dtype)
    got = expressive_attention(q * factor, k * factor, v, backend="triton")
    exact = expressive_attention((q * factor).double(), (k * factor).double(), v.double(), backend="reference")
    assert (got.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("exponent", [-7, -5, -3, 4])
@pytest.mark.parametrize("form", ["expressive", "squared"])
def test_float16_to_its_ends(exponent, form):
    q, k, v = tensors(torch.float32, *[(1, 2, 8, 16)] * 3, seed=3)
    q, k = ((x * 10.0**exponent).half() for x in (q, k))
    assert q.isfinite().all()
    got = expressive_attention(q, k, v.half(), form=form, backend="triton")
    exact = expressive_attention(q.double(), k.double(), v.half().double(), form=form, backend="reference")
    assert (got.double() - exact).abs().max() <= 2.0**-10 * exact.abs().max()


def test_float16_gradients_of_small_scores_and_large_upstreams():
    """The gradient that a loss scaler sends: f'(z) / N is 2 / z here, and leaves float16's range."""
    q, k, v = tensors(torch.float32, *[(1, 2, 40, 16)] * 3, seed=4)
    q, k, v = ((x * size).half().requires_grad_() for x, size in ((q, 1e-2), (k, 1e-1), (v, 1)))
    do = 1000 * torch.randn(v.shape).half().to(DEVICE)
    got = torch.autograd.grad(expressive_attention(q, k, v, backend="triton"), v, do)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(expressive_attention(*exact, backend="reference"), exact[2], do.double())
    assert (got[0] - want[0]).abs().max() <= 2.0**-9 * want[0].abs().max()
    judge(*(x.detach() for x in (q, k, v)))


@pytest.mark.parametrize(
    ("kind", "dtype", "form"),
    [  # any two of their values meet
        ("none", torch.float32, "expressive"),
        ("none", torch.bfloat16, "squared"),
        ("bool", torch.float32, "squared"),
        ("bool", torch.bfloat16, "expressive"),
        ("bias", torch.float32, "expressive"),
        ("bias", torch.bfloat16, "squared"),
    ],
)
def test_rows_of_very_different_size_beside_padding(kind, dtype, form):
    """Most of these rows are lost to float32, in one head and not in another."""
    q, k, v = tensors(torch.float32, (1, 4, 6, 8), (1, 2, 20, 8), (1, 2, 20, 5), seed=4)
    q[0, 1:] *= torch.tensor([1e-18, 1.0, 1e18, 0.0, 1e-9, 1e9], device=DEVICE)[:, None]
    keep = torch.ones(6, 20, dtype=torch.bool)
    keep[:, 14:] = False
    keep[1] = False
    mask = {"none": None, "bool": keep, "bias": torch.randn(1, 1, 6, 20).masked_fill(~keep, -torch.inf)}[kind]
    options = {"is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True, "form": form}
    with tiles((16, 16), (16, 16)):
        judge(q.to(dtype), k.to(dtype), v.to(dtype), mask, options, through_normalizer=False)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_and_inf_show_in_the_rows_that_see_them(where, number):
    inputs = dict(zip(("query", "key", "value"), tensors(torch.float32, *[(1, 1, 5, 4)] * 3, seed=5), strict=True))
    inputs[where][0, 0, 2, 1] = number
    results = [expressive_attention(**inputs, is_causal=True, backend=b) for b in ("reference", "triton")]
    broken = [~x.isfinite() for x in results]
    assert torch.equal(*broken)
    torch.testing.assert_close(*(x[~broken[0]] for x in results))


def one_key_each(kind, dtype):
    """Problems of which each row has all of its weight on one of 40 keys, or no key: inputs, mask and options."""
    q, k, v = tensors(dtype, (1, 4, 20, 16), (1, 2, 40, 16), (1, 2, 40, 16), seed=8)
    q = q * 1e-3
    keep = torch.arange(40) == torch.randint(40, (20, 1), generator=torch.Generator().manual_seed(0))
    mask, options = None, {}
    if kind == "bool":
        mask = keep
    elif kind == "bias":
        mask = torch.randn(20, 40).masked_fill(~keep, torch.finfo(torch.float32).min)
    elif kind == "slopes":
        options = {"alibi_slopes": torch.full((4,), 120.0, device=DEVICE)}
    elif kind == "length":
        q, options = q[:, :, :1], {"key_lengths": torch.tensor([1], device=DEVICE)}
    elif kind == "length 0":
        options = {"key_lengths": torch.tensor([0], device=DEVICE)}
    elif kind == "causal":
        options = {"is_causal": True, "window_size": (0, -1)}
    else:  # scores of 0
        k = k * (torch.arange(40, device=DEVICE) == 33)[:, None]
    return q, k, v, mask if mask is None else mask.to(DEVICE), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "bias", "slopes", "length", "length 0", "causal", "scores"])
def test_a_row_with_all_weight_on_one_key_has_no_gradient(kind, dtype):
    """With 16 bits, what is seen of a key whose score is 0 is no more than the rounding of the output."""
    *inputs, mask, options = one_key_each(kind, dtype)
    leaves = [x.requires_grad_() for x in inputs]
    if kind == "bias":
        leaves.append(mask.requires_grad_())
    output = expressive_attention(*inputs, mask, enable_gqa=True, backend="triton", **options)
    dq, dk, _, *dmask = torch.autograd.grad(output.float().square().sum(), leaves)
    assert kind == "length 0" or output.abs().max() > 0
    if kind != "scores" or dtype == torch.float32:
        assert all(x.abs().max() == 0 for x in (dq, dk, *dmask))
    judge(*(x.detach() for x in inputs), None if mask is None else mask.detach(), {**options, "enable_gqa": True})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias", "slopes"])
def test_ordinary_rows_are_computed_once(kind, dtype, monkeypatch):
    q, k, v = tensors(dtype, (1, 4, 20, 16), (1, 2, 40, 16), (1, 2, 40, 16))
    lost = []
    run = launch._run

    def record(kernel, grid, tile, arguments, **more):
        run(kernel, grid, tile, arguments, **more)
        if arguments.get("WIDE"):
            lost.append(arguments["lost"].clone())

    monkeypatch.setattr(launch, "_run", record)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = {"bool": torch.rand(20, 40) < 0.6, "bias": torch.randn(20, 40)}.get(kind)
    options = {"is_causal": kind != "none", "enable_gqa": True, "backend": "triton"}
    options |= {"alibi_slopes": torch.full((4,), 0.5, device=DEVICE)} if kind == "slopes" else {}
    output = expressive_attention(*leaves, None if mask is None else mask.to(DEVICE), **options)
    torch.autograd.grad(output.float().square().sum(), leaves)
    assert len(lost) == 3
    assert not any(x.any() for x in lost)


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("width", "size"), [(1, 1e-3), (1, 1e-5), (1, 1.0), (16, 1e-3), (16, 1.0), (16, 300.0)])
def test_the_part_of_dq_along_q(width, size, biased, form):
    """It is exact to about the last digit of dq, though the terms that add up to dq leave z^-2 of their digits."""
    q, k, v, do = tensors(torch.float32, (1, 2, 20, width), (1, 2, 35, width), (1, 2, 35, 9), (1, 2, 20, 9), seed=3)
    q[:, :, 3] = 0.0
    mask = torch.randn(20, 35).to(DEVICE) if biased else None

    def along(dtype, backend):
        query = (q * size).to(dtype).requires_grad_()
        output, normalizer = expressive_attention(
            query, k.to(dtype), v.to(dtype), None if mask is None else mask.to(dtype), form=form,
            return_normalizer=True, backend=backend,
        )  # fmt: skip
        upstream = (do.to(dtype), torch.full_like(normalizer, 1.0 if biased else 0.0))
        (dq,) = torch.autograd.grad((output, normalizer), query, upstream)
        return (query.double() * dq.double()).sum(-1), query.double().norm(dim=-1) * dq.double().norm(dim=-1)

    (got, _), (want, scale) = along(torch.float32, "triton"), along(torch.float64, "reference")
    assert got.isfinite().all()
    # The judge itself loses digits.
    bound = 8 * torch.finfo(torch.float32).eps + torch.finfo(torch.float64).eps * 100 / min(size, 1.0) ** 2
    assert (got - want).abs().max() <= bound * scale.max() + 1e-12


@pytest.mark.parametrize(("form", "dtype"), [("expressive", torch.float32), ("squared", torch.bfloat16)])
@pytest.mark.parametrize(("best", "others"), [(0.0, -200.0), (100.0, 0.0), (3e38, -3e38), (20.0, -60.0)])
def test_a_key_of_high_bias_whose_score_is_0_leaves_the_weight_to_the_others(best, others, form, dtype):
    q, k, v = tensors(dtype, (1, 2, 20, 16), (1, 1, 35, 16), (1, 1, 35, 9))
    k[:, :, 7] = 0.0
    mask = torch.full((20, 35), others).to(DEVICE)
    if abs(others) < 1e4:
        mask += torch.randn(20, 35, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask[::2, 7] = best
    options = {"enable_gqa": True, "form": form}
    judge(q, k, v, mask, options, through_normalizer=abs(others) < 100 and best < 88)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output, normalizer = expressive_attention(*leaves, mask, backend="triton", return_normalizer=True, **options)
    without = mask.double()
    without[:, 7] = -torch.inf
    exact, total = expressive_attention(*(x.double() for x in leaves), without, return_normalizer=True, **options)
    eps = torch.finfo(dtype).eps
    assert (output.double() - exact).abs().max() <= 8 * eps * exact.abs().max()
    if abs(others) < 80:
        torch.testing.assert_close(normalizer.double(), total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("zero", ["query", "key"])
def test_rows_of_zero_scores_have_no_normalizer_whatever_their_biases(zero):
    q, k, v = tensors(torch.float32, (1, 2, 6, 8), (1, 1, 9, 8), (1, 1, 9, 5))
    (q if zero == "query" else k).zero_()
    results = expressive_attention(
        q, k, v, torch.full((9,), 1000.0, device=DEVICE), enable_gqa=True, return_normalizer=True, backend="triton"
    )
    assert all(x.eq(0).all() for x in results)


def test_a_key_with_score_zero_takes_no_digits_from_smaller_biases():
    q, k, v = tensors(torch.float32, (1, 1, 300, 1), (1, 1, 2, 1), (1, 1, 2, 1))
    k[:, :, 0] = 0.0
    (bias,) = tensors(torch.float32, (300, 2), seed=1)
    bias += torch.tensor([34.0, 8.0], device=DEVICE)
    case = Case(q, k, v, bias, through_normalizer=False)
    got, exact = case.results("triton")["normalizer"], case.results("reference", torch.float64)["normalizer"]
    torch.testing.assert_close(got, exact, rtol=6 * torch.finfo(torch.float32).eps, atol=0)
    judge(q, k, v, bias, through_normalizer=False)


@pytest.mark.parametrize("score", [1e-18, 1e-12])
def test_biases_that_make_up_for_tiny_scores(score):
    """No weight is beyond float32 before both of its factors are known."""
    q, k, v = tensors(torch.float32, (1, 1, 20, 16), (1, 1, 35, 16), (1, 1, 35, 9))
    k[:, :, ::3] *= score
    bias = torch.full((35,), -60.0)
    bias[::3] = 40.0
    judge(q, k, v, bias, through_normalizer=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "bool", "bias"])
def test_nothing_is_read_beside_the_tensors(dtype, kind):
    """Every tensor lies in memory that is not a number, between its rows too."""

    def hidden(x):
        *leading, rows, width = x.shape
        # True is what a mask should not be read as; its neighbors are True everywhere.
        room = torch.full((*leading, rows + 2, width + 3), True if x.dtype == torch.bool else torch.nan, dtype=x.dtype)
        view = room.to(DEVICE)[..., 1 : 1 + rows, 2 : 2 + width]
        return view.copy_(x)

    q, k, v = tensors(dtype, (2, 4, 21, 9), (2, 2, 19, 9), (2, 2, 19, 5), seed=6)
    do, bias = tensors(torch.float32, (2, 4, 21, 5), (2, 4, 21, 19), seed=7)
    mask = {"none": None, "bool": bias > 0, "bias": bias}[kind]

    def run(change):
        leaves = [change(x).requires_grad_() for x in (q, k, v)]
        given = None if mask is None else change(mask)
        if kind == "bias":
            leaves.append(given.requires_grad_())
        output, normalizer = expressive_attention(
            *leaves[:3], given, enable_gqa=True, return_normalizer=True, backend="triton"
        )
        upstream = (change(do.to(dtype)), torch.ones_like(normalizer))
        return [output, normalizer, *torch.autograd.grad((output, normalizer), leaves, upstream)]

    for got, want in zip(run(hidden), run(torch.clone), strict=True):
        assert want.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.usefixtures("integers_checked")
def test_tensors_beyond_32_bits(tmp_path):
    """Offsets of keys and of heads above 2^31 elements, in a file that is nearly all holes."""
    if DEVICE == "cuda":
        room = torch.empty(3 * 2**31, dtype=torch.float16, device=DEVICE)
    else:
        room = torch.from_file(str(tmp_path / "holes"), shared=True, size=3 * 2**31, dtype=torch.float16)
    small = tensors(torch.float16, (1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8), seed=9)
    step = 2**31 // 2 + 8
    far = [
        room.as_strided(x.shape, strides, offset).copy_(x)
        for x, strides, offset in zip(
            small, [(1, step, 8, 1), (1, 8, step, 1), (1, 2 * step, 8, 1)], [0, 1024, 2048], strict=True
        )
    ]
    results = []
    for inputs in (small, far):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = expressive_attention(*leaves, is_causal=True, backend="triton")
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("allowed", "precision"), [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")])
def test_products_are_as_exact_as_torch_is_told(allowed, precision, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: allowed)
    found = {}
    run = launch._run

    def record(kernel, grid, tile, arguments, **more):
        found.setdefault(arguments["query"].dtype, set()).add({**arguments, **more}["PRECISION"])
        run(kernel, grid, tile, arguments, **more)

    monkeypatch.setattr(launch, "_run", record)
    for dtype in (torch.float32, torch.bfloat16):
        x = tensors(dtype, (1, 1, 20, 16))[0].requires_grad_()
        expressive_attention(x, x, x, backend="triton").float().square().sum().backward()
    assert found == {torch.float32: {precision}, torch.bfloat16: {"tf32"}}


def test_same_bits_twice():
    q, k, v = (x.requires_grad_() for x in tensors(torch.float32, *[(2, 2, 40, 8)] * 3, seed=6))
    (bias,) = (x.requires_grad_() for x in tensors(torch.float32, (2, 40, 40), seed=7))

    def run():
        y = expressive_attention(q, k, v, bias, is_causal=True, backend="triton")
        return [y, *torch.autograd.grad(y.square().sum(), (q, k, v, bias))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# ---- blocks of keys ----


def blocks(heads, rows, keys, size, masked=True):
    return random_block_mask(1, heads, rows, keys, size, torch.Generator().manual_seed(rows + keys), masked)


@pytest.mark.parametrize(
    ("size", "options", "dtype"),
    [
        ((16, 32), {"is_causal": True, "causal_alignment": "lower_right"}, torch.float32),
        ((24, 48), {"window_size": (20, 10)}, torch.bfloat16),
        ((32, 32), {"dropout_p": 0.4}, torch.float16),
        ((5, 16), {"key_lengths": torch.tensor([40]), "form": "squared"}, torch.float32),
    ],
)
def test_blocks_of_heads_that_share_keys_within_budget(size, options, dtype):
    """Several tiles in a block, blocks that are no multiple of a tile, and queries of several blocks in a tile."""
    q, k, v = tensors(dtype, (1, 2, 33, 8), (1, 1, 60, 8), (1, 1, 60, 8))
    with tiles((32, 32), (16, 16)):
        judge(q, k, v, None, {**options, "block_mask": blocks(2, 33, 60, size), "enable_gqa": True})


def test_blocks_beside_a_mask_of_padding():
    q, k, v = tensors(torch.float32, (2, 1, 12, 8), (2, 1, 30, 8), (2, 1, 30, 8))
    padding = torch.arange(30) < torch.tensor([30, 20]).view(2, 1, 1, 1)
    judge(q, k, v, padding, {"block_mask": blocks(1, 12, 30, (16, 16), masked=False)})


@pytest.mark.parametrize(
    ("keys", "more", "reason"),
    [
        (48, {}, None),
        (24, {}, "blocks must have a multiple of 16 keys, got 24"),
        (16, {"slopes": torch.ones(1, 1)}, "blocks of keys beside a bias must be in a mask"),
    ],
)
def test_it_says_which_blocks_it_declines(keys, more, reason):
    listed = torch.ones(1, 1, 1, 1, dtype=torch.int32)
    call = call_on("cuda").but(visibility=Visibility(listed=listed, block_rows=3, block_keys=keys, **more))
    assert triton.declines(call) == reason


def test_decoding_divides_what_is_listed():
    """Heads with lists of different lengths; the parts of a head are as long as each other."""
    q, k, v = tensors(torch.float32, (1, 4, 1, 8), (1, 2, 99, 8), (1, 2, 99, 8))
    with split_keys() as parts:
        judge(q, k, v, None, {"block_mask": blocks(4, 1, 99, (16, 16)), "enable_gqa": True})
    assert parts == [4]


def test_blocks_that_are_not_listed_are_not_read(monkeypatch):
    """Nothing is computed once more here: NaN that is read would stay in the results."""
    monkeypatch.setattr(launch._Inputs, "run_again", lambda *given, **more: None)
    listed = torch.tensor([[1, 0, 0], [0, 0, 2], [0, 0, 0], [3, 0, 1]], dtype=torch.int32, device=DEVICE)
    lists = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
    visibility = Visibility(listed=listed[None, None], tiles=lists, block_rows=16, block_keys=16)
    q, k, v, do = tensors(torch.float32, (1, 1, 64, 8), (1, 1, 48, 8), (1, 1, 48, 8), (1, 1, 64, 8))
    dense = Call(q, k, v, visibility.as_mask(None, q, k)[0], Visibility(), 0.3, "expressive")
    results = []
    for call in (dense, Call(q.clone(), k.clone(), v.clone(), None, visibility, 0.3, "expressive")):
        if call is not dense:
            for x in call[1:3]:
                x[:, :, 16:32] = torch.nan  # of no list
            call.query[:, :, 32:48] = torch.nan  # without a list
            do[:, :, 32:48] = torch.nan
        result = triton.forward(call)
        results.append([*result[:2], *triton.backward(call, result, Upstream(do, None, False))[:3]])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)
    assert (results[1][3][:, :, 16:32] == 0).all()


def test_rows_of_blocks_that_leave_the_range_of_float32():
    q, k, v = tensors(torch.float32, (1, 1, 18, 8), (1, 1, 40, 8), (1, 1, 40, 8))
    q[:, :, ::3] *= 1e-18
    mask = create_block_mask(
        lambda b, h, i, j: (7 * i + 3 * j) % 5 > 1, None, None, 18, 40, device="cpu", BLOCK_SIZE=16
    )
    judge(q, k, v, None, {"block_mask": mask, "window_size": (30, 12)})


def test_rows_of_blocks_that_see_one_key_have_no_gradient():
    """In bfloat16, where nothing but their number tells of it."""
    q, k, v = (x.requires_grad_() for x in tensors(torch.bfloat16, *[(1, 1, 20, 8)] * 3))
    own = create_block_mask(lambda b, h, i, j: i == j, None, None, 20, 20, device=DEVICE, BLOCK_SIZE=16)
    output = expressive_attention(q, k, v, block_mask=own, backend="triton")
    torch.testing.assert_close(output, v, rtol=0.01, atol=0)
    dq, dk, _ = torch.autograd.grad(output, (q, k, v), torch.randn_like(output))
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("size", [(16, 32), (2, 16), (48, 48)])
@pytest.mark.parametrize("pattern", [{}, {"right": 0, "lower_right": True}, {"left": 20, "right": 7}])
def test_kinds_of_blocks_are_those_of_their_pairs(size, pattern):
    """A block is skipped only if it has no pair that is seen, and has no mask only if all pairs are."""
    length, keys, groups = 70, 100, 3
    generator = torch.Generator().manual_seed(0)
    shape = (1, 6, -(-length // size[0]), -(-keys // size[1]))
    listed = torch.tensor([0, 2] + 8 * [1], dtype=torch.int32)[torch.randint(10, shape, generator=generator)]
    tiles = torch.rand(1, *size, generator=generator) < 0.5
    tiles[:, :, 0] = False
    seen = Visibility(**pattern, listed=listed, tiles=tiles, block_rows=size[0], block_keys=size[1])
    seen = seen.but(key_lengths=torch.tensor([100, 61]))
    q, k = torch.empty(2, 6, length, 8), torch.empty(2, 2, keys, 8)
    lists = Blocks(Call(q, k, k, None, seen, 1.0, "expressive"))
    tile = lists.fitted(Tile(64, 64, 8, 2))
    assert min(tile[:2]) >= 16
    assert lists.unit % tile.rows == size[1] % tile.keys == 0
    mask = seen.mask_of(torch.arange(length), q, k)
    mask = mask.unflatten(1, (2, groups)).transpose(2, 3).flatten(2, 3)  # rows of a key head, in the kernels' order
    for unit, kinds in enumerate(lists.kinds.unbind(2)):
        of_rows = mask[:, :, unit * lists.unit : (unit + 1) * lists.unit]
        for block, kind in enumerate(kinds.unbind(2)):
            pairs = of_rows[..., block * size[1] : (block + 1) * size[1]]
            whole = pairs.all((2, 3)) & (pairs.shape[3] == size[1])
            assert not pairs[kind == 2].any()
            assert whole[kind == 1].all()
            assert lists.unit == 16 or torch.equal(kind == 1, whole)
    order = lists.arguments()["blocks"][2]
    assert torch.equal(order[..., 0], (lists.kinds == 0).sum(-1))
    assert torch.equal(order[..., 1], (lists.kinds < 2).sum(-1))
    numbers = order[..., 2 : 2 + lists.kinds.shape[-1]].long()
    assert torch.equal(lists.kinds.gather(-1, numbers), lists.kinds.sort(-1).values)


def test_blocks_have_the_same_bits_twice():
    q, k, v = (x.requires_grad_() for x in tensors(torch.float32, *[(1, 1, 20, 8)] * 3))
    mask = blocks(1, 20, 20, (16, 16)).to(DEVICE)

    def run():
        y = expressive_attention(q, k, v, block_mask=mask, backend="triton")
        return [y, *torch.autograd.grad(y.square().sum(), (q, k, v))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_tolerance_is_kept_by_the_kernels(monkeypatch):
    """The blocks that are chosen are those that the kernels read; the others hold NaN."""
    monkeypatch.setattr(sparse, "BLOCK_SIZE", (16, 16))
    q, k, v = tensors(torch.float32, *[(1, 1, 64, 8)] * 3)
    k[:, :, 16:48] *= 1e-4
    expected = expressive_attention(q, k, v, is_causal=True, backend="reference")
    v[:, :, 16:32] = torch.nan
    output = expressive_attention(q, k, v, is_causal=True, tolerance=1e-3, backend="triton")
    assert (output - expected).abs()[:, :, 48:].max() <= 2e-3 * v.nan_to_num().abs().max()


# ---- with the rest of the library, and of torch ----


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_on("cuda", torch.bfloat16, head_dim=256), None),
        (call_on("meta"), "runs on GPUs, not on meta"),
        (call_on("cuda", torch.float64), "float64"),
        (call_on("cuda", head_dim=257), "head dimensions above 256 are not implemented, got 257"),
        (call_on("cuda", dropout_p=0.1), None),
    ],
)
def test_it_says_why_it_declines(call, reason):
    found = triton.declines(call)
    assert found is None if reason is None else reason in found
    assert "torch.func" in declined_by_func(triton, call_on("cuda"))


def test_it_is_not_there_without_a_recent_triton(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.2.1")
    assert triton._missing() == "triton must be 3.4 or later, got 3.2.1"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(triton, "_MISSING", triton._missing())
    for device in ("cuda", "mps"):
        assert "expressive-attention[gpu]" in str(triton.declines(call_on(device)))


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"triton": "3.6.0", "numpy": "2.4.6"}, "the interpreter of Triton 3.6.0 needs numpy below 2.4, got 2.4.6"),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, None),
        ({"triton": "3.7.1", "numpy": "2.4.0"}, None),
    ],
)
def test_it_says_which_numpy_the_interpreter_takes(versions, reason, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    assert triton._unfit() == reason
    monkeypatch.setattr(triton, "_UNFIT", reason)
    monkeypatch.setattr(triton, "_interpreted", lambda: True)
    assert triton.declines(call_on("cpu")) == reason


def test_a_call_by_name_says_why_it_declines():
    q = torch.randn(1, 1, 2, 300, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"'triton' does not support this call: head dimensions above 256"):
        expressive_attention(q, q, q, backend="triton")


MASKS = {
    "bool": (torch.arange(12).reshape(2, 1, 1, 6) % 3 > 0, Visibility(right=1), "squared"),
    "bias": (torch.linspace(-1, 1, 12).reshape(1, 2, 1, 6).requires_grad_(), Visibility(right=0), "expressive"),
    "slopes": (None, Visibility(left=3, lower_right=True, slopes=torch.rand(1, 2, device=DEVICE)), "expressive"),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_opcheck(name):
    mask, visibility, form = MASKS[name]
    if mask is not None:
        mask = mask.detach().to(DEVICE).requires_grad_(mask.requires_grad)
    q, k, v = (x.requires_grad_() for x in tensors(torch.float32, (2, 2, 5, 8), (2, 1, 6, 8), (2, 1, 6, 3)))
    operators = torch.ops.expressive_attention
    inputs = (q, k, v, mask, *visibility, 0.5, form, 0.0, None, None, None)
    torch.library.opcheck(operators.attention.default, (*inputs, "triton"))
    with torch.no_grad():
        output, normalizer, _ = operators.attention(*inputs, "triton")
    upstream = torch.randn_like(output), torch.randn_like(normalizer), name == "bias", False
    arguments = (*inputs, "triton", output, normalizer, *upstream)
    # tests/test_ops.py has the trace of its derivative, which is not of a backend.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.attention_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def function(q, k, v, mask):
        output, normalizer = expressive_attention(
            q, k, v, mask, is_causal=True, enable_gqa=True, return_normalizer=True, backend="triton"
        )
        return output.square().sum() + normalizer.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (6, 9):
        shapes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8), (length, length))
        leaves = [x.requires_grad_() for x in tensors(torch.float32, *shapes)]
        results = [torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function)]
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return expressive_attention(q, k, v, is_causal=True, backend="triton")

    inputs = tensors(torch.float32, *[(1, 2, 7, 8)] * 3)
    exported = torch.export.export(Module(), tuple(inputs))
    assert torch.equal(exported.module()(*inputs), Module()(*inputs))


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_a_cuda_graph_replays_a_training_step():
    leaves = [x.requires_grad_() for x in tensors(torch.bfloat16, *[(2, 2, 70, 16)] * 3)]

    def step():
        return torch.autograd.grad(expressive_attention(*leaves, is_causal=True).float().square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the leaves
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for x in leaves:
            x.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_autocast_computes_in_the_dtype_of_the_region():
    q, k, v = tensors(torch.float32, *[(1, 2, 7, 8)] * 3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = expressive_attention(q, k, v, backend="triton")
    assert torch.equal(output, expressive_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="triton"))


# ---- benchmarks ----


@pytest.mark.parametrize("causal", [False, True])
def test_the_twin_of_the_benchmark_is_softmax(causal):
    """Our kernels with exp in the place of f, over lengths that end inside of a tile."""
    inputs = [x.requires_grad_() for x in tensors(torch.float32, (1, 2, 41, 8), (1, 2, 39, 8), (1, 2, 39, 8))]
    (do,) = tensors(torch.float32, (1, 2, 41, 8), seed=1)
    call = Call(*inputs, None, Visibility(right=0 if causal else None), 0.3, "exponential")
    with torch.no_grad():
        result = triton.forward(call)
        got = triton.backward(call, result, Upstream(do, None, False))
    want = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.3)
    torch.testing.assert_close(result.output, want)
    torch.testing.assert_close(got[:3], torch.autograd.grad(want, inputs, do))
