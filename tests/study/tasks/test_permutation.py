import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.contexts import unseen
from expressive_attention.study.tasks.permutation import PermutationTask
from expressive_attention.study.tasks.rng import stream

tasks = st.builds(PermutationTask, degree=st.integers(2, 6), context=st.integers(2, 20), start=st.booleans())


@settings(deadline=None)
@given(task=tasks, seed=st.integers(0, 1000))
def test_targets_move_things_one_permutation_after_another(task, seed):
    elements = list(itertools.permutations(range(task.degree)))
    examples = task.training_examples(stream(seed, "training"), 20)
    assert examples.inputs.shape[1] == task.length
    assert examples.inputs.max() < task.vocab_size
    for tokens, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        if task.start:
            assert (tokens.pop(0), targets.pop(0)) == (len(elements), IGNORED)
        where = list(range(task.degree))  # of each thing
        for token, target in zip(tokens, targets, strict=True):
            where = [elements[token][place] for place in where]
            assert elements[target] == tuple(where)


@settings(deadline=None)
@given(task=tasks)
def test_the_solver_is_right(task):
    examples = task.held_out_examples(30, "test")
    assert (task.solve(examples.inputs) == examples.targets).all()
    assert (task.ceiling(examples) == 1).all()
    assert task.scored(examples)[:, task.start :].all()


def test_the_first_one_acts_first():
    task = PermutationTask(degree=3, context=2)
    elements = list(itertools.permutations(range(3)))
    exchange, rotate = elements.index((1, 0, 2)), elements.index((1, 2, 0))
    answers = task.solve(np.array([[exchange, rotate], [rotate, exchange]]))[:, 1]
    assert [elements[answer] for answer in answers] == [(2, 1, 0), (0, 2, 1)]


def test_the_group_of_two_elements_is_the_parity():
    inputs = np.random.default_rng(0).integers(2, size=(50, 12))
    assert (PermutationTask(degree=2, context=12).solve(inputs) == inputs.cumsum(1) % 2).all()


@pytest.mark.parametrize("start", [True, False])
def test_beginnings_seen_in_training_against_sets(start):
    task = PermutationTask(degree=3, context=6, start=start)
    training, test = task.training_examples(stream(1, "training"), 300), task.held_out_examples(100, "test")

    def beginnings(examples):
        return [tuple(row[: start + end]) for row in examples.inputs.tolist() for end in range(1, 7)]

    seen = set(beginnings(training))
    expected = sum(b in seen for b in beginnings(test)) / len(beginnings(test))
    assert 0 < expected < 1
    assert unseen(task, [training], test).seen == pytest.approx(expected)


def test_what_it_is_worth():
    task = PermutationTask()
    assert (task.degree, task.vocab_size, task.chance) == (5, 120, 1 / 120)
    assert PermutationTask(start=True).vocab_size == 121
    assert PermutationTask(degree=3, context=4).complexity == pytest.approx(math.log2(6**4))


@pytest.mark.parametrize("wrong", [{"degree": 1}, {"degree": 7}, {"context": 1}, {"n": 5}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PermutationTask(**wrong)
