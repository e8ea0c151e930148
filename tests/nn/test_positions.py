import pytest
import torch
import torch.nn.functional as F

from expressive_attention import expressive_attention
from expressive_attention.nn import (
    LearnedAlibi,
    LearnedPositions,
    RelativeBias,
    RotaryPositions,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    attend,
    position_codes,
)


def test_rope_turns_each_pair_by_its_frequency():
    rope = RotaryPositions(6, base=100.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.empty_like(x)
    for p in range(5):
        for i in range(3):
            angle = torch.tensor(p * 100.0 ** (-2 * i / 6), dtype=torch.float64)
            expected[p, i] = x[p, i] * angle.cos() - x[p, i + 3] * angle.sin()
            expected[p, i + 3] = x[p, i] * angle.sin() + x[p, i + 3] * angle.cos()
    torch.testing.assert_close(rope(x), expected)


def test_rope_depends_on_distance_alone():
    rope = RotaryPositions(8)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    scores = rope(q.expand(9, 8)) @ rope(k.expand(9, 8)).T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_rope_follows_length_and_dtype():
    rope = RotaryPositions(4)
    x = torch.randn(6, 4)
    whole = rope(x)
    torch.testing.assert_close(rope(x[:3]), whole[:3])
    assert rope(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(rope(x.double()).float(), whole)


def test_alibi_slopes_are_those_of_the_paper():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]))
    assert alibi_slopes(16)[0].item() == pytest.approx(2**-0.5)


