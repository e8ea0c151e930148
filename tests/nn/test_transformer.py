import pytest
import torch
import torch.nn.functional as F

from expressive_attention.nn import POSITIONS, SinusoidalPositions, Transformer, TransformerBlock


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize("kind", ["pre", "post", "none"])
def test_a_block_is_attention_and_mlp_on_residuals(kind):
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, norm=kind, norm_affine=False, activation="relu")
    x = torch.randn(3, 5, 8)
    outer = norm if kind == "post" else lambda x: x
    inner = norm if kind == "pre" else lambda x: x
    y = outer(x + block.attention(inner(x)))
    y = outer(y + block.down(torch.relu(block.up(inner(y)))))
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("kind", ["pre", "post", "none"])
@pytest.mark.parametrize("position", [*POSITIONS, "learned+relative", "learned+sinusoidal", "rope+sinusoidal"])
def test_the_model_is_its_parts(kind, position):
    torch.manual_seed(1)
    model = Transformer(10, 6, 8, 2, 2, position=position, norm=kind, gain=True)
    tokens = torch.randint(10, (3, 5))
    x = model.embedding(tokens)
    if "learned" in position.split("+"):
        table = next(module for module in model.positions.modules() if isinstance(module, torch.nn.Embedding))
        x = x + table.weight[:5]
    if "sinusoidal" in position:
        x = SinusoidalPositions(8)(x)
    for block in model.blocks:
        x = block(x)
    if kind == "pre":
        x = norm(x)
    assert isinstance(model.final_norm, torch.nn.LayerNorm) == (kind == "pre")  # one after "post" would change little
    torch.testing.assert_close(model(tokens), model.head(x))


@pytest.mark.parametrize(("affine", "count"), [(False, 0), (True, 10)])
def test_all_norms_learn_a_scale_and_a_shift_or_none_does(affine, count):
    model = Transformer(10, 6, 8, 2, 2, norm_affine=affine)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 5  # two in each of two blocks, and the last one
    assert sum(len(list(module.parameters())) for module in norms) == count


@pytest.mark.parametrize(("options", "std"), [({}, 0.5), ({"embedding_std": 0.2}, 0.2)])
def test_initialization_has_the_spreads_it_says(options, std):
    torch.manual_seed(2)
    model = Transformer(200, 6, 64, 1, 2, **options)
    assert model.embedding.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.blocks[0].down.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert model.head.bias.abs().max() == 0


def test_embeddings_can_share_a_direction():
    plain, shifted = (Transformer(10, 6, 8, 1, 2, embedding_shift=shift) for shift in (0.0, 1.5))
    for model in (plain, shifted):
        model.initialize(torch.Generator().manual_seed(3))
    expected = torch.tensor([1.5] + 7 * [0.0]).expand(10, 8)
    torch.testing.assert_close(shifted.embedding.weight - plain.embedding.weight, expected)
    assert torch.equal(shifted.head.weight, plain.head.weight)


def test_vectors_are_read_through_a_linear_map():
    torch.manual_seed(5)
    model = Transformer(10, 6, 8, 1, 2, input_dim=3, is_causal=False, position="learned")
    vectors = torch.randn(2, 6, 3)
    x = vectors @ model.embedding.weight.T + model.embedding.bias + model.positions.table.weight
    torch.testing.assert_close(model(vectors), model.head(model.final_norm(model.blocks[0](x))))
    changed = vectors.clone()
    changed[:, -1] += 1
    assert not torch.allclose(model(vectors)[:, 0], model(changed)[:, 0])  # the first position sees the last
    with pytest.raises(ValueError, match="inputs must have at most 6 positions, got 7"):
        model(torch.randn(2, 7, 3))


def test_a_generator_repeats_the_initialization_for_both_mechanisms():
    models = [Transformer(10, 6, 8, 1, 2, m, position="learned", gain=True) for m in ("expressive", "dot_product")]
    for model in models:
        model.initialize(torch.Generator().manual_seed(3))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns():
    """A constant sequence is predicted after a few steps, with either mechanism."""
    for mechanism in ("expressive", "dot_product"):
        torch.manual_seed(4)
        model = Transformer(5, 6, 16, 1, 2, mechanism)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            tokens = torch.randint(5, (32, 1)).expand(32, 7)
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "rms"}, "norm must be one of .*'rms'"),
        ({"activation": "swish"}, "activation must be one of .*'swish'"),
        ({"position": "sinus"}, "position must be one of .*'sinus'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"embed_dim": 9}, "embed_dim must be a multiple of num_heads, got 9 and 4"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**{"vocab_size": 10, "max_length": 6, **change})


@pytest.mark.parametrize("position", [*POSITIONS, "rope+relative"])
def test_a_table_of_positions_limits_the_length(position):
    model, tokens = Transformer(10, 6, 8, 1, 1, position=position), torch.zeros(1, 7, dtype=torch.long)
    if {"learned", "relative"}.isdisjoint(position.split("+")):
        assert model(tokens).shape == (1, 7, 10)
    else:
        with pytest.raises(ValueError, match="at most 6 positions, got 7"):
            model(tokens)
