"""Where cells are trained. For the GPU that is not there stands torch's device "meta": shapes without numbers."""

import os
import re

import pytest
import torch
import torch.fx.experimental._config as symbolic
from typer.testing import CliRunner

from expressive_attention.study.cli.app import app
from expressive_attention.study.runs.engines import local
from expressive_attention.study.training import loop as training
from expressive_attention.study.training.devices import CPU, DeviceError, available_cores, devices
from expressive_attention.study.training.evaluation import Prepared, rollouts, score
from tests.study.tiny import cell

ELSEWHERE = torch.device("meta")


def plain_optimizer(model, rate, _training):
    """The fused ones ask for a device that torch knows."""
    return torch.optim.SGD(model.parameters(), rate)


@symbolic.patch(meta_nonzero_assume_all_nonzero=True)
@pytest.mark.parametrize("mechanism", ["expressive", "dot_product", "sigmoid"])
@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "alibi", "relative", "none"])
def test_all_that_a_step_and_a_measure_touch_is_on_the_device(monkeypatch, mechanism, position):
    monkeypatch.setattr(training, "make_optimizer", plain_optimizer)
    one = cell(mechanism, model={"position": position}, gradient_clip=1.0)
    state = training._State.at_the_start_of(one, ELSEWHERE)
    inputs, targets = state.batches.next(state.active)
    losses = training.train_step(state.model, state.optimizer, inputs, targets, one.training.gradient_clip)
    examples = one.task.held_out_examples(8, "test")
    scores = score(state.model, Prepared.of(one.task, examples, ELSEWHERE), len(one.seeds))
    rolled = rollouts(state.model, one.task, examples, 3, len(one.seeds), ELSEWHERE)
    assert rolled is not None
    found = [inputs, targets, losses, scores.accuracy, scores.right, *rolled, *state.model.parameters()]
    assert {x.device for x in found} == {ELSEWHERE}
    assert losses.shape == scores.accuracy.shape == rolled[0].shape == (len(one.seeds),)


def test_cuda_means_every_gpu_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert devices("cuda") == [first, second]
    assert devices("cuda:1") == [second]
    assert devices("cpu") == [CPU]
    words = "device must be one of ['cpu', 'cuda', 'cuda:0', 'cuda:1'] on this machine, got 'cuda:2'"
    with pytest.raises(DeviceError, match=f"^{re.escape(words)}$"):
        devices("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", [["run", "quick", "--out"], ["verify"]])
def test_a_gpu_that_is_not_there_is_refused_before_any_work(tmp_path, command):
    result = CliRunner().invoke(app, ["study", *command, str(tmp_path / "run"), "--device", "cuda"])
    assert result.exit_code == 2
    assert result.stderr == "ea: device must be one of ['cpu'] on this machine, got 'cuda'\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_processor_finds():
    one = cell(steps=10)
    here, there = (training.train_cell(one, device=device) for device in (CPU, devices("cuda:0")[0]))
    for name, x in here.weights.items():
        torch.testing.assert_close(there.weights[name], x, rtol=1e-3, atol=1e-4)


# ---- how many cores ----


def test_cores_are_those_that_the_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    groups = tmp_path / "cgroup"
    groups.write_text("0::/outer/inner\n")
    assert available_cores(tmp_path / "none", groups) == 6
    (tmp_path / "fs" / "outer" / "inner").mkdir(parents=True)
    limit = tmp_path / "fs" / "outer" / "cpu.max"
    for content, cores in (("max 100000", 6), ("250000 100000", 3), ("50000 100000", 1), ("nonsense", 6)):
        limit.write_text(f"{content}\n")
        assert available_cores(tmp_path / "fs", groups) == cores
    groups.write_text("4:cpu,cpuacct:/mine\n3:memory:/mine\n")
    (tmp_path / "v1" / "cpu,cpuacct" / "mine").mkdir(parents=True)
    for quota, cores in (("-1", 6), ("200000", 2)):
        (tmp_path / "v1" / "cpu,cpuacct" / "mine" / "cpu.cfs_quota_us").write_text(quota)
        (tmp_path / "v1" / "cpu,cpuacct" / "mine" / "cpu.cfs_period_us").write_text("100000")
        assert available_cores(tmp_path / "v1", groups) == cores


@pytest.mark.parametrize(
    ("allowed", "workers", "threads"),
    [(None, 2, 4), (None, 16, 1), ("1", 2, 1), ("3,2", 2, 3), ("64", 2, 4), ("x", 2, 4)],
)
def test_threads_are_the_share_of_a_worker_and_no_more_than_allowed(monkeypatch, allowed, workers, threads):
    monkeypatch.setattr(local, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    assert local.threads_per_cell(workers) == threads
