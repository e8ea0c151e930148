"""The squared form in linear time by kernels in Triton: on a GPU, else under Triton's interpreter on the CPU."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expressive_attention import call as calls
from expressive_attention import expressive_attention
from expressive_attention.backends import linear, reference, triton
from expressive_attention.backends.linear import chunks
from expressive_attention.call import Call, Upstream, Visibility
from tests.backends.test_triton import DEVICE, DTYPES, _quick, on_device, pytestmark, tensors  # noqa: F401
from tests.budget import Case, assert_within_budget, fused
from tests.problems import strided

with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from expressive_attention.backends.triton import linear as kernels
    from expressive_attention.backends.triton.tiles import Tile


@contextmanager
def sizes(chunk, rows, keys):
    """Chunks of so many keys, so that there are several of them, and tiles of rows and keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.tuning, "linear_chunk", lambda width: chunk)
        patch.setattr(kernels.tuning, "linear_tile", lambda *problem: Tile(rows, keys, 4, 1))
        yield


@pytest.fixture(autouse=True)
def _small():
    with sizes(16, 16, 16):
        yield


@st.composite
def problems(draw, largest=40):
    """Calls that the kernels take, of up to four chunks of keys. The interpreter takes milliseconds for each tile."""
    e, ev = draw(st.sampled_from([1, 2, 3, 5, 17])), draw(st.sampled_from([1, 3, 18]))
    heads_of_batches = [(1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 1), (2, 1, 1)]
    batch, kv_heads, groups = draw(st.sampled_from(heads_of_batches[:2] if e == 17 else heads_of_batches))
    length, keys = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    keys = draw(st.sampled_from([keys, keys, length]))
    dtype, heads = draw(st.sampled_from(DTYPES)), kv_heads * groups
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layouts = st.sampled_from(["contiguous", "transposed", "gaps", "columns first", "repeated"])
    query = strided((batch, heads, length, e), dtype, draw(layouts), generator)
    key = strided((batch, kv_heads, keys, e), dtype, draw(layouts), generator)
    value = strided((batch, kv_heads, keys, ev), dtype, draw(layouts), generator)
    options = {
        "is_causal": draw(st.integers(0, 3)) > 0,
        "causal_alignment": draw(st.sampled_from(["upper_left", "lower_right"])),
        "enable_gqa": True,
        "form": "squared",
        "scale": draw(st.sampled_from([None, 0.03, -2.5])),
    }
    decays = draw(st.sampled_from(["none", "slopes", "queries", "keys"])) if options["is_causal"] else "none"
    size = draw(st.sampled_from([0.01, 1.0, 10.0]))
    if decays == "slopes":
        options["alibi_slopes"] = size * torch.rand((batch, heads), generator=generator)
    elif decays != "none":
        shape = (batch, heads if decays == "queries" else kv_heads, keys)
        options["log_decay"] = -size * torch.rand(shape, generator=generator)
    return Case(query, key, value, None, options, draw(st.booleans()))


def check(case):
    assert_within_budget(on_device(case), "linear triton")


SIZES = st.sampled_from([(16, 16, 16), (32, 16, 16), (32, 32, 16), (32, 16, 32)])


