import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from pydantic import ValidationError

from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.contexts import unseen
from expressive_attention.study.tasks.recurrences.noisy import NoisyTask
from expressive_attention.study.tasks.rng import stream
from tests.study.tiny import cell

SMALL = [
    {"basis": 2, "delay": 3, "noise": 0.25, "context": 5},
    {"basis": 3, "delay": 2, "noise": 0.125, "context": 4},
    {"basis": 3, "delay": 2, "noise": 0.75, "context": 4, "operation": "difference"},
    {"basis": 4, "delay": 1, "noise": 0.5},
]


def follow(task, start, length):
    x = list(start)
    while len(x) < length:
        x.append((x[-1] + (1 if task.operation == "sum" else -1) * x[-task.delay]) % task.basis)
    return x[:length]


def exact(task, context):
    """P(next digit | context) by going through all starts, as fractions."""
    noise = Fraction(task.noise)
    found = [Fraction(0)] * task.basis
    for start in itertools.product(range(task.basis), repeat=task.delay):
        x = follow(task, start, len(context) + 1)
        likelihood = Fraction(1)
        for read, true in zip(context, x, strict=False):
            likelihood *= 1 - noise if read == true else noise / (task.basis - 1)
        found[x[-1]] += likelihood
    return [float(p / sum(found)) for p in found]


@pytest.mark.parametrize("fields", SMALL)
def test_the_best_predictor_against_counting(fields):
    task = NoisyTask(**fields)
    contexts = list(itertools.product(range(task.basis), repeat=task.length))
    found = task.probabilities(np.array(contexts))
    for context, probabilities in zip(contexts, found, strict=True):
        for t in range(task.length):
            assert probabilities[t].tolist() == pytest.approx(exact(task, context[: t + 1]), abs=1e-12)


@pytest.mark.parametrize("fields", [*SMALL, {}, {"basis": 2, "delay": 9}, {"operation": "difference", "noise": 0.3}])
def test_the_solver_reaches_the_ceiling(fields):
    task = NoisyTask(**fields)
    examples = task.held_out_examples(4000, "test")
    asked = examples.targets != IGNORED
    right = (task.solve(examples.inputs) == examples.targets)[asked]
    ceiling = task.ceiling(examples)[asked]
    assert right.mean() == pytest.approx(ceiling.mean(), abs=5 * 0.5 / 4000**0.5)  # a sequence counts as one draw
    assert task.chance < ceiling.mean() < 1
    assert task.facts()["ceiling"] == pytest.approx(ceiling.mean(), abs=0.02)


@pytest.mark.parametrize("fields", [{}, {"operation": "difference", "basis": 5, "delay": 2, "context": 9}])
def test_targets_are_the_true_digits(fields):
    task = NoisyTask(**fields)
    examples = task.training_examples(stream(0, "training"), 3000)
    first = task.delay - 1
    assert (examples.targets[:, :first] == IGNORED).all()
    for targets in examples.targets[:, first:].tolist():
        assert targets == follow(task, targets[: task.delay], len(targets))
    read, true = examples.inputs[:, first + 1 :].ravel(), examples.targets[:, first:-1].ravel()
    shifts = np.bincount((read - true) % task.basis, minlength=task.basis) / read.size
    expected = [1 - task.noise] + [task.noise / (task.basis - 1)] * (task.basis - 1)
    assert shifts.tolist() == pytest.approx(expected, abs=5 * 0.5 / read.size**0.5)


def test_few_states_leave_many_inputs_of_which_none_is_shared():
    task = NoisyTask()  # of 64 states
    parts = [
        task.training_examples(stream(0, "training"), 20000),
        *(task.held_out_examples(500, purpose) for purpose in ("validation", "test")),
    ]
    training, validation, test = ({tuple(row) for row in part.inputs.tolist()} for part in parts)
    assert not (training & validation)
    assert not (training & test)
    assert not (validation & test)
    # beginnings of what is held out do occur in training
    beginnings = {row[:end] for row in training for end in range(task.delay, task.length + 1)}
    asked = [row[:end] for row in parts[2].inputs.tolist() for end in range(task.delay, task.length + 1)]
    new = [tuple(row) for row in asked if tuple(row) not in beginnings]
    found = unseen(task, parts[:1], parts[2])
    assert (found.predictions, found.contexts) == (len(new), len(set(new)))
    assert 500 <= len(new) < 0.5 * len(asked)
    assert found.seen == pytest.approx(1 - len(new) / len(asked))


def test_cells_of_the_time_when_examples_were_shared_are_others(monkeypatch):
    now = cell(task=NoisyTask()).identity
    monkeypatch.setattr(NoisyTask, "revision", 1)
    assert cell(task=NoisyTask()).identity != now


def test_almost_no_noise_leaves_the_clean_task():
    task = NoisyTask(basis=5, delay=3, noise=1e-9)
    examples = task.held_out_examples(200, "test")
    assert (task.clean.solve(examples.inputs) == examples.targets).all()
    asked = examples.targets != IGNORED
    assert (task.solve(examples.inputs)[asked] == examples.targets[asked]).all()
    assert task.ceiling(examples)[asked].min() > 1 - 1e-6


def test_what_it_is_worth():
    task = NoisyTask(basis=3, delay=4)
    assert task.complexity == pytest.approx(math.log2(81))
    assert task.length == 12
    assert task.label == "noisy sum, basis 3, delay 4, noise 0.1"


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"basis": 1}, "basis"),
        ({"delay": 0}, "delay"),
        ({"basis": 17, "delay": 3}, r"basis\^delay must be at most 4096, .* got 17\^3"),
        ({"noise": 0.0}, "noise"),
        ({"noise": 1.0}, "noise"),
        ({"operation": "product"}, "operation"),
        ({"context": 2}, "context must be at least delay = 3, got 2"),
        ({"p": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_values_are_refused(wrong, word):
    with pytest.raises(ValidationError, match=word):
        NoisyTask(**wrong)
