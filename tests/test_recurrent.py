"""The squared form as a recurrence, against the operator in float64."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from expressive_attention import expressive_attention
from expressive_attention.backends.cpu import library
from expressive_attention.recurrent import SquaredState
from tests.budget import LINEAR, fused, threads_of_torch


def inputs(tokens: int = 300, dim: int = 20, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(3, 2 * heads, tokens, dim, dtype=torch.float64),
        torch.randn(3, heads, tokens, dim, dtype=torch.float64),
        torch.randn(3, heads, tokens, 7, dtype=torch.float64),
    )


def test_a_token_at_a_time_is_causal_attention():
    query, key, value = inputs(tokens=12)
    state = SquaredState(3, 2, 20, 7, dtype=torch.float64)
    steps = []
    for t in range(12):
        state.update(key[:, :, t : t + 1], value[:, :, t : t + 1])
        steps.append(state.attend(query[:, :, t : t + 1]))
    expected = expressive_attention(query, key, value, is_causal=True, form="squared", enable_gqa=True)
    torch.testing.assert_close(torch.cat(steps, 2), expected, rtol=0, atol=1e-10)


def test_chunks_of_any_size_and_a_merger_give_the_same():
    query, key, value = inputs()
    expected = expressive_attention(query, key, value, form="squared", enable_gqa=True)
    whole = SquaredState(3, 2, 20, 7, dtype=torch.float64).update(key, value)
    parts = [SquaredState(3, 2, 20, 7, dtype=torch.float64) for _ in range(2)]
    parts[0].update(key[:, :, :1], value[:, :, :1]).update(key[:, :, 1:100], value[:, :, 1:100])
    parts[1].update(key[:, :, 100:], value[:, :, 100:])
    for state in (whole, parts[0] + parts[1]):
        torch.testing.assert_close(state.attend(query), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [1, 7, 300])
def test_decay_is_a_bias_of_the_squared_weights(step):
    query, key, value = inputs()
    log_decay = -torch.rand(3, 2, 300, dtype=torch.float64)
    state = SquaredState(3, 2, 20, 7, dtype=torch.float64)
    for start in range(0, 300, step):
        part = slice(start, start + step)
        state.update(key[:, :, part], value[:, :, part], log_decay[:, :, part])
    since = log_decay.cumsum(-1)
    bias = (since[..., -1:] - since).repeat_interleave(2, 1).unsqueeze(2)
    expected = expressive_attention(query, key, value, bias, form="squared", enable_gqa=True)
    torch.testing.assert_close(state.attend(query), expected, rtol=0, atol=1e-12)


def test_the_size_of_a_query_cancels_and_no_key_gives_zero():
    query, key, value = (x.float() for x in inputs())
    state = SquaredState(3, 2, 20, 7)
    assert state.attend(query).abs().max() == 0
    state.update(key, value)
    expected = state.attend(query)
    for factor in (1e-30, 1e30):
        torch.testing.assert_close(state.attend(query * factor), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(state.attend(torch.zeros_like(query)), torch.zeros(3, 4, 300, 7))


def test_saved_copied_reordered(tmp_path):
    query, key, value = inputs()
    state = SquaredState(3, 2, 20, 7, dtype=torch.float64).update(key, value)
    state.save(tmp_path / "state.safetensors")
    loaded = SquaredState.load(tmp_path / "state.safetensors")
    assert torch.equal(loaded.sums, state.sums)
    assert torch.equal(loaded.moment, state.moment)
    assert loaded.dim == 20
    kept = state.copy()
    state.update(key, value)
    assert torch.equal(kept.sums, loaded.sums)
    order = torch.tensor([2, 0])
    torch.testing.assert_close(loaded.reorder(order).attend(query[order]), loaded.attend(query)[order])
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"path must be a file that SquaredState.save has written"):
        SquaredState.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="missing"):
        state.save(tmp_path / "missing" / "state.safetensors")


def test_size_of_a_head_of_64():
    assert SquaredState(1, 1, 64).nbytes == 4 * 2080 * 64 + 8 * 2080
    assert repr(SquaredState(1, 1, 64)) == (
        "SquaredState(batch=1, heads=1, dim=64, value_dim=64, dtype=torch.float32, 0.55 MB)"
    )


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("sizes", [[300], [1, 299], [128, 1, 1, 70, 100]])
def test_pieces_of_any_length_are_causal_attention(sizes, decays):
    query, key, value = inputs()
    log_decay = -0.1 * torch.rand(3, 2, 300, dtype=torch.float64) if decays else None
    options = {"is_causal": True, "form": "squared", "enable_gqa": True, "log_decay": log_decay, "backend": "reference"}
    expected = expressive_attention(query, key, value, **options)
    state, parts, start = SquaredState(3, 2, 20, 7, dtype=torch.float64), [], 0
    for size in sizes:
        part = slice(start, start := start + size)
        own = None if log_decay is None else log_decay[..., part]
        parts.append(state.extend(query[:, :, part], key[:, :, part], value[:, :, part], own))
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        state.sums, SquaredState(3, 2, 20, 7, dtype=torch.float64).update(key, value, log_decay).sums
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32(dtype):
    query, key, value = (x.to(dtype) for x in inputs())
    state = SquaredState(3, 2, 20, 7)
    found = [state.extend(*(x[:, :, part] for x in (query, key, value))) for part in (slice(200), slice(200, 300))]
    exact = [x.double() for x in (query, key, value)]
    expected = expressive_attention(*exact, is_causal=True, form="squared", enable_gqa=True).to(dtype)
    torch.testing.assert_close(found[1], expected[:, :, 200:], rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_wrong_arguments():
    state = SquaredState(3, 2, 20, 7)
    _, key, value = (x.float() for x in inputs())
    for call, message in (
        (lambda: state.update(key[0], value), r"key must have shape \(3, 2, 0, 20\)"),
        (lambda: state.update(key, value[:, :, :5]), r"value must have shape \(3, 2, 300, 7\), got \(3, 2, 5, 7\)"),
        (lambda: state.update(key, value, key), r"log_decay must have shape \(3, 2, 300\)"),
        (lambda: state.attend(key[:, :1]), r"query must have shape \(3, a multiple of 2, L, 20\)"),
        (lambda: state.decay(key), r"log_factor must have shape \(3, 2\)"),
        (lambda: state.extend(key[:, :, :5], key, value), "of the same tokens, got 5 and 300"),
        (lambda: state.extend(key, key, value, key), r"log_decay must have shape \(3, 2, 300\)"),
        (lambda: state + SquaredState(3, 2, 20), "states of the same shape"),
        (lambda: SquaredState(3, 2, 0), "dim must be at least 1, got 0"),
        (lambda: SquaredState(3, 2, 4, dtype=torch.float16), "dtype must be torch.float32 or torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- one token, in C ----

TORCH, *BUILDS = LINEAR


def steps(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, dtype: torch.dtype
) -> tuple[SquaredState, Tensor]:
    """The state after all tokens, one at a time, and the outputs at each."""
    state = SquaredState(*key.shape[:2], key.shape[3], value.shape[3], dtype=dtype)
    outputs = []
    for t in range(key.shape[2]):
        q, k, v, decay = (x[:, :, t : t + 1] for x in (query, key, value, log_decay))
        if t % 3 == 0:
            outputs.append(state.extend(q, k, v, decay))
        elif t % 3 == 1:
            outputs.append(state.update(k, v, decay).attend(q))
        else:
            outputs.append(state.extend(q, k, v))
    return state, torch.cat(outputs, 2)


@pytest.mark.parametrize(
    ("heads", "groups", "dim", "width"),
    [(3, 1, 64, 64), (2, 3, 5, 7), (1, 5, 16, 33), (2, 4, 33, 20), (2, 9, 1, 1), (1, 2, 20, 130)],
)
def test_every_build_is_at_least_as_exact_as_plain_torch(heads, groups, dim, width):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 24, w) for h, w in ((heads * groups, dim), (heads, dim), (heads, width)))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # as projections give it
    given = query, key, value, -0.1 * torch.rand(2, heads, 24)
    doubled = [x.double() for x in given]
    with fused(TORCH):
        plain, of_plain = steps(*given, torch.float32)
        exact, of_exact = steps(*doubled, torch.float64)
    for name in BUILDS:
        with fused(name):
            state, output = steps(*given, torch.float32)
            double, of_double = steps(*doubled, torch.float64)
        for found, other, want in ((state.sums, plain.sums, exact.sums), (output, of_plain, of_exact)):
            error, budget = ((x - want).abs().max() for x in (found, other))
            assert error <= 2 * budget + torch.finfo(torch.float32).eps * want.abs().max(), name
        for found in (state, double):
            torch.testing.assert_close(found.moment, exact.moment, rtol=0, atol=1e-12)
        torch.testing.assert_close(double.sums, exact.sums, rtol=0, atol=1e-12)
        torch.testing.assert_close(of_double, of_exact, rtol=0, atol=1e-8)  # where no more than a few keys were seen


def test_threads_and_views_change_no_bit():
    query, key, value = (x.float() for x in inputs(tokens=4, heads=8))
    found = []
    for threads in (1, 2):
        with threads_of_torch(threads):
            found.append(steps(query, key, value, torch.zeros(3, 8, 4), torch.float32)[1])
    spread = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in (query, key, value)]
    found.append(steps(*spread, torch.zeros(3, 8, 1).expand(3, 8, 4), torch.float32)[1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", LINEAR)
def test_a_token_without_a_direction(name):
    """A query of zeros, of no keys, and ones that are NaN or infinite."""
    query, key, value = (x[:1, :1, :3].float() for x in inputs())
    query[0, 0, 1, 3], query[0, 0, 2, 3] = torch.nan, torch.inf
    with fused(name):
        state = SquaredState(1, 1, 20, 7)
        assert state.attend(query[:, :, :1]).abs().max() == 0
        state.update(key[:, :, :1], value[:, :, :1])
        assert state.attend(torch.zeros(1, 1, 1, 20)).abs().max() == 0
        assert state.attend(query[:, :, 1:2]).isnan().all()
        assert state.attend(query[:, :, 2:]).isnan().all()
        torch.testing.assert_close(state.attend(query[:, :, :1]), value[:, :, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_gradients_of_a_token(name):
    query, key, value = (x[:, :, :2] for x in inputs())
    query.requires_grad_()
    with fused(name):
        state = SquaredState(3, 2, 20, 7, dtype=torch.float64)
        with torch.no_grad():
            state.extend(query[:, :, :1], key[:, :, :1], value[:, :, :1])
        output = state.extend(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:])
        (gradient,) = torch.autograd.grad(output.sum(), query)
        assert gradient[:, :, 1:].abs().max() > 0
        output = state.attend(query[:, :, 1:])
        with torch.no_grad():
            state.update(key[:, :, 1:], value[:, :, 1:])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_tensors_that_have_no_memory_go_another_way():
    with FakeTensorMode():
        key = torch.randn(2, 1, 1, 8)
        assert SquaredState(2, 1, 8).extend(torch.randn(2, 3, 1, 8), key, key).shape == (2, 3, 1, 8)
    query, key = torch.randn(5, 2, 1, 1, 8), torch.randn(2, 1, 1, 8)
    state = SquaredState(2, 1, 8, dtype=torch.float64).update(key, key)
    mapped = torch.func.vmap(state.attend)(query)
    torch.testing.assert_close(mapped, torch.stack([state.attend(q) for q in query]))
    if library.MISSING is None:
        state.sums.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="the memory of sums was freed or is too small"):
            state.attend(query[0])


@pytest.mark.parametrize("return_normalizer", [False, True])
def test_gradients_of_several_tokens(return_normalizer):
    query, key, value = (x[:, :, :5] for x in inputs())
    leaves = [x.requires_grad_() for x in (query, key, value)]
    state = SquaredState(3, 2, 20, 7, dtype=torch.float64)
    state.extend(*(x[:, :, :2] for x in leaves))
    found = state.extend(*(x[:, :, 2:] for x in leaves), return_normalizer=return_normalizer)
    output = found[0] if return_normalizer else found
    options = {"is_causal": True, "enable_gqa": True, "form": "squared", "causal_alignment": "lower_right"}
    earlier = [torch.cat([x[:, :, :2].detach(), x[:, :, 2:]], 2) for x in leaves[1:]]
    expected = expressive_attention(query[:, :, 2:], *earlier, **options)
    for own, want in zip(
        torch.autograd.grad(output.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(own, want, rtol=1e-9, atol=1e-9)


# ---- normalizers ----


@pytest.mark.filterwarnings("ignore:expressive attention runs on the blockwise backend")
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[1] * 6, [6], [2, 1, 3]])
def test_a_state_gives_its_normalizer(name, dtype, sizes):
    """N of the true size of the queries, of one token and several, with and without decay, of an empty state."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 6, w, dtype=torch.float64) for h, w in ((4, 5), (2, 5), (2, 3)))
    query = query * 10.0 ** torch.tensor([-30.0, 0, 3, 10, 30, 0]).unsqueeze(-1)  # squares that leave float32
    decay = -0.3 * torch.rand(2, 2, 6, dtype=torch.float64)
    options = {"is_causal": True, "enable_gqa": True, "form": "squared", "log_decay": decay, "scale": 1.0}
    expected = expressive_attention(query, key, value, return_normalizer=True, backend="reference", **options)
    with fused(name):
        state = SquaredState(2, 2, 5, 3, dtype=dtype)
        assert torch.equal(state.attend(query, return_normalizer=True)[1], torch.zeros(2, 4, 6, dtype=torch.float64))
        parts = [
            state.extend(
                *(x.to(dtype) for x in (q, k, v)), d.to(dtype), return_normalizer=True
            )
            for q, k, v, d in zip(*(x.split(sizes, 2) for x in (query, key, value, decay)), strict=True)
        ]  # fmt: skip
        output, normalizer = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        again = [state.attend(q.to(dtype), return_normalizer=True) for q in (query[:, :, -1:], query[:, :, -2:])]
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    assert normalizer.dtype == torch.float64
    torch.testing.assert_close(normalizer, expected[1], rtol=tolerance, atol=0)
    torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=50 * tolerance)
    for found in again:
        torch.testing.assert_close(found[0][:, :, -1], output[:, :, -1], rtol=0, atol=tolerance)
        torch.testing.assert_close(found[1][:, :, -1], expected[1][:, :, -1], rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", LINEAR)
def test_a_normalizer_of_no_number_or_none(name):
    query, key, value = (x[:1, :1, :3].float() for x in inputs())
    query[0, 0, 1, 3], query[0, 0, 2] = torch.nan, 0.0
    with fused(name):
        state = SquaredState(1, 1, 20, 7).update(key, value)
        found = [state.attend(query[:, :, i : i + 1], return_normalizer=True)[1].item() for i in range(3)]
        together = state.attend(query, return_normalizer=True)[1].flatten().tolist()
    assert found[0] > 0
    assert found[1] != found[1]
    assert found[2] == 0
    assert together[0] == pytest.approx(found[0], rel=1e-6)
    assert together[1] != together[1]
    assert together[2] == 0


def test_gradients_through_the_normalizer_of_a_state():
    query, key, value = (x[:1, :, :4] for x in inputs(dim=5))
    state = SquaredState(1, 2, 5, 7, dtype=torch.float64).update(key, value)
    for rows in (1, 3):
        own = query[:, :, :rows].clone().requires_grad_()
        torch.autograd.gradcheck(lambda q: state.attend(q, return_normalizer=True)[1], own)
