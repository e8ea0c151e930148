import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expressive_attention import expressive_attention, expressive_attention_varlen
from expressive_attention.geometry import MEASURES, Record, capture, measures
from expressive_attention.geometry.record import ANGLES
from expressive_attention.integrations import convert
from expressive_attention.nn import MultiheadAttention, Transformer, alibi_bias


def model_of(mechanism, position="rope"):
    torch.manual_seed(0)
    model = Transformer(8, 12, 16, 2, 2, mechanism, position=position).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return model


IDS = torch.randint(8, (5, 12), generator=torch.Generator().manual_seed(1))
NAMES = ["blocks.0.attention", "blocks.1.attention"]
FORM = {"expressive": "expressive", "squared": "squared", "dot_product": "softmax"}


def seen_by(module, model, ids):
    """Queries, keys and bias of an attention module, from its own code.

    The bias of ALiBi that softmax is given lacks a term of each query, which does not change its weights.
    """
    found = []
    handle = module.register_forward_pre_hook(
        lambda m, args: found.append((m.heads(args[0]), m.position_bias(args[0])))
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    (q, k, _), bias = found[0]
    if bias is not None and module.mechanism != "dot_product":
        bias = alibi_bias(module.num_heads, q.shape[-2], k.shape[-2])
    return q.double(), k.double(), bias if bias is None else bias.double()


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("mechanism", FORM)
def test_measures_are_those_of_a_direct_computation(mechanism, position):
    model = model_of(mechanism, position)
    with torch.no_grad():
        before = model(IDS)
        with capture(model) as record:
            assert torch.equal(model(IDS), before)
    assert list(record.layers) == NAMES
    for name in NAMES:
        q, k, bias = seen_by(model.get_submodule(name), model, IDS)
        z = q @ k.mT * q.shape[-1] ** -0.5
        keep = torch.ones(12, 12, dtype=torch.bool).tril()
        form = FORM[mechanism]
        a = measures.attention(z, form, bias, keep)
        layer = record.layer(name)
        assert (layer.form, layer.heads, layer.dim) == (form, 2, 8)
        found = layer.measures()
        assert list(found) == list(MEASURES)
        pairs = 5 * 12 * 13 / 2
        effective = measures.effective_keys(a)
        total = lambda x: x.sum((0, 2, 3))  # noqa: E731
        wanted = {
            "antiparallel": total(a * (z < 0)) / total(a),
            "effective_keys": effective.mean((0, 2)),
            "evenness": (effective / torch.arange(1, 13)).mean((0, 2)),
            "sink": a[:, :, 1:, 0].mean((0, 2)),
            "saturated": total((measures.saturated(z, a, form) & keep).double()) / pairs,
            "score_rms": (total(z.square() * keep) / pairs).sqrt(),
            "log_normalizer": measures.log_normalizer(z, form, bias, keep).mean((0, 2)),
            "empty": torch.zeros(2, dtype=torch.float64),
        }
        for side, x in (("query", q), ("key", k)):
            vectors = x.transpose(0, 1).flatten(1, 2)
            wanted[f"{side}_norm"] = vectors.norm(dim=-1).mean(-1)
            wanted[f"{side}_dimensions"] = measures.participation_ratio(vectors.mT @ vectors)
            wanted[f"{side}_rank"] = measures.numerical_rank(vectors.mT @ vectors).double()
        for measure, value in wanted.items():
            torch.testing.assert_close(found[measure], value, rtol=1e-5, atol=1e-5, msg=measure)
        # Histograms: every pair once, and every query's attention once.
        assert layer.pairs.sum((1, 2)).tolist() == [pairs, pairs]
        torch.testing.assert_close(layer.mass.sum((1, 2)), torch.full((2,), 60.0, dtype=torch.float64))
        cos = measures.cosine(q, k)
        for head in range(2):
            counted = torch.histogram(cos[:, head][keep.expand(5, 12, 12)], ANGLES).hist
            assert (layer.pairs[head].sum(-1) - counted).abs().sum() <= 4  # pairs at an edge
        # Maps of kept examples.
        for example in range(5):
            torch.testing.assert_close(layer.scores(example).double(), z[example], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.attention(example).double(), a[example], rtol=1e-5, atol=1e-5)


class Cross(nn.Module):
    """Grouped queries, a padding mask, and queries at the end of their keys."""

    def forward(self, q, k, mask):
        return expressive_attention(
            q, k, k, mask, is_causal=True, causal_alignment="lower_right", enable_gqa=True, scale=-0.3
        )


def test_masks_and_groups():
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 6, 8)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., :4] = False
    model = Cross()
    with capture(model) as record:
        model(q, k, mask)
    layer = record.layer("")
    keep = mask & torch.ones(3, 6, dtype=torch.bool).tril(3)
    assert layer.head_name(3) == "head.3"
    assert layer.pairs.sum((1, 2)).tolist() == [keep.sum().item()] * 4
    assert layer.measures()["empty"].tolist() == pytest.approx([1 / 6] * 4)  # all keys that it might see are padding
    eye = torch.eye(6).expand(2, 2, 6, 6)
    wanted = expressive_attention(
        q, k, eye, mask, is_causal=True, causal_alignment="lower_right", enable_gqa=True, scale=-0.3
    )
    for example in range(2):
        torch.testing.assert_close(layer.attention(example), wanted[example])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_multi_head_attention_is_seen(ours, weights):
    kind = MultiheadAttention if ours else nn.MultiheadAttention
    model = nn.ModuleDict({"attn": kind(8, 2, batch_first=True)}).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), capture(model, "attn") as record:
        found = model["attn"](x, x, x, key_padding_mask=padding, need_weights=weights, average_attn_weights=False)
        plain = found[1]
    layer = record.layer("attn")
    assert layer.form == ("expressive" if ours else "softmax")
    assert layer.pairs.sum((1, 2)).tolist() == [40.0, 40.0]
    if weights:
        for example in range(2):
            torch.testing.assert_close(layer.attention(example), plain[example])


