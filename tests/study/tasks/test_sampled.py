"""The properties that all tasks with examples drawn at random share, and modular addition with them."""

import itertools
from collections import Counter

import numpy as np
import pytest

from expressive_attention.study.tasks import IGNORED, TASKS
from expressive_attention.study.tasks.contexts import unseen
from expressive_attention.study.tasks.rng import stream
from expressive_attention.study.tasks.sampled import SampledTask, by_distance, distinct, prefix_identifiers
from expressive_attention.study.training.loop import train_cell
from tests.study.tiny import cell

# Small examples of every kind, whose inputs are still far more than are drawn.
PROBES = {
    "mqar": {"pairs": 2, "vocab": 16, "context": 12},
    "selective_copy": {"copied": 3, "noise": 5, "vocab": 8},
    "induction": {"context": 9, "vocab": 6},
    "modular_addition": {"modulus": 47},
    "parity": {"context": 18},
    "permutation": {"degree": 3, "context": 8},
    "noisy": {"basis": 4, "delay": 5},
}

# Another value of every field.
OTHERS = {
    "mqar": {"pairs": 3, "vocab": 18, "context": 14, "power": 1.0, "filler": "random"},
    "selective_copy": {"copied": 4, "noise": 6, "vocab": 9},
    "induction": {"context": 10, "vocab": 7},
    "modular_addition": {"modulus": 43, "operation": "subtract", "training_fraction": 0.3},
    "parity": {"context": 19, "asked": "last", "start": True},
    "permutation": {"degree": 4, "context": 9, "start": True},
    "noisy": {"operation": "difference", "basis": 3, "delay": 4, "noise": 0.2, "context": 11},
}


def made(kind, **changed):
    return TASKS[kind](**{**PROBES[kind], **changed})


def rows(examples):
    return [tuple(row) for row in examples.inputs.tolist()]


@pytest.mark.parametrize("kind", PROBES)
def test_no_input_is_in_two_of_training_validation_and_test(kind):
    task = made(kind)
    parts = [
        task.training_examples(stream(0, "training"), 6000),
        task.held_out_examples(500, "validation"),
        task.held_out_examples(500, "test"),
    ]
    assert [len(part) for part in parts] == [6000, 500, 500]
    assert all(len(set(rows(part))) > 100 for part in parts)
    assert not any(set(rows(a)) & set(rows(b)) for a, b in itertools.combinations(parts, 2))


def test_with_few_inputs_the_test_was_seen_in_training():
    task = TASKS["mqar"](pairs=1, vocab=8, context=64)
    found = unseen(task, [task.training_examples(stream(0, "training"), 20000)], task.held_out_examples(500, "test"))
    assert (found.seen, found.predictions, found.contexts) == (1, 0, 0)


@pytest.mark.parametrize("kind", PROBES)
def test_a_stream_gives_the_same_examples_and_another_one_others(kind):
    task = made(kind)
    first, again, other = (task.training_examples(stream(seed, "training"), 200) for seed in (3, 3, 4))
    assert (first.inputs == again.inputs).all()
    assert (first.targets == again.targets).all()
    assert (first.inputs != other.inputs).any()
    assert first.inputs.dtype == first.targets.dtype == np.int64


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("purpose", ["validation", "test"])
def test_a_larger_held_out_set_begins_with_a_smaller_one(kind, purpose):
    few, many = (made(kind).held_out_examples(count, purpose) for count in (50, 400))
    assert rows(many)[:50] == rows(few)
    assert (many.targets[:50] == few.targets).all()


@pytest.mark.parametrize("kind", PROBES)
def test_all_examples_fit_the_model(kind):
    task = made(kind)
    examples = task.training_examples(stream(1, "training"), 500)
    assert examples.inputs.shape == examples.targets.shape == (500, task.length)
    assert ((examples.inputs >= 0) & (examples.inputs < task.vocab_size)).all()
    asked = examples.targets != IGNORED
    assert ((examples.targets[asked] >= 0) & (examples.targets[asked] < task.vocab_size)).all()
    assert asked.any(1).all()


