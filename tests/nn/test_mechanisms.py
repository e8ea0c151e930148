import math

import pytest
import torch

from expressive_attention.nn import MECHANISMS, SelfAttention, attend

# Weights as the table of the module says, of a number.
WEIGHTS = {
    "expressive": lambda z: z**2 / (1 + z**2),
    "dot_product": math.exp,
    "squared": lambda z: z**2,
    "one_sided": lambda z: max(z, 0) ** 2 / (1 + max(z, 0) ** 2),
    "relu_squared": lambda z: max(z, 0) ** 2,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "softmax_abs": lambda z: math.exp(abs(z)),
    "sigmoid_abs": lambda z: 1 / (1 + math.exp(-abs(z))),
    "absolute": abs,
    "relu": lambda z: max(z, 0),
    "quartic": lambda z: z**4 / (1 + z**4),
    "one_sided_quartic": lambda z: max(z, 0) ** 4 / (1 + max(z, 0) ** 4),
}


def by_hand(mechanism, q, k, v, mask, is_causal):
    output = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            weights = []
            for j in range(k.shape[1]):
                w = WEIGHTS[mechanism](float(q[b, i] @ k[b, j]) / math.sqrt(q.shape[-1]))
                if mask is not None:
                    w *= float(mask[i, j]) if mask.dtype == torch.bool else math.exp(mask[i, j])
                weights.append(0.0 if is_causal and j > i else w)
            total = sum(weights)
            for j, w in enumerate(weights):
                if total:
                    output[b, i] += w / total * v[b, j]
    return output


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "bias"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_weights_are_those_of_the_table(mechanism, kind, is_causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, 5, width, generator=generator, dtype=torch.float64) for width in (4, 4, 3))
    numbers = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    mask = {"none": None, "bool": (numbers > -0.5) | torch.eye(5, dtype=torch.bool), "bias": numbers}[kind]
    found = attend(mechanism, q, k, v, mask, is_causal=is_causal)
    torch.testing.assert_close(found, by_hand(mechanism, q, k, v, mask, is_causal), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mechanism", sorted(set(MECHANISMS) - {"dot_product"}))
def test_a_query_without_weight_gives_0_and_a_gradient_without_nan(mechanism):
    q, k, v = (torch.randn(1, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    output = attend(mechanism, q, k, v, mask)
    output.sum().backward()
    assert (output[0, 1] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("mechanism", sorted(set(MECHANISMS) - {"squared", "relu_squared"}))
def test_scores_of_any_size_stay_finite(mechanism):
    q, k, v = torch.randn(3, 1, 3, 4).unbind(0)
    assert attend(mechanism, q * 1e12, k * 1e12, v).isfinite().all()


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_key_that_is_masked_does_not_count_however_large_its_score(mechanism, kind):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 4, 3, dtype=torch.float64).unbind(0))
    larger = torch.cat([k[:, :3], 1e4 * k[:, 3:]], 1)
    mask = torch.tensor([True, True, True, False])
    mask = mask if kind == "bool" else torch.zeros(4, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    output = attend(mechanism, q, larger, v, mask)
    torch.testing.assert_close(output, attend(mechanism, q, k[:, :3], v[:, :3]))
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), (q, k, v)))


def test_derivatives_of_the_ablations():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    for mechanism in MECHANISMS:
        assert torch.autograd.gradcheck(lambda q, k, v, m=mechanism: attend(m, q, k, v, is_causal=True), (q, k, v))


@pytest.mark.parametrize(("name", "meant"), [("softmax", "dot_product"), ("dpa", "dot_product"), ("EA", "expressive")])
def test_an_error_says_what_a_mechanism_is_called_here(name, meant):
    x = torch.randn(1, 2, 3, 4)
    for call in (lambda: SelfAttention(8, 2, name), lambda: attend(name, x, x, x)):
        with pytest.raises(ValueError, match=f"mechanism must be one of .*, got '{name}'; '{meant}' is its name here"):
            call()
