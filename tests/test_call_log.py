"""The log of calls says which backend takes one, and why those before it do not."""

import os
import subprocess
import sys

import pytest
import torch

from expressive_attention import call_log
from expressive_attention.call import Call, Visibility
from expressive_attention.functional import choose

CALLS = """
import torch
from expressive_attention import expressive_attention, expressive_attention_varlen
q = torch.randn(1, 2, 4, 8)
expressive_attention(q, q, q, is_causal=True, dropout_p=0.1, backend="blockwise")
torch.func.grad(lambda q: expressive_attention(q, q, q, q[..., :4], form="squared").sum())(q)
x, starts = torch.randn(5, 2, 8, dtype=torch.bfloat16), torch.tensor([0, 2, 5])
expressive_attention_varlen(x, x, x, starts, starts, 3, 3, window_size=(2, -1), backend="blockwise")
torch.compile(expressive_attention, backend="eager", fullgraph=True)(q, q, q)
"""

LINES = [
    (
        "blockwise takes query (1, 2, 4, 8), key (1, 2, 4, 8), value (1, 2, 4, 8) of float32 on cpu, "
        "keys from all before to 0 after, dropout 0.1; asked for by name"
    ),
    (
        "reference takes query (1, 2, 4, 8), key (1, 2, 4, 8), value (1, 2, 4, 8) of float32 on cpu, "
        "a mask (1, 2, 4, 4) of float32, squared; "
        "not cpu: torch.func and forward-mode derivatives are not implemented; "
        "not triton: it runs on GPUs, not on cpu; "
        "not blockwise: torch.func and forward-mode derivatives are not implemented"
    ),
    (
        "blockwise takes query (1, 2, 5, 8), key (1, 2, 5, 8), value (1, 2, 5, 8) of bfloat16 on cpu, "
        "keys from 2 before to all after, packed; asked for by name; "
        "one after the other, since which keys a query sees must be in a mask"
    ),
]


def run(code, wanted):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "EXPRESSIVE_ATTENTION_LOG": wanted},
        check=False, capture_output=True, text=True, timeout=250,
    )  # fmt: skip


def test_calls_are_logged():
    done = run(CALLS, "calls")
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stderr.splitlines() if line.startswith("expressive_attention: ")]
    assert [line.removeprefix("expressive_attention: ") for line in found] == LINES


def test_nothing_is_logged_unless_asked_for():
    assert "expressive_attention: " not in run(CALLS, "").stderr
    done = run("from expressive_attention import expressive_attention", "call")
    assert "EXPRESSIVE_ATTENTION_LOG must be 'calls' or empty, got 'call'" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_reasons_are_those_of_backends_that_were_asked_before(device):
    x = torch.empty(1, 1, 1, 1, device=device)
    call = Call(x, x, x, None, Visibility(), 1.0, "expressive")
    chosen = choose(call, None)
    assert set(call_log.reasons(call, chosen)) == {"meta": {"cpu", "triton"}, "cpu": set()}[device]
    assert (chosen == "cpu") == (device == "cpu")
