import contextlib
import math
import os
import pickle
import signal
import subprocess
import sys

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from expressive_attention.study.config.schema import ModelConfig, TrainingConfig
from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.recurrences.nt import NTTask
from expressive_attention.study.training import loop as training
from expressive_attention.study.training import optimization
from expressive_attention.study.training.checkpoints import CheckpointFile
from expressive_attention.study.training.loop import train_cell
from expressive_attention.study.training.model import build_model, trained_model
from expressive_attention.study.training.optimization import learning_rate_factor
from expressive_attention.study.training.trajectory import Trajectory
from tests.study.tiny import cell


def seed_row(result, seed):
    return result.seeds.filter(pl.col("seed") == seed)


def same(a, b):
    assert_frame_equal(a, b, rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_both_mechanisms_start_from_the_same_parameters(position):
    task, model = NTTask(basis=4, delay=2), ModelConfig(position=position)
    first, second = (build_model(task, model, m, 3).state_dict() for m in ("expressive", "dot_product"))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    other = build_model(task, model, "expressive", 4).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_both_mechanisms_see_the_same_batches(monkeypatch):
    seen = []
    step = training.train_step

    def spy(model, optimizer, inputs, targets, clip):
        seen.append(inputs.clone())
        return step(model, optimizer, inputs, targets, clip)

    monkeypatch.setattr(training, "train_step", spy)
    train_cell(cell("expressive", steps=12))
    train_cell(cell("dot_product", steps=12))
    assert len(seen) == 24
    assert all(torch.equal(a, b) for a, b in zip(seen[:12], seen[12:], strict=True))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("mechanism", ["expressive", "dot_product"])
def test_a_seed_does_not_depend_on_those_beside_it(mechanism):
    options = {"steps": 60, "batch_size": 16}
    together = train_cell(cell(mechanism, seeds=(0, 1, 2, 3), **options))
    for seed in (1, 3):
        alone = train_cell(cell(mechanism, seeds=(seed,), **options))
        same(alone.seeds, seed_row(together, seed))
        same(alone.curves, together.curves.filter(pl.col("seed") == seed))


def test_a_seed_that_diverges_is_recorded_and_harms_no_other(monkeypatch):
    build = training.build_model

    def poisoned(task, model, mechanism, seed, gain):
        built = build(task, model, mechanism, seed, gain)
        if seed == 1:
            torch.nn.init.constant_(built.head.weight, torch.nan)
        return built

    healthy = train_cell(cell(seeds=(0, 1, 2)))
    monkeypatch.setattr(training, "build_model", poisoned)
    result = train_cell(cell(seeds=(0, 1, 2)))
    bad = seed_row(result, 1).row(0, named=True)
    assert (bad["diverged_at"], bad["accuracy"], bad["solved"], bad["rollout_digits"]) == (10, 0.0, False, 0.0)
    for seed in (0, 2):
        same(seed_row(result, seed), seed_row(healthy, seed))
    assert healthy.seeds["diverged_at"].null_count() == 3


def test_the_model_of_a_configuration():
    def base(**options):
        return (
            build_model(NTTask(basis=4, delay=9), ModelConfig(**options), "expressive", 0).blocks[0].attention.rope.base
        )

    assert NTTask(basis=4, delay=9).length == 10
    assert (base(), base(rope_base=7.0)) == (20.0, 7.0)  # twice the length, unless told otherwise
    assert build_model(NTTask(basis=4, delay=2), ModelConfig(), "expressive", 0).blocks[0].attention.rope.base == 10.0
    shape = ModelConfig(layers=2, heads=4, mlp_ratio=3, embedding_std=0.1)
    model = build_model(NTTask(basis=4, delay=2), shape, "expressive", 0, initial_gain=0.5)
    assert model.embedding.weight.std().item() == pytest.approx(0.1, rel=0.3)
    assert len(model.blocks) == 2
    assert model.blocks[1].up.out_features == 3 * 16
    assert model.blocks[1].attention.gain.weight.tolist() == [0.5] * 4


def test_the_optimizer_of_a_configuration():
    model = torch.nn.Linear(2, 2)
    options = {"betas": (0.8, 0.9), "weight_decay": 0.25, "momentum": 0.5}
    for name, kept in (("adam", ("betas", "weight_decay")), ("sgd", ("momentum", "weight_decay"))):
        optimizer = training.make_optimizer(model, 0.125, TrainingConfig(optimizer=name, **options))
        assert isinstance(optimizer, {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}[name])
        assert {key: optimizer.defaults[key] for key in ("lr", *kept)} == {"lr": 0.125} | {k: options[k] for k in kept}


def test_the_loss_is_the_mean_over_the_targets_that_there_are():
    model = torch.nn.Linear(3, 5)
    inputs = torch.randn(2, 1, 4, 3)  # two seeds, which would have models of their own
    targets = torch.full((2, 1, 4), IGNORED)
    targets[0, 0, 1], targets[1, 0, :2] = 3, torch.tensor([0, 4])
    each = -model(inputs).detach().log_softmax(-1)
    wanted = torch.stack([each[0, 0, 1, 3], (each[1, 0, 0, 0] + each[1, 0, 1, 4]) / 2])
    losses = training.train_step(model, torch.optim.SGD(model.parameters(), 0.1), inputs, targets, None)
    torch.testing.assert_close(losses, wanted)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainingConfig(steps=300, warmup=100)
    assert learning_rate_factor(0, config) == pytest.approx(0.01)
    assert learning_rate_factor(99, config) == 1.0
    assert learning_rate_factor(200, config) == pytest.approx(0.5)
    assert learning_rate_factor(300, config) == pytest.approx(0.0)
    assert learning_rate_factor(250, TrainingConfig(schedule="constant")) == 1.0


def test_solved_means_the_last_evaluations():
    trajectory = Trajectory(TrainingConfig(solved_evaluations=2), [], [], [])
    expected = [(0.5, False), (1.0, False), (1.0, True), (0.9, False), (0.995, False), (0.996, True)]
    for step, (value, solved) in enumerate(expected):
        trajectory.add(step, 1.0, value)
        assert (trajectory.solved, trajectory.ended) == (solved, False)
    assert trajectory.steps[-trajectory.streak] == 4
    stopping = Trajectory(TrainingConfig(), [], [], [])
    stopping.add(10, math.nan, 1.0)
    assert (stopping.ended, stopping.solved, stopping.diverged_at) == (True, False, 10)


def test_the_gradient_of_each_seed_is_clipped_alone():
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[0.0], [0.0]])
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    optimization._clip(parameters, 1.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_weights_of_a_result_give_its_model():
    one = cell(seeds=(0, 1), steps=10)
    result = train_cell(one)
    model = trained_model(one, result.weights, 1)
    test = one.task.held_out_examples(32, "test")
    right = model(torch.from_numpy(test.inputs)).argmax(-1).numpy() == test.targets
    right = right[test.targets != IGNORED]
    assert right.mean() == pytest.approx(seed_row(result, 1)["accuracy"][0])


def test_an_easy_task_is_solved_and_trained_to_its_end():
    one = cell(seeds=(0, 1), task=NTTask(basis=2, delay=2), rate=3e-2, steps=900, batch_size=32, evaluate_every=20)
    result = train_cell(one)
    assert any(row["solved"] for row in result.seeds.rows(named=True))
    for row in result.seeds.rows(named=True):
        curve = result.curves.filter(pl.col("seed") == row["seed"]).sort("step")
        assert (row["steps"], curve["step"].to_list()) == (900, list(range(20, 901, 20)))
        assert row["validation"] == curve["accuracy"][-1]
        if row["solved"]:
            assert (row["accuracy"], row["rollout_exact"]) == (1.0, 1.0)
            missed = curve.filter(pl.col("accuracy") < 0.995)["step"].to_list()
            assert row["steps_to_solve"] == (missed[-1] + 20 if missed else 20)


def test_tuning_seeds_see_no_test_sequence(monkeypatch):
    asked = []
    held_out = NTTask.held_out_examples

    def spy(task, count, purpose):
        asked.append(purpose)
        return held_out(task, count, purpose)

    monkeypatch.setattr(NTTask, "held_out_examples", spy)
    result = train_cell(cell().model_copy(update={"role": "tuning"}))
    assert asked == ["validation"]
    for name in ("accuracy", "cross_entropy", "rollout_digits", "contexts_seen", "unseen_predictions"):
        assert result.seeds[name].null_count() == 2
    assert result.splits.is_empty()
    assert result.examples.is_empty()
    final = train_cell(cell())
    assert asked == ["validation", "validation", "test"]
    assert final.seeds["validation"].to_list() == result.seeds["validation"].to_list()


def test_right_answers_are_counted_by_test_example():
    result = train_cell(cell(seeds=(0, 1), steps=20))
    assert result.examples["scored"].sum() == len(result.examples) * 2  # both positions from the delay on
    assert result.examples["seeds"].to_list() == [2] * len(result.examples)
    share = result.examples["right"].sum() / (2 * result.examples["scored"].sum())
    assert share == pytest.approx(result.seeds["accuracy"].mean())


def test_a_batch_without_any_target_is_refused(monkeypatch):
    whole = NTTask.training_examples

    def silent(task, bits, count):
        drawn = whole(task, bits, count)
        drawn.targets[8:16] = IGNORED
        return drawn

    # A subclass would take the place of the task in every test that follows.
    monkeypatch.setattr(NTTask, "training_examples", silent)
    with pytest.raises(ValueError, match="a training batch of 8 examples has no target at all"):
        train_cell(cell(task=NTTask(kind="nt", basis=4, delay=2)))
    train_cell(cell(task=NTTask(kind="nt", basis=4, delay=2), batch_size=16))


def test_a_mechanism_under_a_second_name_draws_other_numbers():
    first, again, same = (train_cell(cell(name)) for name in ("dot_product", "dot_product_again", "dot_product"))
    assert first.seeds.equals(same.seeds)
    assert first.seeds["seed"].to_list() == again.seeds["seed"].to_list()
    assert not any(torch.equal(x, again.weights[name]) for name, x in first.weights.items() if "gain" not in name)
    moved = cell("dot_product").model_copy(update={"seeds": (500_000_000, 500_000_001)})
    assert all(torch.equal(x, again.weights[name]) for name, x in train_cell(moved).weights.items())


# ---- checkpoints ----


class KilledError(Exception):
    pass


def checkpoint_file(directory, one):
    """A checkpoint at every evaluation; a note fails the test."""

    def unexpected(note):
        raise AssertionError(note)

    return CheckpointFile(directory / "checkpoint", one.identity, unexpected, seconds=0)


def same_bits(a, b):
    for table in ("seeds", "curves", "splits"):
        assert_frame_equal(getattr(a, table), getattr(b, table), check_exact=True)
    assert a.weights.keys() == b.weights.keys()
    assert all(torch.equal(x, b.weights[name]) for name, x in a.weights.items())


SEVERAL = {"batch_size": 16, "seeds": (0, 1, 2, 3), "steps": 60}


@pytest.mark.parametrize(
    "options",
    [
        SEVERAL,
        {**SEVERAL, "optimizer": "sgd", "rate": 0.3},
        {"steps": 290, "evaluate_every": 58},  # sequences are drawn 128 steps at a time
        {"steps": 40, "optimizer": "sgd", "momentum": 0.0, "gradient_clip": 0.5, "weight_decay": 0.01},
        {"steps": 40, "mechanism": "dot_product", "model": {"position": "learned", "layers": 2}},
    ],
    ids=["adam", "sgd", "several draws", "plain sgd", "dot product"],
)
def test_a_cell_killed_at_every_evaluation_ends_with_the_same_bits(tmp_path, options):
    one = cell(**options)
    undisturbed = train_cell(one)
    seen, killed = [], []

    def kill(step, _):
        seen.append(step)
        if step not in killed:
            killed.append(step)
            raise KilledError

    resumed = None
    while resumed is None:
        with contextlib.suppress(KilledError):
            resumed = train_cell(one, kill, checkpoint_file(tmp_path, one))
    same_bits(resumed, undisturbed)
    # The evaluation at which it was killed is all that was done twice.
    every, last = one.training.evaluate_every, undisturbed.seeds["steps"].max()
    assert seen == [step for step in range(every, last + 1, every) for _ in range(2)]


def test_a_seed_that_diverges_is_recorded_after_a_checkpoint_as_without(tmp_path):
    def poison(model, optimizer, inputs, targets, clip, step=training.train_step):
        losses = step(model, optimizer, inputs, targets, clip)
        return torch.where(torch.arange(len(losses)) == 1, torch.nan, losses) if len(losses) == 3 else losses

    one = cell(seeds=(0, 1, 2), steps=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", poison)
        undisturbed = train_cell(one)
        with pytest.raises(KilledError):
            train_cell(one, lambda step, _: kill_at(step, 30), checkpoint_file(tmp_path, one))
        resumed = train_cell(one, None, checkpoint_file(tmp_path, one))
    assert undisturbed.seeds["diverged_at"].to_list() == [None, 10, None]
    same_bits(resumed, undisturbed)


def kill_at(step, when):
    if step == when:
        raise KilledError


KILLED = """
import os, pickle, signal, sys, torch
from pathlib import Path
from expressive_attention.study.training.checkpoints import CheckpointFile
from expressive_attention.study.training.loop import train_cell
cell, path, threads = pickle.load(sys.stdin.buffer)
torch.set_num_threads(threads)
def report(step, accuracy):
    if step == 30:
        os.kill(os.getpid(), signal.SIGKILL)
train_cell(cell, report, CheckpointFile(Path(path), cell.identity, print, seconds=0))
"""


def test_a_process_killed_in_earnest_leaves_what_another_goes_on_from(tmp_path):
    one = cell(**SEVERAL)
    given = pickle.dumps((one, str(tmp_path / "checkpoint"), torch.get_num_threads()))
    killed = subprocess.run([sys.executable, "-c", KILLED], check=False, input=given, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    steps = []
    resumed = train_cell(one, lambda step, _: steps.append(step), checkpoint_file(tmp_path, one))
    assert steps[0] == 30
    same_bits(resumed, train_cell(one))


def test_the_time_before_a_checkpoint_counts(tmp_path, monkeypatch):
    one = cell()
    with pytest.raises(KilledError):
        train_cell(one, lambda step, _: kill_at(step, 30), checkpoint_file(tmp_path, one))
    restore = training._State.restore
    monkeypatch.setattr(training._State, "restore", lambda *arguments: restore(*arguments) + 1000)
    assert 1000 < train_cell(one, None, checkpoint_file(tmp_path, one)).seconds < 2000


def test_a_training_that_is_watched_is_the_same():
    tried, seen = cell(), []

    def watch(step, active, model):
        seen.append((step, list(active), {name: x.detach().clone() for name, x in model.named_parameters()}))

    watched, plain = train_cell(tried, watch=watch), train_cell(tried)
    assert [step for step, _, _ in seen] == [0, 10, 20, 30]
    assert seen[0][1] == [0, 1]
    for name, value in plain.weights.items():
        assert torch.equal(value, watched.weights[name])
        assert torch.equal(value, seen[-1][2][name])
        assert not torch.equal(value, seen[0][2][name]) or not value.any()
