"""Counters of FLOPs count what they count for SDPA."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from expressive_attention import expressive_attention, expressive_attention_varlen
from tests.budget import ON_CPU


def counted(call, *tensors, backward=True):
    leaves = [x.detach().requires_grad_() for x in tensors]
    with FlopCounterMode(display=False) as counter:
        output = call(*leaves)
        forward = counter.get_total_flops()
        if backward:
            output.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_as_many_as_for_sdpa(backend, causal):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 3)
    found = counted(lambda *x: expressive_attention(*x, is_causal=causal, backend=backend), q, k, v)
    expected = sdpa_flop_count(q.shape, k.shape, v.shape)
    assert expected == 2 * 2 * 4 * 5 * 6 * (8 + 3)
    assert found == (expected, sdpa_backward_flop_count((2, 4, 5, 3), q.shape, k.shape, v.shape))


def test_grouped_heads_count_for_each_query():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    grouped = counted(lambda *x: expressive_attention(*x, enable_gqa=True), q, k, k)
    assert grouped == counted(expressive_attention, q, *(k.repeat_interleave(2, 1),) * 2)


def test_packed_sequences_count_their_own_pairs():
    q, starts = torch.randn(9, 2, 8), torch.tensor([0, 2, 9])
    found = counted(lambda q, k, v: expressive_attention_varlen(q, k, v, starts, starts, 7, 7), q, q, q)
    pairs = 2 * (2 * 2 + 7 * 7)
    assert found == (2 * pairs * 16, 2 * pairs * 40)


def test_the_reference_counts_its_products_once():
    q = torch.randn(2, 4, 5, 8)
    forward, _ = counted(lambda *x: expressive_attention(*x, backend="reference"), q, q, q)
    assert forward == sdpa_flop_count(q.shape, q.shape, q.shape)


def test_a_counter_keeps_formulas_of_its_own():
    q = torch.randn(2, 4, 5, 8)
    mapping = {torch.ops.expressive_attention.attention: lambda *args, **kwargs: 7}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        expressive_attention(q, q, q)
    assert counter.get_total_flops() == 7
    assert counted(F.scaled_dot_product_attention, q, q, q, backward=False)[0] >= 0
    with pytest.raises(RuntimeError, match="duplicate"):
        register_flop_formula(torch.ops.expressive_attention.attention)(lambda *args: 0)
