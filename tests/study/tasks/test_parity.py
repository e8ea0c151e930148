import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.contexts import unseen
from expressive_attention.study.tasks.parity import ParityTask
from expressive_attention.study.tasks.rng import stream

tasks = st.builds(ParityTask, context=st.integers(1, 40), asked=st.sampled_from(["every", "last"]), start=st.booleans())


@settings(deadline=None)
@given(task=tasks, seed=st.integers(0, 1000))
def test_targets_say_whether_the_number_of_ones_is_odd(task, seed):
    for examples in (task.training_examples(stream(seed, "training"), 20), task.held_out_examples(20, "test")):
        assert examples.inputs.shape[1] == task.length
        assert examples.inputs.max() < task.vocab_size
        for tokens, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
            if task.start:
                assert (tokens.pop(0), targets.pop(0)) == (2, IGNORED)
            running = [tokens[: t + 1].count(1) % 2 for t in range(task.context)]
            asked = running if task.asked == "every" else [IGNORED] * (task.context - 1) + running[-1:]
            assert targets == asked
        assert (task.solve(examples.inputs) == examples.targets).all()
        assert (task.ceiling(examples) == 1).all()


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("asked", ["every", "last"])
def test_beginnings_seen_in_training_against_sets(asked, start):
    task = ParityTask(context=12, asked=asked, start=start)
    training, test = task.training_examples(stream(1, "training"), 300), task.held_out_examples(100, "test")

    def beginnings(examples):
        ends = [start + end for end in (range(1, 13) if asked == "every" else [12])]
        return [tuple(row[:end]) for row in examples.inputs.tolist() for end in ends]

    seen = set(beginnings(training))
    expected = sum(b in seen for b in beginnings(test)) / len(beginnings(test))
    assert unseen(task, [training[:100], training[100:]], test).seen == pytest.approx(expected)
    assert (0 < expected < 1) if asked == "every" else expected == 0  # held-out strings as a whole are never seen


def test_what_it_is_worth():
    assert ParityTask(context=10).complexity == 10
    assert ParityTask(context=10).chance == 0.5
    assert ParityTask(context=10).label == "running parity, context 10"
    assert ParityTask(context=10, start=True).label == "running parity, context 10, start token"
    assert ParityTask(context=10, asked="last").label == "parity, context 10"


@pytest.mark.parametrize("wrong", [{"context": 0}, {"asked": "first"}, {"length": 8}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ParityTask(**wrong)