def test_alibi_counts_the_distance_and_ends_at_the_last_key():
    bias = alibi_bias(2, 2, 4)
    distance = torch.tensor([[2.0, 1.0, 0.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    torch.testing.assert_close(bias, torch.stack([-distance / 16, -distance / 256]))


def test_with_alibi_weights_fall_with_distance():
    """A bias added to z instead would raise them: f is even."""
    ones = torch.ones(1, 4, 8, 2)
    values = torch.eye(8).expand(1, 4, 8, 8)
    weights = expressive_attention(ones, ones, values, alibi_bias(4, 8, 8), is_causal=True)
    last = weights[0, :, -1]
    assert (last[:, 1:] > last[:, :-1]).all()
    ratio = last[:, :-1] / last[:, 1:]
    torch.testing.assert_close(ratio, torch.exp(-alibi_slopes(4))[:, None].expand_as(ratio))


@pytest.mark.parametrize("attention", [expressive_attention, F.scaled_dot_product_attention])
def test_alibi_for_causal_attention_needs_no_row_per_query(attention):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).unbind(0)
    whole, row = (alibi_bias(4, 9, 9, is_causal=is_causal).double() for is_causal in (False, True))
    assert row.shape == (4, 1, 9)
    causal = torch.zeros(9, 9, dtype=torch.float64).masked_fill(torch.ones(9, 9).triu(1) == 1, -torch.inf)
    torch.testing.assert_close(attention(q, k, v, row + causal), attention(q, k, v, whole + causal))
    if attention is expressive_attention:
        torch.testing.assert_close(attention(q, k, v, row, is_causal=True), attention(q, k, v, whole + causal))


def test_sinusoidal_positions_add_waves():
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    found = SinusoidalPositions(6, base=50.0)(x) - x
    for p in range(5):
        for i in range(3):
            angle = torch.tensor(p * 50.0 ** (-2 * i / 6), dtype=torch.float64)
            expected = torch.stack([angle.sin(), angle.cos()])
            torch.testing.assert_close(found[:, p, 2 * i : 2 * i + 2], expected.expand(2, 2))
    with pytest.raises(ValueError, match="embed_dim must be even for these positions, got 5"):
        SinusoidalPositions(5)


def test_a_relative_bias_is_its_table_at_the_distance():
    relative = RelativeBias(2, 4)
    assert not relative.table.any()
    torch.nn.init.normal_(relative.table)
    bias = relative(3, 3)
    for h in range(2):
        for i in range(3):
            for j in range(3):
                assert bias[h, i, j] == relative.table[h, i - j + 3]
    bias[0, 2, 0].backward()
    assert relative.table.grad.nonzero().tolist() == [[0, 5]]
    torch.testing.assert_close(relative(2, 3), bias[:, 1:])  # the last two positions
    with pytest.raises(ValueError, match="keys must be at most 4, got 5"):
        relative(1, 5)


def test_learned_positions_add_their_table():
    positions = LearnedPositions(5, 3)
    x = torch.randn(2, 5, 3)
    for length in (4, 5):
        short = x[:, :length]
        torch.testing.assert_close(positions(short) - short, positions.table.weight[:length].expand(2, length, 3))
    with pytest.raises(ValueError, match="at most 5 positions, got 6"):
        positions(torch.randn(6, 3))


@pytest.mark.parametrize("positions", [RotaryPositions, SinusoidalPositions])
def test_a_base_is_positive(positions):
    with pytest.raises(ValueError, match="base must be positive, got 0"):
        positions(4, base=0.0)


def test_learned_slopes_start_as_alibis_and_are_a_decay():
    alibi = LearnedAlibi(4)
    torch.testing.assert_close(alibi(6, 6), alibi_bias(4, 6, 6))
    torch.testing.assert_close(alibi(6, 6, is_causal=True), alibi_bias(4, 6, 6, is_causal=True))
    torch.nn.init.uniform_(alibi.log_slopes, -40.0, 3.0)
    bias = alibi(6, 6)
    torch.testing.assert_close(alibi(2, 6), bias[:, 4:])
    for h in range(4):
        for i in range(6):
            for j in range(6):
                expected = -alibi.log_slopes[h].exp() * abs(i - j)
                torch.testing.assert_close(bias[h, i, j], expected)
    assert (bias <= 0).all()


WEIGHTS = {"expressive": lambda z: z * z / (1 + z * z), "dot_product": torch.exp, "squared": lambda z: z * z}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mechanism", list(WEIGHTS))
def test_slopes_have_the_gradient_of_the_formula(mechanism, is_causal):
    """d loss / d slope_h = - sum_ij |i - j| a_ij (dO_i . v_j - dO_i . o_i), in float64, times the slope for its log."""
    torch.manual_seed(0)
    alibi = LearnedAlibi(3).double()
    torch.nn.init.uniform_(alibi.log_slopes, -3.0, 0.5)
    q, k, v, upstream = torch.randn(4, 2, 3, 7, 4, dtype=torch.float64).unbind(0)
    output = attend(mechanism, q, k, v, alibi(7, 7, is_causal=is_causal), is_causal=is_causal)
    (output * upstream).sum().backward()
    i = torch.arange(7.0, dtype=torch.float64)
    distance = (i[:, None] - i).abs()
    slopes = alibi.log_slopes.detach().exp()
    weights = WEIGHTS[mechanism](q @ k.mT / 2) * torch.exp(-slopes[:, None, None] * distance)
    weights = weights.tril() if is_causal else weights
    shares = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(output, shares @ v)
    g = upstream @ v.mT - (upstream * (shares @ v)).sum(-1, keepdim=True)
    expected = -(distance * shares * g).sum((0, 2, 3)) * slopes
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(alibi.log_slopes.grad, expected)


def test_codes_of_position_are_told_apart():
    assert position_codes("none") == ()
    assert position_codes("rope") == ("rope",)
    assert position_codes("relative+rope") == position_codes("rope+relative") == ("rope", "relative")
    for wrong in ("", "rope+", "rope+rotary", "rope relative"):
        with pytest.raises(ValueError, match=r"position must be one of .*joined by '\+'"):
            position_codes(wrong)
    for wrong in ("rope+rope", "none+rope"):
        with pytest.raises(ValueError, match="each code once, and 'none' alone"):
            position_codes(wrong)


def test_rotary_tables_do_not_grow_with_the_position():
    x = torch.randn(2, 8, dtype=torch.float64)
    rotary = RotaryPositions(8, 100.0)
    for start in (0, 1_000_000, 1_000_001, 1_001_023, 3):
        angles = torch.tensor([start, start + 1.0], dtype=torch.float64).unsqueeze(1) * 100.0 ** (
            -torch.arange(4).double() / 4
        )
        first, second = x.chunk(2, -1)
        turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
        torch.testing.assert_close(rotary(x, start), torch.cat(turned, -1))
        assert rotary._tables[0].shape[0] <= 1024
