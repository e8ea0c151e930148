"""A switched layer that computes softmax after all raises an error that names it and what has changed."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from expressive_attention import expressive_attention
from expressive_attention.integrations import ConversionError, convert
from tests.oldest import not_on_oldest

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")]

X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Attn(nn.Module):
    """Calls torch's attention; `way` says what else it may do."""

    way = ""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, dtype=torch.float64)
        self.kept = None

    def forward(self, x):
        if len(x) == 0:
            return x
        if self.kept is not None:
            return self.qkv(self.kept)[..., :8]
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.way == "softmax":
            return torch.softmax(q @ k.mT, -1) @ v
        if self.way == "by hand":
            weights = (q @ k.mT).exp()
            return weights / weights.sum(-1, keepdim=True) @ v
        return F.scaled_dot_product_attention(q, k, v)


def by_definition(layer, x):
    q, k, v = layer.qkv(x).chunk(3, -1)
    z = q @ k.mT / 8**0.5
    weights = z**2 / (1 + z**2)
    return weights / weights.sum(-1, keepdim=True) @ v


def switched(way=""):
    model = nn.Sequential(Attn(), Attn())
    conversion = convert(model)
    model[1].way = way
    return model, conversion


@pytest.mark.parametrize("way", ["softmax", "by hand"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_way_that_computes_softmax_is_an_error_that_names_layer_and_change(way, mode):
    model, conversion = switched()
    with mode():
        torch.testing.assert_close(model(X), by_definition(model[1], by_definition(model[0], X)))
        model[1].way = way
        with pytest.raises(
            ConversionError, match=rf"^1 \(ExpressiveAttn\) .* softmax \(\w+\) .*way was None and is '{way}'"
        ):
            model(X)
        model[1].way = ""
        torch.testing.assert_close(model(X), by_definition(model[1], by_definition(model[0], X)))
        model[1].way = way
        conversion.undo()
        model(X)


def test_a_layer_that_skips_attention_is_left_in_peace():
    model, _ = switched()
    assert model(X[:0]).shape == (0, 5, 8)
    model[0].kept = X
    torch.testing.assert_close(model[0](X), model[0].qkv(X)[..., :8])


def test_an_error_in_a_layer_is_the_error_that_is_raised():
    model, _ = switched()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(X[..., :7])
    model[0].kept = None
    torch.testing.assert_close(model[0](X), by_definition(model[0], X))


def test_a_forward_pass_that_is_replaced_afterwards_is_seen():
    model, _ = switched()
    model[0].forward = lambda x: by_definition(model[0], x)
    model(X)  # whatever it is, it is no softmax
    model[0].forward = lambda x: F.scaled_dot_product_attention(x, x, x)
    with pytest.raises(
        ConversionError, match=r"\(scaled_dot_product_attention\) .*forward was 'that of its class' and is"
    ):
        model(X)
    kept = type(model[1]).forward.__get__(model[1])
    model[0].forward, model[1].forward = kept, kept
    torch.testing.assert_close(model(X), by_definition(model[1], by_definition(model[1], X)))


def test_a_class_is_not_replaced_afterwards():
    model, conversion = switched()
    with pytest.raises(ConversionError, match=r"^1 \(ExpressiveAttn\) .* and the class Attn would take that away"):
        model[1].__class__ = Attn
    torch.testing.assert_close(model(X), by_definition(model[1], by_definition(model[0], X)))
    # A subclass, as those of FSDP and parametrizations, keeps the guard.
    model[1].__class__ = type("Sharded", (type(model[1]),), {})
    torch.testing.assert_close(model(X), by_definition(model[1], by_definition(model[0], X)))
    model[1].way = "softmax"
    with pytest.raises(ConversionError, match="way was None and is 'softmax'"):
        model(X)
    model[1].__class__ = type(model[1]).__base__
    conversion.undo()
    assert type(model[1]) is Attn
    model[1].__class__ = nn.Module


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_guard_themselves(twin):
    model = twin(switched()[0])
    torch.testing.assert_close(model(X), by_definition(model[1], by_definition(model[0], X)))
    model[1].way = "softmax"
    with pytest.raises(ConversionError, match=r"^1 "):
        model(X)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_is_compiled_is_guarded_when_it_is_traced(fullgraph):
    model, _ = switched()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), model(X))
    model[1].way = "softmax"
    torch.compiler.reset()
    with pytest.raises((ConversionError, torch._dynamo.exc.Unsupported)) as caught:
        torch.compile(model, fullgraph=fullgraph, backend="eager")(X)
    if not fullgraph:
        assert caught.type is ConversionError


def test_what_other_threads_compute_does_not_count():
    model, _ = switched()
    other = threading.Thread(target=lambda: torch.softmax(X, -1))

    def meanwhile(*_):
        if not other.is_alive() and other.ident is None:
            other.start()
            other.join()

    model[0].qkv.register_forward_hook(meanwhile)
    model[0].kept = X
    model[0](X)
    assert other.ident is not None


