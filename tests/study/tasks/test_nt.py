import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.contexts import unseen
from expressive_attention.study.tasks.recurrences.nt import NTTask
from expressive_attention.study.tasks.rng import stream

sums = st.builds(
    NTTask, operation=st.sampled_from(["sum", "difference"]), basis=st.integers(2, 20), delay=st.integers(1, 12)
)
products = st.builds(
    NTTask, operation=st.just("product"), basis=st.sampled_from([3, 5, 7, 13]), delay=st.integers(1, 12)
)
tasks = sums | products


def follow(task, start, length):
    x = list(start)
    while len(x) < length:
        last, other = x[-1], x[-task.delay]
        x.append(
            {"sum": last + other, "difference": last - other, "product": last * other}[task.operation] % task.basis
        )
    return x[:length]


def states(task):
    return list(itertools.product(range(task.lowest, task.basis), repeat=task.delay))


def whole(examples):
    """Inputs and the last target: the sequence."""
    return np.concatenate([examples.inputs, examples.targets[:, -1:]], axis=1)


@settings(deadline=None)
@given(task=tasks, seed=st.integers(0, 1000))
def test_sequences_follow_the_recurrence(task, seed):
    examples = task.training_examples(stream(seed, "training"), 20)
    assert examples.inputs.shape == examples.targets.shape == (20, task.length)
    sequences = whole(examples)
    assert ((sequences >= task.lowest) & (sequences < task.basis)).all()
    for row in sequences.tolist():
        assert row == follow(task, row[: task.delay], len(row))


@settings(deadline=None)
@given(task=tasks)
def test_targets_are_the_determined_digits_which_a_solver_finds(task):
    examples = task.held_out_examples(10, "test")
    determined = np.arange(task.length) + 1 >= task.delay
    expected = np.where(determined, whole(examples)[:, 1:], IGNORED)
    assert (examples.targets == expected).all()
    assert (task.solve(examples.inputs) == expected).all()
    assert (task.scored(examples) == determined).all()


@settings(deadline=None, max_examples=60)
@given(task=tasks)
def test_no_start_is_in_two_of_training_validation_and_test(task):
    starts = {
        purpose: {tuple(row[: task.delay]) for row in task.held_out_examples(50, purpose).inputs.tolist()}
        for purpose in ("validation", "test")
    }
    training = {tuple(row[: task.delay]) for row in task.training_examples(stream(0, "training"), 500).inputs.tolist()}
    if task.state_space < 16:
        assert starts["validation"] == starts["test"] == set(states(task))
        return
    assert starts["validation"]
    assert starts["test"]
    assert not starts["validation"] & starts["test"]
    assert not (starts["validation"] | starts["test"]) & training


def brute_force_cycles(task):
    cycles = set()
    for state in states(task):
        for _ in range(task.state_space):
            state = tuple(follow(task, state, task.delay + 1)[1:])
        cycle = [state]
        while (following := tuple(follow(task, cycle[-1], task.delay + 1)[1:])) != state:
            cycle.append(following)
        cycles.add(frozenset(cycle))
    return dict(Counter(len(cycle) for cycle in cycles))


def test_the_cycles_of_delayed_xor():
    assert NTTask(basis=2, delay=5).cycles() == {1: 1, 3: 1, 7: 1, 21: 1}


SMALL = [(2, 1), (4, 1), (6, 1), (3, 1), (2, 4), (3, 3), (4, 3), (6, 2)]


@pytest.mark.parametrize(
    ("operation", "basis", "delay"),
    [
        *((operation, *size) for operation in ("sum", "difference") for size in SMALL),
        *(("product", *size) for size in [(3, 1), (3, 4), (5, 1), (5, 3), (7, 2)]),
    ],
)
def test_cycles_against_brute_force(operation, basis, delay):
    task = NTTask(operation=operation, basis=basis, delay=delay)
    assert task.cycles() == brute_force_cycles(task)


def test_spaces_too_large_to_enumerate():
    task = NTTask(basis=16, delay=20)
    assert task.state_space == 16**20
    assert task.cycles() is None
    assert len(task.held_out_examples(100, "test")) == 100


def test_trivial_predictors_against_brute_force():
    task = NTTask(basis=2, delay=3)  # 8 states, none held out: the test is all of them
    rows = [follow(task, state, 5) for state in states(task)]
    pairs = [(row[t - 1], row[t]) for row in rows for t in (3, 4)]
    facts = task.facts()
    assert facts["chance"] == 0.5
    assert facts["majority"] == max(Counter(y for _, y in pairs).values()) / len(pairs)
    assert facts["copy_last"] == sum(x == y for x, y in pairs) / len(pairs)
    assert facts["held_out"] == 0.0
    assert NTTask(basis=4, delay=5).facts()["held_out"] == 1 / 8


def test_contexts_seen_against_sets():
    task = NTTask(basis=4, delay=3)
    training, test = task.training_examples(stream(1, "training"), 30), task.held_out_examples(30, "test")

    def windows(examples):
        return [tuple(row[p : p + 3]) for row in examples.inputs.tolist() for p in (0, 1)]

    seen = set(windows(training))
    expected = sum(w in seen for w in windows(test)) / len(windows(test))
    assert 0 < expected < 1
    assert unseen(task, [training[:10], training[10:]], test).seen == pytest.approx(expected)


def test_rollouts_continue_the_prompt():
    task = NTTask(basis=5, delay=3)
    prompts, truth = task.continued(task.held_out_examples(4, "test"), 10)
    for prompt, digits in zip(prompts.tolist(), truth.tolist(), strict=True):
        assert prompt + digits == follow(task, prompt, 13)


def test_the_first_sequences_are_these_on_every_machine():
    task = NTTask(basis=16, delay=5)
    first = whole(task.training_examples(stream(0, "training"), 2))
    assert first[0].tolist() == follow(task, [int(x) % 16 for x in stream(0, "training").random_raw(5)], 7)
    assert first.tolist() == GOLDEN
    assert np.unique(task.held_out_examples(1024, "test").inputs[:, :5], axis=0).shape == (1024, 5)


@pytest.mark.parametrize("wrong", [{"basis": 1}, {"delay": 0}, {"operation": "quotient"}, {"context": 1}, {"base": 3}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        NTTask(**{"basis": 4, "delay": 3, **wrong})


@pytest.mark.parametrize("basis", [2, 4, 9])
def test_products_need_an_odd_prime(basis):
    with pytest.raises(ValidationError, match="basis must be a prime"):
        NTTask(operation="product", basis=basis, delay=3)


GOLDEN = [[9, 14, 14, 8, 1, 10, 8], [6, 7, 7, 7, 12, 2, 9]]