@pytest.mark.parametrize("kind", PROBES)
def test_a_random_guess_reaches_the_level_of_chance(kind):
    task = made(kind)
    examples = task.training_examples(stream(2, "training"), 8000)
    targets = examples.targets[examples.targets != IGNORED]
    answers = np.unique(targets)
    assert 1 / len(answers) == pytest.approx(task.chance)
    guesses = np.random.default_rng(0).choice(answers, targets.size)
    assert (guesses == targets).mean() == pytest.approx(task.chance, abs=5 * (task.chance / targets.size) ** 0.5)


@pytest.mark.parametrize(
    ("kind", "field", "value"), [(kind, field, value) for kind in OTHERS for field, value in OTHERS[kind].items()]
)
def test_the_label_tells_every_field(kind, field, value):
    assert set(OTHERS[kind]) == set(TASKS[kind].model_fields) - {"kind"}
    assert made(kind, **{field: value}).label != made(kind).label


@pytest.mark.parametrize("kind", PROBES)
def test_a_cell_trains(kind):
    task = made(kind)
    result = train_cell(cell(task=task, steps=20))
    assert result.seeds["steps"].to_list() == [20, 20]
    assert np.isfinite(result.seeds["cross_entropy"].to_numpy()).all()
    assert set(result.splits["split"]) == set(task.splits(task.held_out_examples(4, "test")))


@pytest.mark.parametrize("kind", [kind for kind in PROBES if issubclass(TASKS[kind], SampledTask)])
def test_one_in_16_inputs_is_for_each_purpose(kind):
    task = made(kind)
    bits, again = stream(5, "x"), stream(5, "x")
    drawn, kept = task.draw(bits, 8000), task.training_examples(again, 8000)
    trained = set(rows(kept))
    left_out = [row for row in rows(drawn) if row not in trained]
    assert len(left_out) / 8000 == pytest.approx(1 / 8, abs=0.03)
    assert task.facts()["held_out"] == 1 / 8


def test_a_small_space_serves_for_everything():
    task = TASKS["parity"](context=4)
    every = set(itertools.product((0, 1), repeat=4))
    assert task.facts()["held_out"] == 0
    for examples in (
        task.training_examples(stream(0, "training"), 500),
        task.held_out_examples(500, "validation"),
        task.held_out_examples(500, "test"),
    ):
        assert set(rows(examples)) == every


@pytest.mark.parametrize(("below", "number"), [(4, 2), (3, 3), (5, 1)])
def test_distinct_integers_come_in_all_orders_equally(below, number):
    count = 20_000
    found = Counter(map(tuple, distinct(stream(0, "distinct"), count, below, number).tolist()))
    orders = set(itertools.permutations(range(below), number))
    assert set(found) == orders
    expected = count / len(orders)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in found.values())


def test_prefixes_are_told_apart():
    inputs = np.array(list(itertools.product(range(3), repeat=6)))
    found = prefix_identifiers(inputs)
    for t in range(6):
        known = {}
        for row, identifier in zip(inputs[:, : t + 1].tolist(), found[:, t].tolist(), strict=True):
            assert known.setdefault(tuple(row), identifier) == identifier
        assert len(set(known.values())) == 3 ** (t + 1)
    assert np.unique(found).size == sum(3**t for t in range(1, 7))


def test_distances_are_grouped_by_powers_of_two():
    distances = [0, 1, 2, 3, 4, 7, 8, 1023, 1024]
    assert by_distance(np.array(distances)).tolist() == [-1, 0, 1, 1, 2, 2, 3, 9, 10]
    names = [made("induction").group_name("distance", group) for group in (0, 1, 3)]
    assert names == ["distance 1", "distance 2 to 3", "distance 8 to 15"]
