import math

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from expressive_attention.study import training
from expressive_attention.study.config import ModelConfig, TrainingConfig
from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.nt import NTTask
from expressive_attention.study.training import Trajectory, build_model, learning_rate_factor, train_cell, trained_model
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
    # A low bar, so that seeds end at different steps and leave the program.
    options = {"steps": 60, "solved_accuracy": 0.45, "solved_evaluations": 2, "batch_size": 16}
    together = train_cell(cell(mechanism, seeds=(0, 1, 2, 3), **options))
    assert together.seeds["steps"].n_unique() > 1
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


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainingConfig(steps=300, warmup=100)
    assert learning_rate_factor(0, config) == pytest.approx(0.01)
    assert learning_rate_factor(99, config) == 1.0
    assert learning_rate_factor(200, config) == pytest.approx(0.5)
    assert learning_rate_factor(300, config) == pytest.approx(0.0)
    assert learning_rate_factor(250, TrainingConfig(schedule="constant")) == 1.0


def test_solved_means_the_last_evaluations():
    trajectory = Trajectory(TrainingConfig(early_stop=False, solved_evaluations=2), [], [], [])
    expected = [(0.5, False), (1.0, False), (1.0, True), (0.9, False), (0.995, False), (0.996, True)]
    for step, (value, solved) in enumerate(expected):
        trajectory.add(step, 1.0, value)
        assert (trajectory.solved, trajectory.ended) == (solved, False)
    assert trajectory.steps[-trajectory.streak] == 4
    stopping = Trajectory(TrainingConfig(solved_evaluations=2), [], [], [])
    for step, (value, _) in enumerate(expected):
        stopping.add(step, 1.0, value)
    assert (stopping.ended, stopping.steps) == (True, [0, 1, 2])
    stopping = Trajectory(TrainingConfig(), [], [], [])
    stopping.add(10, math.nan, 1.0)
    assert (stopping.ended, stopping.solved, stopping.diverged_at) == (True, False, 10)


def test_the_gradient_of_each_seed_is_clipped_alone():
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[0.0], [0.0]])
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    training._clip(parameters, 1.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_weights_of_a_result_give_its_model():
    one = cell(seeds=(0, 1), steps=10)
    result = train_cell(one)
    model = trained_model(one, result.weights, 1)
    test = one.task.held_out_examples(32, "test")
    right = model(torch.from_numpy(test.inputs)).argmax(-1).numpy() == test.targets
    right = right[test.targets != IGNORED]
    assert right.mean() == pytest.approx(seed_row(result, 1)["accuracy"][0])


def test_an_easy_task_is_solved_and_ends_early():
    result = train_cell(cell(seeds=(0, 1), task=NTTask(basis=2, delay=2), rate=3e-2, steps=900, batch_size=32))
    rows = result.seeds.rows(named=True)
    assert any(row["solved"] and row["steps"] < 900 for row in rows)
    for row in rows:
        if row["solved"]:
            assert (row["accuracy"], row["rollout_exact"]) == (1.0, 1.0)
            assert row["steps_to_solve"] == row["steps"] - 20  # three evaluations, 10 steps apart