def test_layers_of_torch_are_seen_in_evaluation():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), capture(model) as record:
        model(x)
    assert list(record.layers) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_models_of_transformers_before_and_after_the_switch():
    pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    from tests.integrations.torchvision_stub import make_importable

    make_importable()
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_head=4, n_layer=2, n_positions=32)).eval()
    ids = torch.randint(50, (2, 9))
    for form in ("softmax", "expressive"):
        with torch.no_grad(), capture(model, "*.1.*") as record:
            model(ids)
        assert list(record.layers) == ["transformer.h.1.attn"]
        assert record.layer("transformer.h.1.attn").form == form
        assert next(record.rows())["name"] == "transformer.h.1.attn.head.0"
        if form == "softmax":
            convert(model)


def test_a_sample_of_queries_is_enough_and_memory_is_bounded():
    q, k = torch.randn(1, 2, 4096, 8), torch.randn(1, 2, 4096, 8)

    class Whole(nn.Module):
        def forward(self):
            return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    model = Whole()
    records = []
    for pairs in (2**18, 2**30):
        with capture(model, pairs=pairs, max_tokens=64) as record:
            for _ in range(4 if pairs < 2**30 else 1):
                model()
        records.append(record.layer(""))
    sampled, exact = (layer.measures() for layer in records)
    assert records[0].sums["queries"].tolist() == [256.0, 256.0]
    for name in ("antiparallel", "evenness", "score_rms"):
        torch.testing.assert_close(sampled[name], exact[name], rtol=0.1, atol=0.01)
    assert records[0].query.shape == (1, 2, 64, 8)
    assert records[0].keep.shape == (1, 1, 64, 64)


def test_a_record_is_saved_loaded_and_gone_on_with(tmp_path):
    model = model_of("expressive")
    with torch.no_grad(), capture(model) as record:
        model(IDS)
    record.save(tmp_path / "record.safetensors")
    again = Record.load(tmp_path / "record.safetensors")
    assert str(again) == str(record)
    assert torch.equal(again.layer(NAMES[1]).attention(3), record.layer(NAMES[1]).attention(3))
    other = IDS.flip(0, 1)
    with torch.no_grad(), capture(model, into=again):
        model(other)
    with torch.no_grad(), capture(model) as both:
        model(IDS)
        model(other)
    assert str(both) == str(again) != str(record)
    assert str(again).splitlines()[1].startswith("blocks.0.attention.head.0  expressive")
    with pytest.raises(FileNotFoundError, match="missing"):
        record.save(tmp_path / "missing" / "record.safetensors")


