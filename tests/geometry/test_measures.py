import math

import numpy as np
import pytest
import torch
from scipy import integrate

from expressive_attention import expressive_attention
from expressive_attention.geometry import measures as m

FORMS = m.FORMS


def directions(count, dim, seed=0):
    x = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def test_cosines_of_known_angles():
    query = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    key = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(m.cosine(query, key)[0].tolist(), [1.0, -1.0, 0.0, 0.5**0.5, 0.0])


@pytest.mark.parametrize("dim", [2, 3, 8, 64])
def test_the_isotropic_density_is_that_of_random_directions(dim):
    total, _ = integrate.quad(lambda c: m.isotropic_density(torch.tensor(c, dtype=torch.float64), dim).item(), -1, 1)
    assert total == pytest.approx(1, abs=1e-6)
    cos = directions(200_000, dim)[:, 0]
    for low, high in ((-1, -0.5), (-0.1, 0.3), (0.2, 1)):
        share = m.isotropic_share(low, high, dim)
        exact, _ = integrate.quad(
            lambda c: m.isotropic_density(torch.tensor(c, dtype=torch.float64), dim).item(), low, high
        )
        assert share == pytest.approx(exact, abs=1e-6)
        assert share == pytest.approx(((cos > low) & (cos < high)).double().mean().item(), abs=0.005)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [2, 5, 64])
@pytest.mark.parametrize("size", [0.3, 4.0])
def test_the_quiet_volume_is_a_share_of_random_keys(form, dim, size):
    w = m.weight(size * directions(200_000, dim)[:, 0], form)
    largest = m.weight(torch.tensor(size, dtype=torch.float64), form)
    found = (w < 0.2 * largest).double().mean().item()
    assert m.quiet_volume(size, dim, form, 0.2) == pytest.approx(found, abs=0.005)


