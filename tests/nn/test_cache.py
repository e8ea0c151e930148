import pytest
import torch

from expressive_attention.nn import MECHANISMS, POSITIONS, KeyValueCache, SelfAttention, SquaredCache, Transformer

SEVERAL = ["learned+relative", "rope+learned_alibi"]


def model_of(position="rope", mechanism="expressive", **options):
    torch.manual_seed(1)
    model = Transformer(7, 12, 8, 2, 2, mechanism, position=position, gain=True, **options).double()
    for name, parameter in model.named_parameters():
        if name.endswith(("relative.table", "gain.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("position", [*POSITIONS, *SEVERAL])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_pieces_of_any_length_give_what_the_whole_gives(mechanism, position):
    model = model_of(position, mechanism)
    tokens = torch.randint(7, (3, 12))
    caches = [KeyValueCache(12) for _ in model.blocks]
    parts = [model(part, caches) for part in tokens.split([4, 1, 3, 1, 1, 2], -1)]
    torch.testing.assert_close(torch.cat(parts, -2), model(tokens))
    assert [cache.length for cache in caches] == [12, 12]


def test_a_mask_may_come_with_a_cache():
    torch.manual_seed(2)
    module, x = SelfAttention(8, 2, position="alibi").double(), torch.randn(3, 6, 8, dtype=torch.float64)
    mask = torch.rand(3, 1, 6, 6) < 0.7
    cache = KeyValueCache(6)
    first = module(x[:, :2], mask[..., :2, :2], cache)
    second = module(x[:, 2:], mask[..., 2:, :], cache)
    torch.testing.assert_close(torch.cat([first, second], -2), module(x, mask))


@pytest.mark.parametrize("position", ["rope", "learned", "rope+relative"])
def test_greedy_tokens_are_those_of_the_model_run_anew(position):
    model = model_of(position)
    tokens = torch.randint(7, (3, 2))
    expected = tokens
    for _ in range(11):  # to 13 tokens, the last of which is never read
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], -1)
    assert model.generate(tokens, 11, temperature=0).equal(expected)
    assert model.generate(tokens[0], 11, temperature=0).equal(expected[0])


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_tokens_are_drawn_with_the_shares_that_the_logits_say(temperature, top_k):
    model = model_of()
    tokens = torch.tensor([3, 1])
    drawn = model.generate(
        tokens.expand(20_000, 2), 1, temperature=temperature, top_k=top_k, generator=torch.Generator().manual_seed(5)
    )[:, -1]
    logits = model(tokens)[-1] / temperature
    if top_k is not None:
        logits[logits.argsort()[:-top_k]] = -torch.inf
    found = torch.bincount(drawn, minlength=7) / len(drawn)
    torch.testing.assert_close(found.double(), logits.softmax(-1).detach(), atol=0.015, rtol=0)  # 4 standard errors
    assert (found[logits == -torch.inf] == 0).all()