def test_heads_that_tell_no_key_from_another_are_dead():
    model = model_of("expressive")
    attention = model.get_submodule(NAMES[0])
    with torch.no_grad(), capture(model) as record:
        model(IDS)
        assert not any(layer.dead.any() for layer in record.layers.values())

    class Even(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q * 1e-3, q, q)

    even = Even()
    with capture(even) as record:
        even(torch.randn(1, 2, 6, 4))
    assert record.layer("").dead.tolist() == [True, True]
    assert attention.mechanism == "expressive"


def test_bad_input_is_named(tmp_path):
    model = model_of("expressive")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"), capture(3):
        pass
    with (
        pytest.raises(ValueError, match="max_tokens must be an integer of at least 1, got 0"),
        capture(model, max_tokens=0),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"layers must name modules of the model, got 'blokcs\.0'"),
        capture(model, "blokcs.0"),
    ):
        model(IDS)
    with (
        pytest.raises(
            ValueError, match=r"modules that attend, blocks\.0\.attention, blocks\.1\.attention, got blocks\.0"
        ),
        capture(model, "blocks.0"),
    ):
        model(IDS)
    with pytest.raises(TypeError, match="layers must be names of modules, got 3"), capture(model, [3]):
        pass
    with pytest.raises(TypeError, match="into must be a Record or None, got dict"), capture(model, into={}):
        pass
    with pytest.raises(ValueError, match="no attention was seen of Linear"), capture(nn.Linear(2, 2)):
        pass
    with (
        pytest.raises(ValueError, match=r"the batch must not be empty, but blocks\.0\.attention was given"),
        torch.no_grad(),
        capture(model),
    ):
        model(IDS[:0])
    with torch.no_grad(), capture(model, max_tokens=2 * IDS.shape[1]) as record:
        model(IDS)
    with pytest.raises(IndexError, match="example 2: 2 are kept; capture"):
        record.layer("blocks.0.attention").attention(2)
    with torch.no_grad(), capture(model) as record:
        model(IDS)
    with (
        pytest.raises(ValueError, match="the record is of another model: Linear has no blocks"),
        capture(nn.Linear(2, 2), into=record),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match=r"was expressive with 2 heads of 8 and scale 0\.3536, and is now softmax with 2 of 8"
        ),
        torch.no_grad(),
        capture(other := model_of("dot_product"), into=record),
    ):
        other(IDS)
    deeper = Transformer(8, 12, 16, 3, 2, "expressive", position="rope")
    with (
        pytest.raises(ValueError, match="the record is of another model: this Transformer has other modules"),
        capture(deeper, into=record),
    ):
        pass
    with pytest.raises(ValueError, match=r"layer must be one of \['blocks\.0"):
        record.layer("head")
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight.fill_(torch.nan)
    with (
        pytest.raises(ValueError, match=r"queries of blocks\.1\.attention hold NaN"),
        torch.no_grad(),
        capture(model),
    ):
        model(IDS)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="path must be a file that Record"):
        Record.load(tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("no tensors here")
    with pytest.raises(ValueError, match=r"path must be a file that Record.* got .*notes\.txt"):
        Record.load(tmp_path / "notes.txt")


class Calls(nn.Module):
    """Passes its arguments on to a function that attends."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def test_the_sink_of_a_decoding_step():
    model = Calls(F.scaled_dot_product_attention)
    key = torch.randn(1, 1, 50, 8)
    key[:, :, 0] = 10
    with capture(model) as record:
        model(torch.ones(1, 1, 1, 8), key, key)
    layer = record.layer("")
    torch.testing.assert_close(layer.measures()["sink"][0].float(), layer.attention()[0, 0, 0])
    assert layer.measures()["sink"][0] > 0.9


@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        ((4, 2, 5, 8), (1, 2, 5, 8), None),
        ((2, 3, 2, 5, 8), (2, 3, 2, 5, 8), (1, 3, 1, 5, 5)),
        ((2, 5, 8), (2, 6, 8), (5, 6)),
        ((4, 2, 5, 8), (4, 2, 5, 8), (1, 5)),
    ],
)
def test_shapes_that_torch_broadcasts(query, key, mask):
    q, k = torch.randn(query), torch.randn(key)
    keep = None if mask is None else torch.rand(mask) > 0.3
    model = Calls(F.scaled_dot_product_attention)
    with capture(model) as record:
        model(q, k, k, keep)
    z = q @ k.mT * 8**-0.5
    a = z.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num() if mask else z.softmax(-1)
    shown = torch.stack([record.layer("").attention(i) for i in range(len(record.layer("").query))])
    torch.testing.assert_close(shown, a.reshape(shown.shape))


def test_keys_that_nothing_sees_do_not_count():
    q, k = torch.randn(2, 3, 2, 5, 8).unbind(0)
    k[:, :, 3:] = 100.0
    model = Calls(F.scaled_dot_product_attention)
    keep = (torch.arange(5) < 3)[None, None, None]
    with capture(model) as padded, torch.no_grad():
        model(q, k, k, keep.expand(3, 1, 5, 5))
    lengths = Calls(expressive_attention)
    with capture(lengths) as filled:
        lengths(q, k, k, key_lengths=torch.full((3,), 3))
    with capture(model) as short:
        model(q, k[:, :, :3], k[:, :, :3])
    wanted = short.layer("").measures()
    for record in (padded, filled):
        found = record.layer("").measures()
        for name in ("key_norm", "key_rank", "key_dimensions"):
            torch.testing.assert_close(found[name], wanted[name])


def test_windows_slopes_and_packed_sequences_are_seen():
    """Their masks are made for the queries that are looked at alone."""
    q, k = torch.randn(2, 1, 2, 9, 8).unbind(0)
    slopes, starts = torch.tensor([0.2, 1.0]), torch.tensor([0, 4, 9])
    one = {"window_size": (3, 0), "alibi_slopes": slopes}
    model = Calls(expressive_attention)
    with capture(model) as record:
        model(q, k, k, **one)
    i = torch.arange(9)
    distance = i[:, None] - i
    bias = (-slopes[:, None, None] * distance).masked_fill((distance < 0) | (distance > 3), -torch.inf)

    def weights(bias):
        w = measures.weight(q[0] @ k[0].mT * 8**-0.5, "expressive") * bias.exp()
        return w / w.sum(-1, keepdim=True)

    torch.testing.assert_close(record.layer("").attention(), weights(bias))
    expected = measures.log_normalizer(q[0] @ k[0].mT * 8**-0.5, "expressive", bias, bias > -torch.inf)
    torch.testing.assert_close(record.layer("").log_normalizer(), expected)
    table = torch.zeros(2, 17).copy_(-slopes[:, None] * (torch.arange(17) - 8).abs())
    for same in ({"relative_bias": table}, {"alibi_slopes": slopes.clone().requires_grad_()}):
        with capture(model) as record:
            model(q, k, k, window_size=(3, 0), **same)
        torch.testing.assert_close(record.layer("").attention(), weights(bias))
    packed = Calls(expressive_attention_varlen)
    with capture(packed) as record:
        packed(*(x[0].transpose(0, 1) for x in (q, k, k)), starts, starts, 5, 5, causal=True)
    apart = (i[:, None] < 4) != (i < 4)
    bias = torch.zeros(2, 9, 9).masked_fill(apart | (distance < 0), -torch.inf)
    torch.testing.assert_close(record.layer("").attention(), weights(bias))


def test_similarity_of_the_heads_of_two_models():
    records = []
    for mechanism in ("expressive", "dot_product"):
        model = model_of(mechanism)
        with torch.no_grad(), capture(model) as record:
            model(IDS)
        records.append(record.layer(NAMES[0]))
    same, other = records[0].similarity(records[0]), records[0].similarity(records[1])
    torch.testing.assert_close(same.diagonal(), torch.ones(2))
    a, b = (torch.stack([layer.attention(i) for i in range(5)]) for layer in records)
    torch.testing.assert_close(other, measures.head_similarity(a, b))
    with torch.no_grad(), capture(model) as record:
        model(IDS[:, :7])
    with pytest.raises(ValueError, match="attention to the same tokens"):
        records[0].similarity(record.layer(NAMES[0]))
