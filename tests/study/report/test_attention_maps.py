import math

import pytest
import torch
from safetensors.torch import load_file

from expressive_attention.nn import MECHANISMS, SelfAttention, Transformer
from expressive_attention.study.report.attention import attention_maps, attention_weights, captured_weights
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.store import Store
from expressive_attention.study.training.model import trained_model

from ..report_data import diverged, trained

WEIGHTS = {
    "expressive": lambda z: z**2 / (1 + z**2),
    "dot_product": torch.exp,
    "squared": lambda z: z**2,
    "one_sided": lambda z: z.relu() ** 2 / (1 + z.relu() ** 2),
    "relu_squared": lambda z: z.relu() ** 2,
    "sigmoid": torch.sigmoid,
    "softmax_abs": lambda z: z.abs().exp(),
    "sigmoid_abs": lambda z: 1 / (1 + (-z.abs()).exp()),
    "absolute": lambda z: z.abs(),
    "relu": lambda z: z.clamp(min=0),
    "quartic": lambda z: z**4 / (1 + z**4),
    "one_sided_quartic": lambda z: z.relu() ** 4 / (1 + z.relu() ** 4),
}


def rotated(x):
    """Rotary positions as complex numbers: pair (i, i + E/2) turns by p * 100^(-2i/E)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:])
    angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("causal", [True, False])
def test_weights_follow_from_the_definition(mechanism, causal):
    torch.manual_seed(0)
    module = SelfAttention(
        8, 2, mechanism, position="rope", rope_base=100.0, gain=True, initial_gain=1.7, qk_norm=True, is_causal=causal
    )
    x = torch.randn(3, 5, 8)
    q, k = module.qkv(x)[..., :8], module.qkv(x)[..., 8:16]
    heads = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (q, k))
    q, k = (rotated(y / y.square().mean(-1, keepdim=True).sqrt()) for y in heads)
    weights = WEIGHTS[mechanism](1.7 * q @ k.mT / math.sqrt(4))
    weights = weights.tril() if causal else weights
    found = attention_weights(module, x)
    total = weights.sum(-1, keepdim=True)
    torch.testing.assert_close(found, torch.where(total > 0, weights / total, 0.0), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("position", ["none", "rope", "alibi", "relative"])
def test_weights_give_the_output_of_the_module(mechanism, position):
    torch.manual_seed(1)
    module = SelfAttention(8, 2, mechanism, position=position, max_length=6)
    if module.relative is not None:
        torch.nn.init.normal_(module.relative.table)
    x = torch.randn(3, 6, 8)
    weights = attention_weights(module, x)
    values = module.qkv(x)[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    output = module.out((weights @ values).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(output, module(x), atol=1e-5, rtol=1e-4)
    if mechanism in ("expressive", "dot_product", "squared", "sigmoid", "softmax_abs"):
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 6))


def test_captured_weights_are_those_of_every_layer():
    torch.manual_seed(2)
    model = Transformer(5, 6, embed_dim=8, num_layers=2, num_heads=2, norm="pre")
    tokens = torch.randint(5, (3, 6))
    first, second = captured_weights(model, tokens)
    x = model.embedding(tokens)
    block = model.blocks[0]
    torch.testing.assert_close(first, attention_weights(block.attention, block.norms[0](x)))
    block, x = model.blocks[1], block(x)
    torch.testing.assert_close(second, attention_weights(block.attention, block.norms[0](x)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_maps_are_of_the_worst_and_the_best_seed(tmp_path):
    results, store = trained(tmp_path), Store(tmp_path)
    maps = attention_maps(results, store, results.conditions)
    assert [(found.mechanism, found.rank, found.layer) for found in maps] == [
        (mechanism, rank, 0) for mechanism in results.mechanisms for rank in ("worst", "best")
    ]
    config, _ = store.config()
    for comparison in config.arms():
        (cell,) = comparison.final_cells(config.training.settings[0])
        rows = results.seeds.filter(mechanism=comparison.mechanism).sort("accuracy", "seed")
        parameters = load_file(store.path(cell) / "weights.safetensors")
        for found, row in zip(
            [found for found in maps if found.mechanism == comparison.mechanism],
            (rows.row(0, named=True), rows.row(-1, named=True)),
            strict=True,
        ):
            assert (found.seed, found.accuracy) == (row["seed"], row["accuracy"])
            model = trained_model(cell, parameters, cell.seeds.index(found.seed))
            tokens = torch.from_numpy(cell.task.held_out_examples(32, "validation").inputs)
            block = model.blocks[0]
            weights = attention_weights(block.attention, block.norms[0](model.embedding(tokens)))
            torch.testing.assert_close(found.weights, weights.mean((0, 1)))


def test_there_are_no_maps_of_seeds_that_diverged(tmp_path):
    trained(tmp_path)
    store = Store(tmp_path)
    diverged(store, "dot_product", [0])
    results = collect(store)
    maps = attention_maps(results, store, results.conditions)
    assert [(found.mechanism, found.rank) for found in maps] == [
        ("expressive", "worst"), ("expressive", "best"), ("dot_product", "best")
    ]  # fmt: skip
    assert maps[-1].seed == 1
    diverged(store, "dot_product", [0, 1])
    results = collect(store)
    maps = attention_maps(results, store, results.conditions)
    assert {found.mechanism for found in maps} == {"expressive"}


def test_there_are_no_maps_without_cells(tmp_path):
    results = trained(tmp_path / "study")
    assert attention_maps(results, Store(tmp_path / "elsewhere"), results.conditions) == []
