import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.recall.induction import InductionTask
from expressive_attention.study.tasks.rng import stream

tasks = st.builds(InductionTask, context=st.integers(3, 40), vocab=st.integers(3, 20))


@settings(deadline=None)
@given(task=tasks, seed=st.integers(0, 1000))
def test_what_followed_the_special_token_is_the_target(task, seed):
    examples = task.training_examples(stream(seed, "training"), 20)
    special = task.vocab - 1
    for tokens, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        places = [t for t, token in enumerate(tokens) if token == special]
        assert len(places) == 2
        assert places[1] == task.context - 1
        assert targets == [IGNORED] * (task.context - 1) + [tokens[places[0] + 1]]


@settings(deadline=None)
@given(task=tasks)
def test_the_solver_is_right(task):
    examples = task.held_out_examples(30, "test")
    assert (task.solve(examples.inputs) == examples.targets).all()
    assert (task.scored(examples) == (examples.targets != IGNORED)).all()
    assert (task.ceiling(examples) == 1).all()


def test_places_and_answers_are_uniform():
    task, count = InductionTask(context=6, vocab=4), 20_000
    examples = task.draw(stream(0, "places"), count)
    found = Counter(
        (tokens.index(3), targets[-1])
        for tokens, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True)
    )
    assert set(found) == {(place, answer) for place in range(4) for answer in range(3)}
    assert task.complexity == math.log2(len(found))
    expected = count / len(found)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in found.values())


def test_distances_lead_from_the_one_special_token_to_the_other():
    task = InductionTask(context=20)
    examples = task.held_out_examples(50, "test")
    for tokens, found in zip(examples.inputs.tolist(), task.splits(examples)["distance"].tolist(), strict=True):
        assert found == [-1] * 19 + [int(math.log2(19 - tokens.index(15)))]


@pytest.mark.parametrize("wrong", [{"context": 2}, {"vocab": 2}, {"length": 8}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        InductionTask(**wrong)