def test_a_second_pass_of_checkpointing_is_guarded_like_the_first():
    model, _ = switched()
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    y = X.clone().requires_grad_()
    by_definition(model[1], by_definition(model[0], y)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    model[1].way = "softmax"
    with pytest.raises(ConversionError):
        checkpoint(model, x, use_reentrant=False)


def test_undo_under_a_forward_pass_that_was_put_on_later_is_refused():
    model, conversion = switched()
    model[1].forward = model[1].forward
    with pytest.raises(
        ConversionError, match=r"replaced since the conversion, as hooks of accelerate do: 1; take that"
    ):
        conversion.undo()
    torch.testing.assert_close(model(X), by_definition(model[1], by_definition(model[0], X)))
    del model[1].forward
    conversion.undo()
    torch.testing.assert_close(model[0](X), F.scaled_dot_product_attention(*model[0].qkv(X).chunk(3, -1)))


def test_undo_takes_the_guard_away():
    model, conversion = switched("softmax")
    conversion.undo()
    assert type(model[0]) is Attn
    assert all(not name.startswith("_expressive") for name in vars(model[0]))
    model(X)


def test_torch_layers_are_guarded():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64).eval()
    convert(model)
    before = model(X)
    model.self_attn.forward = nn.MultiheadAttention.forward.__get__(model.self_attn)
    with pytest.raises(ConversionError, match=r"^self_attn \(ExpressiveMultiheadAttention\)"):
        model(X)
    del model.self_attn.forward
    torch.testing.assert_close(model(X), before)


def test_diffusers_processors_that_are_set_later():
    pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")
    from .test_diffusers import UNET_INPUTS, unet

    model = unet()
    convert(model)
    with torch.no_grad():
        before = model(*UNET_INPUTS)[0]
        model.set_attention_slice("auto")
        with pytest.raises(ConversionError, match="processor was 'AttnProcessor2_0' and is 'SlicedAttnProcessor'"):
            model(*UNET_INPUTS)
        model.set_attention_slice(None)
        torch.testing.assert_close(model(*UNET_INPUTS)[0], before)
        from diffusers.models.attention_processor import AttnProcessor

        model.set_attn_processor(AttnProcessor())
        with pytest.raises(ConversionError, match="processor was 'AttnProcessor2_0' and is 'AttnProcessor'"):
            model(*UNET_INPUTS)


def test_timm_switched_back_to_softmax_of_its_own():
    pytest.importorskip("timm", reason="needs the extra 'timm'")
    from .test_timm import IMAGES, vit

    model = vit()
    convert(model)
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(ConversionError, match=r"^blocks\.1\.attn .* fused_attn was True and is False"):
        model(IMAGES)


@pytest.mark.parametrize(
    "implementation",
    [
        "eager",
        "sdpa",
        pytest.param("flex_attention", marks=not_on_oldest("no mode sees FlexAttention in compiled code")),
    ],
)
def test_transformers_with_another_implementation(implementation):
    pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    from .transformers_models import build, inputs_of

    model, inputs = build("llama", torch.float32), inputs_of("llama")
    conversion = convert(model)
    # FlexAttention is not compiled, which takes long and comes after the error.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        before = model(**inputs)[0]
        model.set_attn_implementation(implementation)
        with pytest.raises(
            ConversionError,
            match=rf"^model\.layers\.0\.self_attn .*attn_implementation was 'expressive' and is '{implementation}'",
        ):
            model(**inputs)
        model.set_attn_implementation("expressive")
        assert torch.equal(model(**inputs)[0], before)
        conversion.undo()
        model.set_attn_implementation("eager")
        model(**inputs)


@pytest.mark.parametrize("where", ["everywhere", "in the table of the layer's module"])
def test_an_entry_of_transformers_that_is_replaced_afterwards(where):
    pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    from transformers import AttentionInterface
    from transformers.models.llama import modeling_llama

    from .transformers_models import build, inputs_of

    def attention(_, query, key, value, *args, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2), None

    model, inputs = build("llama", torch.float32), inputs_of("llama")
    convert(model)
    table = modeling_llama.ALL_ATTENTION_FUNCTIONS
    ours = table["expressive"]

    def wrapped(*args, **kwargs):
        return ours(*args, **kwargs)

    register = AttentionInterface.register if where == "everywhere" else table.__setitem__
    with torch.no_grad():
        before = model(**inputs)[0]
        try:
            register("expressive", attention)
            with pytest.raises(
                ConversionError,
                match=r"^model\.layers\.0\.self_attn .*\(scaled_dot_product_attention\).*the entry 'expressive' of "
                "transformers' attention interface was that of this package and is attention",
            ):
                model(**inputs)
            register("expressive", wrapped)  # which calls expressive attention
            assert torch.equal(model(**inputs)[0], before)
        finally:
            table._local_mapping.pop("expressive", None)
            AttentionInterface.register("expressive", ours)
        assert torch.equal(model(**inputs)[0], before)


def test_a_way_through_a_layer_of_transformers_that_few_calls_take():
    transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    config = transformers.FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.FalconForCausalLM(config).eval()
    conversion = convert(model)
    ids = torch.randint(64, (1, 5))
    assert str(conversion.verify(ids)) == "EA ran in 2/2 layers"
    with pytest.raises(
        ConversionError, match=r"h\.0\.self_attention .* softmax \(softmax\) .*nothing of it has changed"
    ):
        model(ids, output_attentions=True)


def test_the_functions_of_one_layer_run_as_they_do_without_the_guard():
    layer, q = Attn(), X[:, None]
    convert(layer)
    found = torch.func.vmap(lambda x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)))(q)
    torch.testing.assert_close(found, by_definition(layer, q))
    assert torch.equal(layer(X), expressive_attention(*layer.qkv(X).chunk(3, -1)))