@contextmanager
def plain_torch():
    """The calls that plain torch takes, inside of the block: the kernels have not held all of their rows."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            plain = getattr(chunks, name)
            patch.setattr(chunks, name, lambda *arguments, plain=plain: taken.append(1) or plain(*arguments))
        yield taken


def test_random_problems_within_budget():
    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(problems(), SIZES)
    def run(case, chosen):
        with sizes(*chosen):
            check(case)

    with plain_torch() as taken:
        run()
    assert len(taken) <= 2  # all else is by the kernels


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems(largest=70), SIZES)
def test_more_random_problems_within_budget(case, chosen):
    with sizes(*chosen):
        check(case)


def call_of(dtype, *shapes, visibility=None, seed=0, scale=0.5):
    query, key, value = tensors(dtype, *shapes, seed=seed)
    return Call(query, key, value, None, Visibility(right=0) if visibility is None else visibility, scale, "squared")


def test_rows_that_float32_does_not_hold_are_told():
    """As plain torch tells them, in chunks of the same size; also where a row sees no key but zeros."""
    call = call_of(torch.float32, (1, 2, 40, 6), (1, 1, 40, 6), (1, 1, 40, 3))
    call.key[..., 3:] = 0
    call.key[:, :, :5] = 0
    call.query[:, :, 7::4, :3] *= 1e-4
    call.query[:, :, 10] = 0
    call.query[:, :, 38] *= 1e-25
    call.query[:, 1, 39] *= 1e25
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_CHUNK", 16)
        output, normalizer = chunks._forward(chunks._Problem.of(call, None, torch.float32))
    got, total = kernels.forward(call, None)
    is_lost = normalizer.view(total.shape).isnan()
    assert torch.equal(total.isnan(), is_lost)
    assert is_lost[:, :, 19::4].all()
    assert not is_lost[:, :, :19].any()  # pairs of a chunk lose nothing
    assert kernels.backward(call, None, Upstream(got, total, False)) is None
    torch.testing.assert_close(got[~is_lost], output.view(got.shape)[~is_lost], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_queries_that_are_nearly_orthogonal_to_all_keys(size):
    """A state of float64 holds the first; pairs are multiplied for the second."""
    q, k, v = tensors(torch.float32, (1, 1, 40, 8), (1, 1, 40, 8), (1, 1, 40, 3))
    q[..., :4], k[..., 4:] = 0, 0
    q[:, :, ::8, 0] = size
    q[:, :, 1::8] = q[:, :, 2::8] = k[:, :, :5]
    results = []
    with fused("linear triton") as backend:
        for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            options = {"is_causal": True, "form": "squared", "return_normalizer": True, "backend": name}
            output, normalizer = expressive_attention(*leaves, **options)
            results.append([output, normalizer, *torch.autograd.grad(output.square().sum(), leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-4 * float(y.detach().abs().max()))


@pytest.mark.parametrize(("of_queries", "of_values"), [(1e-30, 1.0), (1e30, 1.0), (1.0, 1e38)])
def test_numbers_of_any_size(of_queries, of_values):
    q, k, v = tensors(torch.float32, (1, 1, 40, 4), (1, 1, 40, 4), (1, 1, 40, 3))
    q[:, :, ::3] *= of_queries
    v = v.clamp(-3, 3) * of_values
    options = {"is_causal": True, "form": "squared"}
    with fused("linear triton") as backend:
        got = expressive_attention(q, k, v, **options, backend=backend)
    want = expressive_attention(*(x.double() for x in (q, k, v)), **options, backend="reference")
    torch.testing.assert_close(got.double() / of_values, want / of_values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("length", [34, 44])
def test_decays_of_several_chunks(heads, length):
    """In float32 all along. Nothing is left of keys before a certain one, and those after it keep their digits."""
    q, k, v, do = tensors(torch.float32, *((1, h, n, 3) for h, n in ((2, length), (1, 40), (1, 40), (2, length))))
    log_decay = -0.1 * torch.rand(1, heads, 40, device=DEVICE)
    log_decay[..., 19] = -1e4
    results = []
    for dtype, name in ((torch.float32, "linear triton"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, log_decay)]
        options = {"form": "squared", "is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True}
        with fused(name) as backend, plain_torch() as taken:
            output, normalizer = expressive_attention(
                *leaves[:3], log_decay=leaves[3], return_normalizer=True, backend=backend, **options
            )
            loss = (output * do).sum() + normalizer.sum()
            results.append([output, normalizer, *torch.autograd.grad(loss, leaves)])
        assert not taken
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5 * float(y.detach().abs().max()))


def test_the_gradient_along_the_query():
    """It is 2 dN N / |q|^2, and what is lost of terms that cancel is not in it."""
    call = call_of(torch.float32, (1, 1, 40, 3), (1, 1, 40, 3), (1, 1, 40, 3))
    call.key.mul_(0.01).add_(1.0)
    call.query.abs_()
    found = kernels.backward(call, None, Upstream(torch.randn_like(call.value), None, False))
    assert found is not None
    q, dq = call.query.double(), found[0].double()
    assert ((q * dq).sum(-1).abs() <= 1e-6 * q.norm(dim=-1) * dq.norm(dim=-1)).all()


def test_slopes_of_any_size():
    """Each weight is that of the query's own place, or decays as nothing; float32 holds all of them."""
    slopes = torch.tensor([[3e38, 1e-30]], device=DEVICE)
    shape = (1, 2, 40, 4)
    call = call_of(torch.float32, shape, shape, shape, visibility=Visibility(right=0, slopes=slopes))
    output, normalizer = kernels.forward(call, linear._decays(call))
    assert normalizer.isfinite().all()
    torch.testing.assert_close(output[:, 0], call.value[:, 0])
    torch.testing.assert_close(output, calls.forward(reference, call).output)


@pytest.mark.parametrize("is_causal", [False, True])
def test_sums_of_keys_that_are_alike_within_budget(is_causal):
    """Each term of a sum loses the same then, and nothing averages out."""
    query, key, value = tensors(torch.float32, (1, 1, 20, 2), (1, 1, 1, 2), (1, 1, 100, 2))
    options = {"is_causal": is_causal, "causal_alignment": "lower_right", "form": "squared"}
    check(Case(query, key.expand(1, 1, 100, 2), value, None, options))


def test_same_bits_twice():
    call = call_of(torch.bfloat16, (1, 2, 34, 2), (1, 1, 34, 2), (1, 1, 34, 3))
    decays = -torch.rand(1, 1, 34, dtype=torch.float64, device=DEVICE).cumsum(-1)
    results = []
    for _ in range(2):
        output, normalizer = kernels.forward(call, decays)
        gradients = kernels.backward(call, decays, Upstream(output, normalizer, False))
        assert gradients is not None
        results.append([output, normalizer, *gradients])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_plain_torch_takes_what_the_kernels_do_not():
    """And only that."""
    lengths = Visibility(key_lengths=torch.tensor([7], device=DEVICE))
    with fused("linear triton"), plain_torch() as taken:
        for reason, call in (
            (None, call_of(torch.float32, (1, 1, 20, 3), (1, 1, 20, 3), (1, 1, 20, 3))),
            ("float64 is not", call_of(torch.float64, (1, 1, 20, 3), (1, 1, 20, 3), (1, 1, 20, 3))),
            ("above 128", call_of(torch.float32, (1, 1, 4, 129), (1, 1, 4, 129), (1, 1, 4, 3))),
            ("key_lengths", call_of(torch.float32, (1, 1, 9, 3), (1, 1, 9, 3), (1, 1, 9, 3), visibility=lengths)),
        ):
            found = triton.linear_declines(call)
            assert found == reason or reason in found
            taken.clear()
            linear.forward(call)
            assert bool(taken) == (reason is not None)