def test_a_generator_makes_it_reproducible():
    model, tokens = model_of(), torch.randint(7, (4, 3))
    first, second, third = (
        model.generate(tokens, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.equal(second)
    assert not first.equal(third)
    assert first.shape == (4, 12)
    assert first[:, :3].equal(tokens)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ({}, {"steps": 0}, "steps must be at least 1, got 0"),
        ({}, {"temperature": -1.0}, r"temperature must be at least 0, got -1\.0"),
        ({}, {"top_k": 0}, "top_k must be at least 1, got 0"),
        ({}, {"tokens": torch.zeros(2, 0, dtype=torch.long)}, r"at least one position, got shape \(2, 0\)"),
        ({"position": "learned"}, {"steps": 12}, "inputs must have at most 12 positions, got 13"),
        ({"input_dim": 3}, {}, "must read tokens to generate them, but reads vectors"),
        ({"is_causal": False}, {}, "cache must be None for attention that is not causal"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(**model).generate(**{"tokens": torch.zeros(1, 2, dtype=torch.long), "steps": 3, **arguments})


def test_a_model_that_drops_weights_does_not_generate():
    model = model_of(dropout_p=0.1)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    assert model.generate(tokens, 2).shape == (1, 4)
    with pytest.raises(ValueError, match=r"evaluation mode, .* call eval\(\) first"):
        model.train().generate(tokens, 2)


def test_a_cache_has_room_for_so_many():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        KeyValueCache(0)
    cache, x = KeyValueCache(3), torch.randn(2, 1, 2, 4)
    keys, values = cache.append(x, x + 1)
    assert keys.equal(x)
    assert values.equal(x + 1)
    assert cache.nbytes == 2 * x.nbytes
    with pytest.raises(ValueError, match="room for 3 positions, got 4"):
        cache.append(x, x)
    assert cache.append(x[..., :1, :], x[..., :1, :])[0].equal(torch.cat([x, x[..., :1, :]], -2))
    with pytest.raises(ValueError, match="caches must have one for each of 2 blocks, got 1"):
        model_of()(torch.zeros(1, 2, dtype=torch.long), [KeyValueCache(2)])


WITH_STATE = [
    position for position in [*POSITIONS, "rope+learned_alibi", "alibi+learned_alibi"] if position != "relative"
]


@pytest.mark.parametrize("position", WITH_STATE)
def test_a_state_says_what_the_whole_says(position):
    model = model_of(position, "squared")
    tokens = torch.randint(7, (2, 3, 12))
    caches = [SquaredCache() for _ in model.blocks]
    parts = [model(part, caches) for part in tokens.split([4, 1, 3, 1, 1, 2], -1)]
    torch.testing.assert_close(torch.cat(parts, -2), model(tokens))
    assert [(cache.length, cache.state.sums.shape) for cache in caches] == 2 * [(12, (6, 2, 10, 4))]


@pytest.mark.parametrize("position", ["rope", "rope+learned_alibi"])
def test_many_tokens_are_generated_from_a_state(position, monkeypatch):
    made = []
    plain = SelfAttention.new_cache
    monkeypatch.setattr(SelfAttention, "new_cache", lambda self, n: made.append(plain(self, n)) or made[-1])
    model, tokens = model_of(position, "squared"), torch.randint(7, (3, 5))
    found = model.generate(tokens, 60, temperature=0)
    assert [(type(cache), cache.length) for cache in made] == 2 * [(SquaredCache, 64)]
    for i in range(5, 65):
        assert model(found[:, :i])[:, -1].argmax(-1).equal(found[:, i])


def test_the_smaller_cache_is_taken():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module = SelfAttention(128, 2, "squared", position="rope").to(dtype)
        x = torch.zeros(1, 1, 128, dtype=dtype)
        state = SquaredCache()
        module(x, cache=state)
        positions = state.state.nbytes // (2 * 2 * 64 * dtype.itemsize)  # of keys and values that take as much
        assert isinstance(module.new_cache(positions), KeyValueCache)
        assert isinstance(module.new_cache(positions + 1), SquaredCache)
    for options in ({"mechanism": "expressive"}, {"position": "relative"}, {"is_causal": False}):
        module = SelfAttention(128, 2, **{"mechanism": "squared", "max_length": 5} | options)
        assert isinstance(module.new_cache(100_000), KeyValueCache)


@pytest.mark.parametrize(
    ("options", "mask", "message"),
    [
        ({"mechanism": "expressive"}, None, "a SquaredCache needs mechanism='squared', got 'expressive'"),
        ({"position": "relative"}, None, "a SquaredCache needs positions that .*, got 'relative'"),
        ({"is_causal": False}, None, "cache must be None for attention that is not causal"),
        ({}, torch.ones(3, 3, dtype=torch.bool), "attn_mask must be None with a SquaredCache"),
        ({"dropout_p": 0.1}, None, r"a SquaredCache cannot drop weights; call eval\(\) first"),
    ],
)
def test_what_a_state_cannot_tell_is_refused(options, mask, message):
    module = SelfAttention(8, 2, **{"mechanism": "squared", "max_length": 5} | options)
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(1, 3, 8), mask, SquaredCache())
