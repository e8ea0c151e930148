"""The page's table is that of the formulas, and the formulas say what they should."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from expressive_attention.distributed.costs import Cost, Layer, Machine, cost, seconds

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_of_the_formulas(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # a benchmark moves its folder
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    assert scaling.table() in (ROOT / "docs" / "scaling.md").read_text()


def test_states_send_what_does_not_depend_on_the_length():
    layer = Layer(4, 2, 32)
    sent = {cost("states", layer, length, 8).sent for length in (1 << 10, 1 << 20)}
    assert sent == {5 * layer.state_bytes}  # log2 P up and down, of which a rank has the most as it is in the middle
    assert layer.state_bytes == 2 * (4 * 3 * 256 * 32 + 8 * 32 * 32 + 8)


def test_ring_and_exchange_share_the_pairs_of_one_machine():
    layer, length = Layer(8, 2, 64, batch=3), 4096
    pairs = 3 * 8 * length * (length + 1) / 2
    for method in ("ring", "all_to_all"):
        assert cost(method, layer, length, 8).operations * 8 == 4 * 64 * pairs
    assert cost("ring", layer, length, 1).sent == 0
    assert cost("ring", layer, length, 4).sent == 3 * (3 * 2 * (length // 4) * 2 * 64) * 2
    with pytest.raises(ValueError, match="method must be 'ring', 'all_to_all' or 'states', got 'x'"):
        cost("x", layer, length, 8)


def test_what_travels_while_a_rank_computes_is_hidden():
    machine = Machine(operations=100.0, bandwidth=10.0, latency=0.0)
    assert seconds(Cost(400.0, 20.0, 3, True), machine) == pytest.approx(4.0)  # three steps hide 2 s in 3 s
    assert seconds(Cost(400.0, 60.0, 3, True), machine) == pytest.approx(7.0)  # 6 s of sending, and the last step
    assert seconds(Cost(400.0, 20.0, 3, False), machine) == pytest.approx(6.0)
    assert seconds(Cost(400.0, 20.0, 3, True), machine._replace(overlap=0.0)) == pytest.approx(6.0)
    assert seconds(Cost(400.0, 0.0, 0, True), machine) == pytest.approx(4.0)


def test_the_example_runs_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = [str(ROOT / "examples" / "context_parallel.py"), "--length", "256", "--steps", "6"]
    done = subprocess.run([*command, *example], check=False, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    *methods, losses = done.stdout.strip().splitlines()
    assert [line.split()[0] for line in methods] == ["ring", "all_to_all", "states"]
    assert all(float(line.split()[-1]) < 1e-5 for line in methods)
    together, alone = (float(losses.split()[i]) for i in (4, 6))
    assert together == pytest.approx(alone, abs=2e-3)
    assert together < 2.7  # below the logarithm of 16
