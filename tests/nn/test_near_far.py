"""Modules of near and far keys, and their cache of constant size."""

import pytest
import torch

from expressive_attention.nn import (
    KeyValueCache,
    NearFarAttention,
    NearFarCache,
    SelfAttention,
    SquaredCache,
    Transformer,
)
from tests.test_near_far import whole_matrix

POSITIONS = ["none", "rope", "alibi", "learned_alibi", "rope+alibi+learned_alibi"]


def module_of(position="rope", window=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return NearFarAttention(12, 2, window, position=position, gain=True, initial_gain=3.0, **options).to(dtype)


def model_of(position="rope", window=3):
    torch.manual_seed(1)
    model = Transformer(7, 12, 8, 2, 2, position=position, gain=True, initial_gain=4.0, window=window)
    return model.double().eval()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_is_the_equation(position, qk_norm):
    module, x = module_of(position, qk_norm=qk_norm), torch.randn(2, 3, 11, 12, dtype=torch.float64)
    q, k, v = module.heads(x)
    log_decay = module._log_decay()
    assert (log_decay is None) == ("alibi" not in position)
    slopes = None if log_decay is None else -log_decay.double()
    y = whole_matrix(q, k, v, 3, None, slopes)[0]
    torch.testing.assert_close(module(x), module.out(y.transpose(-3, -2).flatten(-2)), rtol=1e-6, atol=1e-6)


def test_a_window_of_all_positions_is_expressive_attention():
    module, plain = module_of(window=50), SelfAttention(12, 2, position="rope", gain=True).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(4, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(x))
    module.window = 2
    assert not torch.allclose(module(x), plain(x), rtol=1e-2)


@pytest.mark.parametrize("position", POSITIONS)
def test_every_parameter_is_trained(position):
    module = module_of(position)
    module(torch.randn(2, 9, 12, dtype=torch.float64)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 3, 5, 40])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_cache_gives_what_the_whole_gives(position, window, dtype):
    """Pieces shorter and longer than the window and the cache's room, before and after the first key has left."""
    module = module_of(position, window, dtype)
    x = torch.randn(2, 3, 40, 12, dtype=torch.float64).to(dtype)
    expected = module(x)
    near_far, plain = NearFarCache(window), KeyValueCache(40)
    sizes = [1, 1, 2, 9, 1, 1, 1, 1, 4, 1, 15, 1, 1, 1]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for cache in (near_far, plain):
        with torch.no_grad():
            found = torch.cat([module(part, cache=cache) for part in x.split(sizes, -2)], -2)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert cache.length == 40
    if window < 40:
        assert near_far.state.sums.shape == (6, 2, 6 * 7 // 2, 6)
    else:
        assert near_far.state is None


def test_gradients_of_a_piece_stop_at_the_cache():
    module = module_of()
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    whole = module(x)[:, 6:]
    (expected,) = torch.autograd.grad(whole.sum(), x)
    cache = NearFarCache(3)
    module(x[:, :6], cache=cache)
    (found,) = torch.autograd.grad(module(x[:, 6:], cache=cache).sum(), x)
    torch.testing.assert_close(found[:, -1:], expected[:, -1:])  # which only the last query reads
    assert found[:, :6].abs().max() == 0
    assert found[:, 6:].abs().max() > 0


def test_its_size_does_not_grow():
    module, cache = module_of(window=4), NearFarCache(4)
    sizes = []
    with torch.no_grad():
        for _ in range(30):
            module(torch.randn(1, 1, 12, dtype=torch.float64), cache=cache)
            sizes.append(cache.nbytes)
    memory, state = 2 * 8 * 2 * 6 * 8, 2 * 21 * 8 * (6 + 1)
    assert sizes == 4 * [memory] + 26 * [memory + state]
    assert NearFarCache(4).nbytes == 0


@pytest.mark.parametrize("position", ["none", "rope+learned_alibi", "learned"])
@pytest.mark.parametrize("window", [2, 5])
def test_generation_with_the_cache_is_generation_without(position, window, monkeypatch):
    made = []
    plain = NearFarAttention.new_cache
    monkeypatch.setattr(NearFarAttention, "new_cache", lambda self, n: made.append(plain(self, n)) or made[-1])
    model, tokens = model_of(position, window), torch.randint(7, (3, 2))
    steps = 10 if position == "learned" else 60
    found = model.generate(tokens, steps, temperature=0)
    kind = KeyValueCache if (steps, window) == (10, 5) else NearFarCache  # which is smaller
    assert [(type(cache), cache.length) for cache in made] == 2 * [(kind, steps + 1)]
    for i in range(2, steps + 2):
        assert model(found[:, :i])[:, -1].argmax(-1).equal(found[:, i])
    caches = [NearFarCache(window) for _ in model.blocks]
    with torch.no_grad():
        parts = [model(part, caches) for part in found[:, :12].split([5, 1, 1, 4, 1], -1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(found[:, :12]), rtol=1e-6, atol=1e-6)


def test_the_smaller_cache_is_taken():
    for dtype in (torch.float32, torch.bfloat16):
        module = NearFarAttention(128, 2, 32).to(dtype)
        cache, x = NearFarCache(32), torch.zeros(1, 40, 128, dtype=dtype)
        module(x, cache=cache)
        positions = cache.nbytes // (2 * 2 * 64 * dtype.itemsize)  # of keys and values that take as much
        assert isinstance(module.new_cache(positions), KeyValueCache)
        assert isinstance(module.new_cache(positions + 1), NearFarCache)


def test_wrong_arguments_are_named():
    module, x = module_of(), torch.zeros(1, 2, 12, dtype=torch.float64)
    for call, error, message in (
        (lambda: NearFarAttention(12, 2, 0), ValueError, "window must be at least 1, got 0"),
        (lambda: NearFarAttention(12, 2, 1.5), TypeError, r"window must be an integer, got 1\.5"),
        (lambda: NearFarAttention(12, 5, 2), ValueError, "embed_dim must be a multiple of num_heads"),
        (lambda: NearFarAttention(12, 2, 2, position="rope+relative"), ValueError, "position must be without 'rel"),
        (lambda: NearFarCache(0), ValueError, "window must be at least 1, got 0"),
        (lambda: module(x, torch.ones(2, 2)), ValueError, "attn_mask must be None"),
        (lambda: module(x, cache=SquaredCache()), ValueError, "must be a NearFarCache or a KeyValueCache, got a Sq"),
        (lambda: module(x, cache=NearFarCache(4)), ValueError, "the window of the attention, 3, got 4"),
        (lambda: SelfAttention(12, 2)(x.float(), cache=NearFarCache(4)), ValueError, "got a NearFarCache"),
        (lambda: Transformer(7, 12, mechanism="squared", window=3), ValueError, "mechanism must be one of .*'squ"),
        (lambda: Transformer(7, 12, window=3, dropout_p=0.1), TypeError, "dropout_p"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert repr(module).startswith("NearFarAttention(\n  num_heads=2, window=3, position='rope'")