def test_attention_is_that_of_the_operator():
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 3, n, 4, dtype=torch.float64, generator=generator) for n in (5, 7))
    bias = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator)
    keep = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
    keep[1, 0, 2] = False  # a query without keys
    z = 0.7 * q @ k.mT
    values = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
    mask = torch.where(keep, bias, -torch.inf)
    for form in ("expressive", "squared"):
        wanted, total = expressive_attention(q, k, values, mask, scale=0.7, form=form, return_normalizer=True)
        torch.testing.assert_close(m.attention(z, form, bias, keep), wanted)
        torch.testing.assert_close(m.log_normalizer(z, form, bias, keep), total.log())
    found = m.attention(z, "softmax", bias, keep)
    torch.testing.assert_close(found, (z + mask).softmax(-1).nan_to_num(0))
    torch.testing.assert_close(m.log_normalizer(z, "softmax", bias, keep), (z + mask).logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_scores_of_any_size(dtype):
    z = torch.tensor([0.0, 1e-4, -1.0, 30.0, 1e30], dtype=dtype)
    exact = z.double().square() / (1 + z.double().square())
    torch.testing.assert_close(m.weight(z, "expressive").double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_attention_of_float32_agrees_with_float64():
    z = 3 * torch.randn(4, 50, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for form in FORMS:
        a = m.attention(z.float(), form)
        exact = m.attention(z, form)
        for measure in (m.effective_keys, m.entropy, m.sink_share):
            torch.testing.assert_close(measure(a).double(), measure(exact), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            m.antiparallel_share(z.float(), a).double(), m.antiparallel_share(z, exact), rtol=1e-5, atol=1e-5
        )


def test_measures_of_known_attention():
    a = torch.tensor([[[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0.5, 0.5, 0]]], dtype=torch.float64)
    torch.testing.assert_close(m.effective_keys(a)[0].tolist(), [1.0, 4.0, 2.0])
    torch.testing.assert_close(m.entropy(a)[0].tolist(), [0.0, math.log(4), math.log(2)])
    assert m.sink_share(a).item() == pytest.approx(0.125)
    z = torch.tensor([[[-1.0, 9, 9, 9], [-1, -1, 1, 1], [1, -1, 1, 1]]], dtype=torch.float64)
    assert m.antiparallel_share(z, a).item() == pytest.approx((1 + 0.5 + 0.5) / 3)
    # A score of 0, to which softmax gives weight, is on neither side.
    assert m.antiparallel_share(torch.tensor([[-1.0, 0, 1]]), torch.tensor([[0.2, 0.5, 0.3]])).item() == pytest.approx(
        0.2
    )


def test_what_is_saturated():
    z = torch.tensor([0.01, 3**-0.5, 1.0, 2.9, 3.1, -5.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(m.weight(z, "expressive").log().sum(), z)
    wanted = slope * z < 0.1 * 2
    assert torch.equal(m.saturated(z.detach(), z.detach(), "expressive"), wanted)
    assert wanted.tolist() == [False, False, False, False, True, True]
    a = torch.tensor([[0.95, 0.05], [0.94, 0.06]], dtype=torch.float64)  # slopes 0.095 and 0.1128
    assert m.saturated(a, a, "softmax").tolist() == [[True, True], [False, False]]
    assert not m.saturated(torch.tensor([0.0, 9.0]), a, "squared").any()


def test_which_heads_are_dead():
    evenness = m.evenness(torch.tensor([0.0, 4.95, 4.96, 2.5]), torch.tensor([0, 5, 5, 5]))
    torch.testing.assert_close(evenness, torch.tensor([0.0, 0.99, 0.992, 0.5]))
    assert m.dead(evenness, torch.tensor([0.0, 0.0, 0.0, 1.0])).tolist() == [False, False, True, True]


def test_dimensions_of_known_vectors():
    moment = torch.diag(torch.tensor([4.0, 4.0, 4.0, 0.0], dtype=torch.float64))
    assert m.participation_ratio(moment).item() == pytest.approx(3)
    assert m.numerical_rank(moment).item() == 3
    assert m.numerical_rank(torch.diag(torch.tensor([2.0, 1.0, 0.5])), tolerance=0.5).item() == 2
    assert m.numerical_rank(torch.zeros(3, 3, dtype=torch.float64)).item() == 0
    x = directions(100_000, 6)
    assert m.participation_ratio(x.mT @ x).item() == pytest.approx(6, abs=0.01)
    assert m.numerical_rank(torch.stack([moment, torch.eye(4, dtype=torch.float64)])).tolist() == [3, 4]


def test_heads_that_are_alike():
    a = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = a / a.sum(-1, keepdim=True)
    found = m.head_similarity(a, a)
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))
    assert (found <= 1 + 1e-12).all()
    one, other = torch.eye(4)[None, :, :], torch.eye(4).roll(1, 0)[None, :, :]
    assert m.head_similarity(one, other).item() == 0
    with pytest.raises(ValueError, match=r"attention to the same tokens.*got \(2, 3, 4, 5\) and \(1, 4, 4\)"):
        m.head_similarity(a, one)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: m.weight(torch.zeros(1), "sigmoid"), "form must be one of"),
        (lambda: m.saturated(torch.zeros(1), torch.zeros(1), "sigmoid"), "form must be one of"),
        (lambda: m.isotropic_density(torch.zeros(1), 1), "dim must be at least 2, got 1"),
        (lambda: m.isotropic_share(-1, 1, 1), "dim must be at least 2, got 1"),
        (lambda: m.quiet_volume(0.0, 4, "softmax"), "size must be positive"),
        (lambda: m.quiet_volume(1.0, 4, "softmax", 1.0), "threshold must be between 0 and 1"),
        (lambda: m.quiet_volume(1.0, 4, "cosine"), "form must be one of"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_quiet_volume_of_f_grows_with_the_dimension_and_that_of_exp_does_not_vanish():
    quiet = np.array([m.quiet_volume(4.0, dim, "expressive") for dim in (4, 16, 64)])
    assert (np.diff(quiet) > 0).all()
