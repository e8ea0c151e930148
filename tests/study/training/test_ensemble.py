import copy
import itertools

import pytest
import torch
from torch import nn

from expressive_attention.nn import MECHANISMS, NORMS, POSITIONS, Transformer
from expressive_attention.study.training.ensemble import member_state, stack

PARTS = {
    "mechanism": MECHANISMS,
    "position": POSITIONS,
    "norm": [*itertools.product(NORMS[:2], (False, True)), ("none", False)],  # and whether it is affine
    "switches": list(itertools.product((False, True), repeat=3)),  # gain, bias, qkv_bias
}

# Each mechanism with each position. The other parts change so that any two values of any two parts meet in some model.
PAIRWISE = [
    dict(
        zip(
            ("mechanism", "position", "norm", "norm_affine", "gain", "bias", "qkv_bias"),
            (mechanism, position, *PARTS["norm"][(i + j) % 5], *PARTS["switches"][(i + 3 * j) % 8]),
            strict=True,
        )
    )
    for i, mechanism in enumerate(MECHANISMS)
    for j, position in enumerate(POSITIONS)
]
COMBINED = [
    {"mechanism": mechanism, "position": position, "gain": True}
    for mechanism in ("expressive", "dot_product", "quartic")
    for position in ("rope+relative", "learned+learned_alibi+relative", "learned+sinusoidal")
]
MODELS = PAIRWISE + COMBINED


def test_any_two_values_of_any_two_parts_meet_in_some_model():
    names = ("mechanism", "position", ("norm", "norm_affine"), "gain", "bias", "qkv_bias")
    values = (MECHANISMS, POSITIONS, PARTS["norm"], *[(False, True)] * 3)

    def value(model, name):
        return model[name] if isinstance(name, str) else tuple(model[each] for each in name)

    for (one, of_one), (other, of_other) in itertools.combinations(zip(names, values, strict=True), 2):
        met = {(value(model, one), value(model, other)) for model in PAIRWISE}
        assert met == set(itertools.product(of_one, of_other)), (one, other)


def make_members(count: int = 3, **options: object) -> list[Transformer]:
    """Models in float64 whose parameters all differ, also those that start at 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)  # of what the models themselves draw
    members = []
    for _ in range(count):
        model = Transformer(5, 6, 8, 2, 2, activation="relu", **options).double()
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(parameter.detach().round(decimals=0) + 0.4 * noise)
        members.append(model)
    return members


def make_tokens(members: int = 3) -> torch.Tensor:
    return torch.randint(5, (members, 4, 6), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("options", MODELS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_member_computes_what_its_own_model_computes(options):
    members, tokens = make_members(**options), make_tokens()
    whole = stack(members)
    logits = whole(tokens)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits.backward(upstream)
    grads = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for index, model in enumerate(members):
        alone = model(tokens[index])
        torch.testing.assert_close(logits[index], alone, rtol=1e-10, atol=1e-10)
        alone.backward(upstream[index])
        assert grads.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name][index], parameter.grad, rtol=1e-10, atol=1e-10)


def test_norms_keep_the_number_that_guards_their_division():
    members = [nn.LayerNorm(4, eps=0.5), nn.LayerNorm(4, eps=0.5)]
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(stack(members)(x), torch.stack([f(part) for f, part in zip(members, x, strict=True)]))


def test_members_differ():
    logits = stack(make_members())(make_tokens()[:1].expand(3, -1, -1))
    assert (logits[0] - logits[1]).abs().min() > 0
    assert (logits[1] - logits[2]).abs().min() > 0


def test_the_stacked_models_stay_as_they_were():
    members = make_members()
    before = copy.deepcopy(members)
    whole = stack(members)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.zero_()
    for model, old in zip(members, before, strict=True):
        for mine, theirs in zip(model.parameters(), old.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_member_state_is_that_of_the_member():
    members = make_members(norm_affine=True, position="learned", gain=True)
    whole = stack(members)
    for index, model in enumerate(members):
        state = member_state(whole, index)
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())
    other = make_members()[0]
    member_state(stack([other]), 0)["head.weight"].zero_()
    assert other.head.weight.abs().min() > 0


def test_member_state_is_a_copy():
    whole = stack(make_members())
    state = member_state(whole, 1)
    before = state["head.weight"].clone()
    with torch.no_grad():
        whole.get_parameter("head.weight").zero_()
    assert torch.equal(state["head.weight"], before)


@pytest.mark.parametrize(
    ("module", "name"), [(nn.Conv1d(2, 2, 1), "Conv1d"), (nn.Sequential(nn.Linear(2, 2), nn.PReLU()), "PReLU")]
)
def test_a_module_with_unknown_parameters_is_refused(module, name):
    with pytest.raises(TypeError, match=name):
        stack([module, copy.deepcopy(module)])


def test_no_members_are_refused():
    with pytest.raises(ValueError, match="members"):
        stack([])
