import pytest
import torch

pytest.importorskip("x_transformers", reason="needs the extra 'x-transformers'")

from x_transformers import Decoder, Encoder, TransformerWrapper

from expressive_attention.integrations import ConversionError, convert
from expressive_attention.integrations.x_transformers import attn_fn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

IDS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(5))


def language_model(layers=Decoder, **options):
    body = layers(dim=16, depth=2, heads=4, attn_dim_head=4, **options)
    return TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=body).double().eval()


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"rotary_pos_emb": True, "rotary_emb_dim": 4}, {"alibi_pos_bias": True}, {"attn_kv_heads": 2}]
)
def test_a_model_is_switched_and_restored(flash, options):
    model = language_model(attn_flash=flash, **options)
    with torch.no_grad():
        before = model(IDS)
    conversion = convert(model)
    assert str(conversion.verify(IDS)) == "EA ran in 2/2 layers"
    with torch.no_grad():
        found = model(IDS)
        assert not torch.allclose(found, before, atol=1e-3)
        other = torch.cat([IDS[:, :6], torch.randint(20, (2, 3))], 1)
        assert torch.equal(model(other)[:, :6], found[:, :6])  # the future does not leak
        conversion.undo()
        assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("layers", [Decoder, Encoder])
def test_the_function_for_the_constructor_is_the_same_attention(form, layers):
    model = language_model(layers, attn_custom_attn_fn=attn_fn(form))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    with torch.no_grad():
        wanted = model(IDS, mask=mask)
        convert(model, form=form)
        torch.testing.assert_close(model(IDS, mask=mask)[mask], wanted[mask], rtol=1e-9, atol=1e-9)


def test_biases_are_in_log_weight_space():
    model = language_model(attn_flash=True, alibi_pos_bias=True)
    plain = language_model(alibi_pos_bias=True)
    plain.load_state_dict(model.state_dict())
    seen = []
    attend = model.attn_layers.layers[0][1].attend
    attend.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    attend.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    convert(model)
    convert(plain)
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
    ((q, k, v), settings), output = seen
    assert settings["attn_bias"] is not None
    z = q @ k.mT * 0.5
    weights = z**2 / (1 + z**2) * settings["attn_bias"].exp() * torch.ones(9, 9).tril()
    torch.testing.assert_close(output, weights / weights.sum(-1, keepdim=True) @ v)


def test_small_and_large_scores_keep_their_shares():
    scores = torch.tensor([[1e-25, 2e-25, torch.finfo(torch.float32).min], [1e25, 1.0, 0.0], [0.0, 0.0, 0.0]])
    wanted = torch.tensor([[0.2, 0.8, 0.0], [2 / 3, 1 / 3, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(attn_fn()(scores), wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_softclamp_logits": True}, "it has soft clamped scores, which EA does not define"),
        ({"attn_sigmoid": True}, "it has weights of another kind"),
        ({"attn_sparse_topk": 2}, "it has weights of another kind"),
        ({"residual_attn": True}, "it has residual attention, which EA does not define"),
        ({"attn_pre_talking_heads": True}, "it has talking heads, which EA does not define"),
    ],
)
def test_options_that_are_not_defined_are_refused(options, words):
    with pytest.raises(ConversionError, match=words):
        convert(language_model(**options))


def test_arguments_that_are_not_defined_are_refused():
    model = language_model()
    convert(model)
    attend, q = model.attn_layers.layers[0][1].attend, torch.randn(1, 4, 3, 4)
    with pytest.raises(NotImplementedError, match="Attend was given prev_attn, which EA does not define"):
        attend(q, q, q, prev_attn=torch.randn(1, 4, 3, 3))
