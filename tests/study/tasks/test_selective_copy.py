import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.recall.selective_copy import SelectiveCopyTask
from expressive_attention.study.tasks.rng import stream

tasks = st.builds(SelectiveCopyTask, copied=st.integers(1, 8), noise=st.integers(0, 20), vocab=st.integers(4, 20))


@settings(deadline=None)
@given(task=tasks, seed=st.integers(0, 1000))
def test_what_is_not_noise_is_repeated_in_its_order(task, seed):
    examples = task.training_examples(stream(seed, "training"), 20)
    body = task.noise + task.copied
    for tokens, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        assert tokens[body:] == [task.vocab - 1] * task.copied
        assert targets == [IGNORED] * body + [token for token in tokens[:body] if token != 0]
        assert task.vocab - 1 not in tokens[:body]


@settings(deadline=None)
@given(task=tasks)
def test_the_solver_is_right(task):
    examples = task.held_out_examples(30, "test")
    assert (task.solve(examples.inputs) == examples.targets).all()
    assert (task.scored(examples) == (examples.targets != IGNORED)).all()
    assert (task.ceiling(examples) == 1).all()


def test_places_and_tokens_are_uniform():
    task, count = SelectiveCopyTask(copied=2, noise=3, vocab=5), 20_000
    rows = task.draw(stream(0, "places"), count).inputs[:, :5].tolist()
    places = Counter(tuple(t for t, token in enumerate(row) if token) for row in rows)
    strings = Counter(tuple(token for token in row if token) for row in rows)
    assert set(places) == set(itertools.combinations(range(5), 2))
    assert set(strings) == set(itertools.product((1, 2, 3), repeat=2))
    for found in (places, strings):
        expected = count / len(found)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in found.values())


def test_distances_lead_from_the_copy_to_the_token():
    task = SelectiveCopyTask(copied=3, noise=12)
    examples = task.held_out_examples(50, "test")
    for tokens, found in zip(examples.inputs.tolist(), task.splits(examples)["distance"].tolist(), strict=True):
        places = [t for t, token in enumerate(tokens[:15]) if token]
        assert found == [-1] * 15 + [int(math.log2(15 + i - place)) for i, place in enumerate(places)]


def test_what_it_is_worth():
    task = SelectiveCopyTask(copied=3, noise=2, vocab=6)
    assert task.complexity == pytest.approx(math.log2(len(list(itertools.product(range(1, 5), repeat=3)))))
    assert task.chance == 1 / 4
    assert task.length == 8


@pytest.mark.parametrize("wrong", [{"copied": 0}, {"noise": -1}, {"vocab": 3}, {"context": 8}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SelectiveCopyTask(**wrong)
