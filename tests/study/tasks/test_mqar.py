import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.recall.mqar import MQARTask
from expressive_attention.study.tasks.rng import stream

tasks = st.builds(
    lambda pairs, vocab, slots, filler: MQARTask(
        pairs=pairs, vocab=2 * (pairs + 1 + vocab), context=4 * pairs + 2 * slots, filler=filler
    ),
    st.integers(1, 6),
    st.integers(0, 20),
    st.integers(0, 10),
    st.sampled_from(["blank", "random"]),
)


@settings(deadline=None)
@given(task=tasks, seed=st.integers(0, 1000))
def test_each_key_is_asked_once_and_its_value_is_the_target(task, seed):
    examples = task.training_examples(stream(seed, "training"), 20)
    half, start = task.vocab // 2, 2 * task.pairs
    for tokens, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        values = dict(zip(tokens[0:start:2], tokens[1:start:2], strict=True))
        assert len(values) == len(set(values.values())) == task.pairs
        assert all(1 <= key < half <= value < task.vocab for key, value in values.items())
        asked = [t for t, target in enumerate(targets) if target != IGNORED]
        assert all(t >= start and (t - start) % 2 == 0 for t in asked)
        assert sorted(tokens[t] for t in asked) == sorted(values)
        assert all(targets[t] == values[tokens[t]] for t in asked)
        if task.filler == "blank":
            assert all(tokens[t] == 0 for t in range(start, task.length) if t not in asked)


@settings(deadline=None)
@given(task=tasks)
def test_the_solver_is_right(task):
    examples = task.held_out_examples(30, "test")
    predictions, asked = task.solve(examples.inputs), examples.targets != IGNORED
    assert (predictions[asked] == examples.targets[asked]).all()
    assert (task.scored(examples) == asked).all()
    assert (task.ceiling(examples) == 1).all()
    if task.filler == "blank":
        assert (predictions == examples.targets).all()


def test_random_filler_is_any_token():
    task = MQARTask(pairs=1, vocab=8, context=20, filler="random")
    examples = task.training_examples(stream(0, "training"), 4000)
    fillers = examples.inputs[:, 2:][examples.targets[:, 2:] == IGNORED]
    counts = np.bincount(fillers, minlength=8)
    assert counts.tolist() == pytest.approx([fillers.size / 8] * 8, abs=5 * (fillers.size / 8) ** 0.5)


@pytest.mark.parametrize("power", [0.01, 1.0, 2.0])
def test_slots_are_drawn_one_after_another_by_their_weights(power):
    count, slots = 20_000, 5
    task = MQARTask(pairs=2, vocab=16, context=4 + 2 * slots, power=power)
    p = np.array([g ** (power - 1) for g in range(1, slots + 1)])
    p /= p.sum()
    expected = [[p[i] * p[j] / (1 - p[i]) if i != j else 0.0 for j in range(slots)] for i in range(slots)]
    examples = task.draw(stream(0, "slots"), count)
    found = np.zeros((slots, slots))
    for tokens in examples.inputs.tolist():
        i, j = (tokens.index(tokens[k], 4) // 2 - 2 for k in (0, 2))
        found[i, j] += 1 / count
    assert found.ravel().tolist() == pytest.approx(np.ravel(expected).tolist(), abs=5 * 0.5 / count**0.5)


def test_distances_lead_from_the_query_to_its_key():
    task = MQARTask(pairs=3, vocab=32, context=40)
    examples = task.held_out_examples(50, "test")
    groups = task.splits(examples)["distance"]
    for tokens, targets, found in zip(
        examples.inputs.tolist(), examples.targets.tolist(), groups.tolist(), strict=True
    ):
        for t, target in enumerate(targets):
            expected = -1 if target == IGNORED else int(math.log2(t - tokens.index(tokens[t])))
            assert found[t] == expected


def test_what_it_is_worth():
    task = MQARTask(pairs=2, vocab=8)  # keys 1 to 3, values 4 to 7
    maps = {(a, v, b, w) for a in (1, 2) for b in range(a + 1, 4) for v in range(4) for w in range(4) if v != w}
    assert task.complexity == math.log2(len(maps))
    assert task.chance == 1 / 4
    assert task.length == 8


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"pairs": 0}, "pairs"),
        ({"vocab": 63}, "vocab"),
        ({"vocab": 8}, r"vocab must be at least 2 \* \(pairs \+ 1\) = 10, got 8"),
        ({"context": 14}, r"context must be at least 4 \* pairs = 16, got 14"),
        ({"context": 17}, "context"),
        ({"power": 0.0}, "power"),
        ({"filler": "none"}, "filler"),
        ({"keys": 2}, "keys"),
    ],
)
def test_wrong_values_are_refused(wrong, word):
    with pytest.raises(ValidationError, match=word):
        MQARTask(**wrong)
