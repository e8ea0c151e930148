"""One f: every place that computes it has the numbers of `forms`."""

import pytest
import torch

from expressive_attention import expressive_attention, forms
from expressive_attention.call import Call, Visibility
from expressive_attention.integrations import decompositions
from expressive_attention.nn import attend
from expressive_attention.schema import flatten
from tests.budget import FUSED, fused

DEFINITIONS = {"expressive": lambda z: z**2 / (1 + z**2), "squared": lambda z: z**2}
DERIVATIVES = {"expressive": lambda z: 2 * z / (1 + z**2) ** 2, "squared": lambda z: 2 * z}
SCORES = torch.cat([torch.logspace(-12, 8, 41), -torch.logspace(-8, 6, 29), torch.zeros(1)])


def exact(form):
    return DEFINITIONS[form](SCORES.double())


@pytest.mark.parametrize("form", forms.FORMS)
def test_f_and_its_derivative_are_as_defined(form):
    z = SCORES.double()
    want = exact(form)
    assert (forms.weight(z * z, form) - want).abs().le(1e-15 * want).all()
    weight, half_derivative = forms.weight_and_half_derivative_(z.clone(), form)
    assert torch.equal(weight, forms.weight(z * z, form))
    torch.testing.assert_close(2 * half_derivative, DERIVATIVES[form](z), rtol=1e-14, atol=0)
    assert torch.equal(forms.weight_(z * z, form), weight)
    row = torch.tensor(2.0**-20)
    relative = forms.weight(z * z, form, (z / row) ** 2)
    torch.testing.assert_close(relative * row**2, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize("name", ["reference", *FUSED])
def test_the_normalizer_of_one_key_is_f(name, form):
    """A row for each score, and one key of 1."""
    query, key = SCORES.view(1, 1, -1, 1), torch.ones(1, 1, 1, 1)
    with fused(name) as backend:
        _, found = expressive_attention(
            query, key, key, scale=1.0, form=form, backend=backend, return_normalizer=True
        )  # fmt: skip
    torch.testing.assert_close(found.flatten().double(), exact(form), rtol=4e-7, atol=1e-37)
    if name == "blockwise":
        assert torch.equal(found.flatten(), forms.weight(SCORES * SCORES, form))


@pytest.mark.parametrize("form", forms.FORMS)
def test_exported_operators_have_it(form):
    query, key = SCORES.view(1, 1, -1, 1), torch.ones(1, 1, 1, 1)
    (operator,) = decompositions().values()
    _, found, _ = operator(*flatten(Call(query, key, key, None, Visibility(), 1.0, form), "reference"))
    torch.testing.assert_close(found.flatten().double(), exact(form), rtol=4e-7, atol=1e-37)


@pytest.mark.parametrize(
    ("mechanism", "power", "sided"), [("one_sided", 1, 1), ("quartic", 2, 0), ("one_sided_quartic", 2, 1)]
)
def test_mechanisms_have_it(mechanism, power, sided):
    """Shares of a key beside one with the weight 1/2, to whose value 0 the other adds 1."""
    z = SCORES[SCORES.abs() < 1e4]
    key = torch.stack([z, torch.ones_like(z)], -1).unsqueeze(-1)
    found = attend(mechanism, torch.ones(len(z), 1, 1), key, torch.tensor([[[1.0], [0.0]]]).expand(len(z), 2, 1))
    weight = forms.weight((z.relu() if sided else z) ** (2 * power))
    torch.testing.assert_close(found.flatten(), weight / (weight + 0.5), rtol=3e-7, atol=0)


@pytest.mark.parametrize("form", forms.FORMS)
def test_measures_and_x_transformers_have_it(form):
    measures = pytest.importorskip("expressive_attention.geometry.measures", exc_type=ImportError)
    assert torch.equal(measures.weight(SCORES, form), forms.weight(SCORES.square(), form))
    pytest.importorskip("x_transformers")
    from expressive_attention.integrations.x_transformers import attn_fn

    rows = torch.stack([SCORES, torch.ones_like(SCORES)], -1)
    rows = rows[rows[:, 0] != 0]
    weights = DEFINITIONS[form](rows.double())
    torch.testing.assert_close(
        attn_fn(form)(rows).double(), weights / weights.sum(-1, keepdim=True), rtol=1e-6, atol=1e-37
    )
