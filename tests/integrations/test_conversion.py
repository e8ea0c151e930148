import copy
import pickle
import sys
from threading import Thread
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrize

from expressive_attention.integrations import ConversionError, convert, expressive_sdpa, functional, switching
from expressive_attention.integrations.conversion import _PROJECTION
from tests.oldest import not_on_oldest


class Attn(nn.Module):
    """Calls torch's attention."""

    def __init__(self, width=8):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        return helper(*self.qkv(x).chunk(3, -1))


def helper(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class OwnAttention(nn.Module):
    """Computes softmax by itself."""

    def __init__(self, width=8):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.mT, -1) @ v


class SecretAttention(Attn):
    """Names torch's attention, and goes another way."""

    secret = True

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.secret:
            return (q @ k.mT).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


def test_the_table_says_what_was_done_and_verify_proves_it():
    model = nn.Sequential(Attn(), nn.Linear(8, 8), Attn())
    before = model(X)
    conversion = convert(model)
    assert str(conversion).splitlines() == [
        "layer  class",
        "0      Attn   its calls of torch's attention are replaced",
        "2      Attn   its calls of torch's attention are replaced",
        "2 of 2 attention layers switched, form 'expressive'",
    ]
    found = conversion.verify(X)
    assert str(found) == "EA ran in 2/2 layers"
    assert (found.calls, found.softmax, found.idle) == ({"0": 1, "2": 1}, {}, ())
    after = model(X)
    with expressive_sdpa():
        conversion.undo()
        assert torch.equal(model(X), after)
    assert torch.equal(model(X), before)
    assert [type(module) for module in model] == [Attn, nn.Linear, Attn]
    assert all("_expressive_form" not in vars(module) for module in model)
    assert str(conversion).endswith("undone")
    conversion.undo()
    with pytest.raises(ConversionError, match="has been undone"):
        conversion.verify(X)


def test_the_squared_form():
    model, same = nn.Sequential(Attn()), nn.Sequential(Attn())
    same.load_state_dict(model.state_dict())
    convert(model, form="squared")
    with expressive_sdpa("squared"):
        assert torch.equal(model(X), same(X))


def test_layers_are_chosen_by_name_or_pattern():
    model = nn.ModuleDict({"a": nn.Sequential(Attn(), Attn()), "b": nn.Sequential(Attn())})
    model.forward = lambda x: model["b"](model["a"](x))
    for layers, names in (("a.0", ["a.0"]), (["a.*"], ["a.0", "a.1"]), (["a.1", "b.0"], ["a.1", "b.0"])):
        conversion = convert(model, layers=layers)
        assert [layer.name for layer in conversion.switched] == names
        found = conversion.verify(X)
        assert found.calls == dict.fromkeys(names, 1)
        assert set(found.softmax) == {"a.0", "a.1", "b.0"} - set(names)
        assert str(found).startswith(f"EA ran in {len(names)}/{len(names)} layers; softmax ran in: ")
        conversion.undo()
    with pytest.raises(
        ValueError, match=r"layers must name attention layers, got 'c.\*'; the model has: a.0, a.1, b.0"
    ):
        convert(model, layers=["a.*", "c.*"])


def test_a_layer_that_computes_softmax_by_itself_is_an_error_and_nothing_changes():
    model = nn.Sequential(Attn(), OwnAttention())
    words = r"1 of 2 attention layers cannot be switched: 1 \(OwnAttention\): it computes softmax by itself"
    with pytest.raises(ConversionError, match=words):
        convert(model)
    assert type(model[0]) is Attn
    conversion = convert(model, strict=False)
    assert str(conversion).splitlines()[2] == "1      OwnAttention  left alone: it computes softmax by itself"
    assert str(conversion.verify(X)) == "EA ran in 1/1 layers; softmax ran in: 1"
    with pytest.raises(ConversionError, match=r"OwnAttention has no attention layer .* by itself"):
        convert(OwnAttention(), strict=False)


def test_a_layer_that_turns_out_to_run_softmax_is_named():
    model = nn.Sequential(Attn(), SecretAttention())
    conversion = convert(model)
    with pytest.raises(ConversionError, match="EA ran in 1/2 layers; not in: 1"):
        conversion.verify(X)
    model[1].secret = False
    assert str(conversion.verify(X)) == "EA ran in 2/2 layers"
    conversion.undo()
    model[1].secret = True
    assert str(convert(model, strict=False).verify(X)) == "EA ran in 1/2 layers; not in: 1; softmax ran in: 1"


