import itertools
import math

import pytest
from pydantic import ValidationError

from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.modular_addition import ModularAdditionTask
from expressive_attention.study.tasks.rng import stream

OPERATIONS = ["add", "subtract", "multiply", "divide"]


def right(operation, a, b, answer, modulus):
    """Whether the answer is right, without a division."""
    return {
        "add": (a + b - answer) % modulus == 0,
        "subtract": (answer + b - a) % modulus == 0,
        "multiply": (a * b - answer) % modulus == 0,
        "divide": (answer * b - a) % modulus == 0,
    }[operation]


def parts(task):
    """Training (enough draws to meet all pairs), validation and test."""
    return [
        task.training_examples(stream(0, "training"), 40 * task.pairs),
        task.held_out_examples(task.pairs, "validation"),
        task.held_out_examples(task.pairs, "test"),
    ]


def pairs(examples):
    return [(a, b) for a, _, b, _ in examples.inputs.tolist()]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("modulus", [3, 7, 13])
def test_answers_are_right_and_stand_at_the_equals_sign(operation, modulus):
    task = ModularAdditionTask(operation=operation, modulus=modulus)
    for examples in parts(task):
        for tokens, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
            a, sign, b, equals = tokens
            assert (sign, equals) == (modulus, modulus + 1)
            assert targets[:3] == [IGNORED] * 3
            assert 0 <= targets[3] < modulus
            assert right(operation, a, b, targets[3], modulus)
        assert (task.solve(examples.inputs) == examples.targets).all()
        assert (task.ceiling(examples) == 1).all()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_every_pair_is_in_one_of_training_validation_and_test(operation, fraction):
    task = ModularAdditionTask(operation=operation, modulus=11, training_fraction=fraction)
    training, validation, test = (pairs(part) for part in parts(task))
    lowest = 1 if operation == "divide" else 0
    every = set(itertools.product(range(11), range(lowest, 11)))
    assert len(set(training)) == round(fraction * len(every))
    assert abs(len(validation) - len(test)) <= 1
    assert sorted({*training} | {*validation, *test}) == sorted(every)
    assert len(set(training)) + len(validation) + len(test) == len(every)
    assert task.complexity == math.log2(len(every))
    assert task.facts()["held_out"] == pytest.approx(1 - len(set(training)) / len(every))


def test_a_larger_fraction_contains_a_smaller_one():
    few, many = (
        set(pairs(parts(ModularAdditionTask(modulus=11, training_fraction=fraction))[0])) for fraction in (0.3, 0.6)
    )
    assert few < many


def test_pairs_the_other_way_round():
    task = ModularAdditionTask(modulus=11)
    training, _, test = parts(task)
    groups, trained = task.splits(test)["mirrored"], set(pairs(training))
    assert set(groups.ravel().tolist()) == {-1, 0, 1}
    for (a, b), found in zip(pairs(test), groups.tolist(), strict=True):
        assert found == [-1 if a == b else int((b, a) in trained)] * 4
    assert [task.group_name("mirrored", group) for group in (0, 1)] == ["b, a held out", "b, a trained on"]
    assert "mirrored" not in ModularAdditionTask(modulus=11, operation="subtract").splits(test)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"modulus": 1}, "modulus"),
        ({"modulus": 9, "operation": "divide"}, "modulus must be a prime"),
        ({"operation": "power"}, "operation"),
        ({"training_fraction": 1.0}, "training_fraction"),
        ({"modulus": 3, "training_fraction": 0.9}, "training_fraction must leave"),
        ({"modulus": 3, "training_fraction": 0.01}, "training_fraction must leave"),
        ({"p": 97}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_values_are_refused(wrong, word):
    with pytest.raises(ValidationError, match=word):
        ModularAdditionTask(**wrong)
