"""The squared form in linear time: the numbers of the reference, whatever the problem, and when it is chosen."""

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.budget import LINEAR, Case, assert_within_budget, fused, threads_of_torch
from tests.problems import strided


@st.composite
def problems(draw, largest=330):
    """Calls that the backend takes, of up to a few chunks of keys."""
    size = st.integers(1, 20) | st.sampled_from([16, 32, 33, 64])
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    length = draw(st.integers(0, 4) | st.integers(1, largest))
    keys = draw(st.integers(0, 4) | st.integers(1, largest) | st.just(length))
    e, ev = draw(size), draw(size)
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layouts = st.sampled_from(["contiguous", "contiguous", "transposed", "gaps", "columns first", "repeated"])
    heads = kv_heads * groups
    query = strided((batch, heads, length, e), dtype, draw(layouts), generator)
    key = strided((batch, kv_heads, keys, e), dtype, draw(layouts), generator)
    value = strided((batch, kv_heads, keys, ev), dtype, draw(layouts), generator)
    options = {
        "is_causal": draw(st.integers(0, 3)) > 0,
        "causal_alignment": draw(st.sampled_from(["upper_left", "lower_right"])),
        "enable_gqa": True,
        "form": "squared",
        "scale": draw(st.sampled_from([None, 1.0, 0.03, -2.5])),
    }
    if draw(st.booleans()):
        options["key_lengths"] = torch.tensor([draw(st.integers(0, keys)) for _ in range(batch)], dtype=torch.int32)
    if options["is_causal"] and draw(st.booleans()):
        slopes = draw(st.sampled_from([0.01, 1.0])) * torch.rand((batch, heads), generator=generator)
        options["alibi_slopes"] = slopes
    elif options["is_causal"] and draw(st.booleans()):
        shape = (batch, draw(st.sampled_from([heads, kv_heads])), keys)
        size = draw(st.sampled_from([0.01, 1.0, 10.0]))
        options["log_decay"] = -size * torch.rand(shape, generator=generator)
    return Case(query, key, value, None, options, draw(st.booleans()))


@pytest.mark.parametrize("part", range(4))
def test_random_problems_within_budget(part):
    @seed(part)
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(problems(), st.integers(1, 3))
    def check(case, threads):
        with threads_of_torch(threads):
            assert_within_budget(case, *LINEAR)

    check()