def test_layers_that_a_pass_does_not_reach_are_told():
    model = nn.ModuleDict({"used": Attn(), "other": Attn()})
    model.forward = lambda x: model["used"](x) if x is not None else None
    conversion = convert(model)
    assert str(conversion.verify(X)) == "EA ran in 1/2 layers; not reached: other"
    with pytest.raises(ConversionError, match="EA ran in 0/2 layers"):
        conversion.verify(None)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ConversionError, match=r"Linear has no attention layer that can be switched; .*expressive_sdpa"):
        convert(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got function"):
        convert(helper)
    with pytest.raises(ValueError, match="form must be one of"):
        convert(Attn(), form="softmax")


def test_what_is_switched_is_not_switched_twice():
    model = nn.Sequential(Attn(), Attn())
    first = convert(model, layers="0")
    with pytest.raises(ConversionError, match=r"1 of 2 .*: 0 \(ExpressiveAttn\): it is switched already"):
        convert(model)
    second = convert(model, strict=False)
    assert [layer.name for layer in second.switched] == ["1"]
    second.undo()
    first.undo()
    assert [type(module) for module in model] == [Attn, Attn]


def test_an_error_in_the_middle_changes_nothing(monkeypatch):
    model = nn.Sequential(Attn(), Attn())

    def only_once(module, mixin, form):
        if module is model[1]:
            raise RuntimeError("no more")
        return switching.switch(module, mixin, form)

    monkeypatch.setattr(functional, "give_class", only_once)
    with pytest.raises(RuntimeError, match="no more"):
        convert(model)
    assert [type(module) for module in model] == [Attn, Attn]


def test_copies_of_a_switched_model_are_switched():
    model = nn.Sequential(Attn())
    convert(model)
    wanted = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), wanted)
        assert type(twin[0]) is type(model[0])
        assert isinstance(twin[0], Attn)


def test_gradients_state_and_training_are_those_of_the_parameters():
    model = nn.Sequential(Attn())
    state = model.state_dict()
    convert(model)
    after = model.state_dict()
    assert after.pop("0.expressive_attention_form") == 0
    assert after.keys() == state.keys()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(after.values(), state.values(), strict=True))
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_compile_export_checkpoint_and_functional_transforms():
    model = nn.Sequential(Attn())
    convert(model)
    wanted = model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(X), wanted)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), wanted)
    loss = lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()  # noqa: E731
    parameters = dict(model.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    whole = torch.func.grad(loss)(parameters, X)
    for name, x in whole.items():
        torch.testing.assert_close(each[name].sum(0), x, rtol=1e-4, atol=1e-5)
    x = X.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    again = X.clone().requires_grad_()
    model(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = nn.Sequential(Attn())
    convert(model)
    with torch.autocast("cpu", dtype=dtype):
        found = model(X)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), model(X), rtol=0.1, atol=0.05)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused_in_words():
    model = nn.Sequential(Attn())
    convert(model)
    for make in (torch.jit.script, lambda m: torch.jit.trace(m, X)):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.\w+ cannot .* use torch.compile or torch.export"):
            make(model)


def test_zero_projections_are_warned_of():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    torch.nn.init.zeros_(model.self_attn.in_proj_weight)
    with pytest.warns(
        UserWarning, match=r"query or key projections are zero, .*: self_attn\.in_proj_weight; initialize"
    ):
        convert(model)
    for name in (
        "q_proj.weight",
        "attention.query.weight",
        "qkv.weight",
        "c_attn.weight",
        "to_q.weight",
        "k_lin.weight",
    ):
        assert _PROJECTION.search(name), name
    for name in (
        "v_proj.weight",
        "out_proj.weight",
        "c_proj.weight",
        "to_out.0.weight",
        "linear.weight",
        "value.weight",
    ):
        assert not _PROJECTION.search(name), name


class ModuleAttention(OwnAttention):
    """Computes softmax by itself, by a module."""

    def __init__(self):
        super().__init__()
        self.share = nn.Softmax(-1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.share(q @ k.mT) @ v


class ByModule(nn.Module):
    """As many models are written: the softmax is a module that the constructor makes."""

    def __init__(self):
        super().__init__()
        self.attention = ModuleAttention()

    def forward(self, x):
        return self.attention(x)


def test_softmax_that_is_a_module_is_seen():
    with pytest.raises(ConversionError, match=r"attention \(ModuleAttention\): it computes softmax by itself"):
        convert(ByModule())


def test_softmax_outside_of_all_layers_is_told():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attn()

        def forward(self, x):
            return self.attention(x).softmax(-1)

    assert str(convert(Gated()).verify(X)) == "EA ran in 1/1 layers; softmax ran outside of all of them: 1 times"


@pytest.mark.filterwarnings("error:query or key projections are zero")
def test_an_error_after_the_switch_changes_nothing():
    model = nn.MultiheadAttention(8, 2)
    nn.init.zeros_(model.in_proj_weight)
    with pytest.raises(UserWarning, match="projections are zero"):
        convert(model)
    assert type(model) is nn.MultiheadAttention


def test_a_layer_whose_class_has_changed_since_is_not_undone():
    model = nn.Sequential(Attn(), Attn())
    before = model(X)
    conversion = convert(model)
    attention = model[1]
    attention.register_buffer("offset", torch.zeros(1))
    parametrize.register_parametrization(attention, "offset", nn.Identity())
    with pytest.raises(ConversionError, match=r"have been changed since the conversion.*: 1; take that back first"):
        conversion.undo()
    assert not torch.equal(model(X), before)
    parametrize.remove_parametrizations(attention, "offset")
    conversion.undo()
    assert torch.equal(model(X), before)


def test_a_forward_pass_that_hides_that_of_the_class_is_refused():
    model = nn.Sequential(Attn(), Attn())
    model[1].forward = model[1].forward
    with pytest.raises(ConversionError, match=r"1 \(Attn\): its forward method has been replaced"):
        convert(model)
    found = convert(model, strict=False).verify(X)
    assert found.calls == {"0": 1}
    assert found.softmax == {"1": 1}


def test_a_broken_library_matters_to_its_own_models_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.layers.attention", None)
    monkeypatch.delitem(sys.modules, "expressive_attention.integrations.timm", raising=False)
    convert(Attn())
    of_timm = type("Attention", (Attn,), {"__module__": "timm.layers.attention"})
    with pytest.raises(ImportError, match=r"timm 1\.0\.23 or newer is needed"):
        convert(of_timm())


class FlexAttention(nn.Module):
    def forward(self, x):
        return flex_attention(*[x[:, None]] * 3)[:, 0]


@not_on_oldest("no mode sees operators of higher order, such as FlexAttention")
def test_flex_attention_is_seen():
    conversion = convert(nn.Sequential(FlexAttention(), Attn(16)), strict=False)
    assert [layer.why_not for layer in conversion.layers] == ["it computes softmax by itself", ""]
    found = conversion.verify(torch.randn(2, 5, 16))
    assert found.softmax == {"0": 1}
    assert found.calls == {"1": 1}


def test_another_thread_does_not_count():
    model = nn.Sequential(Attn(), OwnAttention())
    conversion = convert(model, layers="0")

    def meanwhile(*_):
        thread = Thread(target=model, args=(X,))
        thread.start()
        thread.join()

    handle = model[0].qkv.register_forward_hook(lambda *_: (handle.remove(), meanwhile())[2:] or None)
    found = conversion.verify(X)
    assert found.calls == {"0": 1}
    assert found.softmax == {"1": 1}


@pytest.mark.parametrize("used", [False, True])
def test_softmax_that_nothing_uses_is_none_of_attention(used):
    class Wasteful(Attn):
        def forward(self, x):
            weights = (self.qkv(x) @ self.qkv(x).mT).softmax(-1)
            return super().forward(x) + (weights @ x if used else 0)

    conversion = convert(nn.Sequential(Wasteful()))
    conversion.strict = False
    assert str(conversion.verify(X)) == (
        "EA ran in 0/1 layers; not in: 0; softmax ran in: 0" if used else "EA ran in 1/1 layers"
    )


def test_the_softmax_of_a_router_is_none_of_attention():
    class Routed(Attn):
        def forward(self, x):
            shares = self.qkv(x).flatten(0, 1).softmax(-1)  # of experts, per token
            return super().forward(x) * shares.unflatten(0, x.shape[:2])[..., :8]

    assert str(convert(Routed()).verify(X)) == "EA ran in 1/1 layers"


def test_a_conversion_is_copied_with_the_model_that_holds_it_and_undone_where_it_was_made():
    model = nn.Sequential(Attn(), Attn())
    model.conversion = convert(model)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.conversion.model is twin
        assert str(twin.conversion) == str(model.conversion)
        assert str(twin.conversion.verify(x)) == "EA ran in 2/2 layers"
        with pytest.raises(ConversionError, match="a copy of a conversion cannot undo it"):
            twin.conversion.undo()
        assert torch.equal(twin(x), expected)
    model.conversion.undo()
    assert type(model[0]) is Attn
    assert type(twin[0]) is not Attn


def test_layers_that_are_gone_are_named_and_undone_where_they_are():
    model = nn.Sequential(Attn(), Attn(), Attn())
    conversion, gone = convert(model), model[2]
    model[0] = Attn()
    del model[2]
    with pytest.raises(ConversionError, match="no longer has the layers 2; convert it as it is now"):
        conversion.verify(torch.randn(2, 5, 8))
    conversion.undo()
    assert [type(layer) for layer in (*model, gone)] == [Attn] * 3


class KeyIndexer(nn.Module):
    """Weighs keys by softmax, to choose some."""

    def forward(self, x):
        return (x.unsqueeze(1).softmax(-1) * x.unsqueeze(1)).sum(-1) > 0


class ChoosingAttn(Attn):
    """Attention to keys that a part of it has chosen."""

    def __init__(self):
        super().__init__()
        self.indexer = KeyIndexer()

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, self.indexer(x).unsqueeze(-2)).squeeze(1)


def test_softmax_that_chooses_keys_is_told_and_is_no_error():
    model, x = nn.Sequential(ChoosingAttn(), Attn()), torch.randn(2, 5, 8)
    conversion = convert(model)
    found = conversion.verify(x)
    assert found.calls == {"0": 1, "1": 1}
    assert found.softmax == {"0.indexer": 1}
    assert not found.failed
    assert str(found) == "EA ran in 2/2 layers; softmax ran in: 0.indexer"
