import itertools
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from pydantic import ValidationError

from expressive_attention.study.config.load import parse_config
from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.recurrences.multitask import MultiTask
from expressive_attention.study.tasks.rng import stream

MIXES = [
    {"basis": 2, "delays": (1, 3)},
    {"basis": 3, "delays": (2,), "operations": ("sum", "difference")},
    {"basis": 3, "delays": (1, 2), "operations": ("sum", "product")},
    {"basis": 3, "delays": (1, 2), "test_delays": (3,)},
]


def every_sequence(rule, length):
    """All sequences of a rule, which are equally probable."""
    starts = np.array(list(itertools.product(range(rule.lowest, rule.basis), repeat=rule.delay)))
    return rule.sequences(starts, length)


def exact_probabilities(task):
    """P(next digit | context) by counting over all sequences of all rules, as fractions."""
    joint = defaultdict(lambda: defaultdict(Fraction))
    for rule in task.rules:
        sequences = every_sequence(rule, task.length + 1).tolist()
        for row in sequences:
            for t in range(1, task.length + 1):
                joint[tuple(row[:t])][row[t]] += Fraction(1, len(sequences))
    return joint


@pytest.mark.parametrize("mix", MIXES)
def test_the_best_predictor_against_counting(mix):
    task = MultiTask(**mix)
    joint = exact_probabilities(task)
    inputs = np.concatenate([every_sequence(rule, task.length) for rule in task.rules])
    found = task.probabilities(inputs)
    for row, probabilities in zip(inputs.tolist(), found, strict=True):
        for t in range(task.length):
            counts = joint[tuple(row[: t + 1])]
            total = sum(counts.values())
            expected = [float(counts[digit] / total) for digit in range(task.basis)]
            assert probabilities[t].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mix", MIXES)
def test_the_solver_reaches_the_ceiling_and_is_right_where_it_counts(mix):
    task = MultiTask(**mix)
    examples = task.held_out_examples(4000, "test")
    right = task.solve(examples.inputs) == examples.targets
    scored = task.scored(examples)
    assert right[scored].all()
    assert scored.any()
    if task.test_delays is None:  # else rules are drawn that the predictor gives less weight to
        targets = examples.targets != IGNORED
        assert right[targets].mean() == pytest.approx(task.ceiling(examples)[targets].mean(), abs=0.03)


@pytest.mark.parametrize("mix", MIXES)
def test_every_example_follows_the_rule_of_its_group(mix):
    task = MultiTask(**mix)
    for examples, delays in (
        (task.training_examples(stream(3, "training"), 300), task.delays),
        (task.held_out_examples(300, "test"), task.delays_tested),
    ):
        assert set(examples.groups.tolist()) == {i for i, rule in enumerate(task.rules) if rule.delay in delays}
        for group in set(examples.groups.tolist()):
            rule, part = task.rules[group], examples[examples.groups == group]
            predictions = rule.solve(part.inputs)
            known = (predictions != IGNORED) & (part.targets != IGNORED)
            assert (predictions[known] == part.targets[known]).all()
        first = min(rule.delay for rule in task.rules) - 1
        assert ((examples.targets == IGNORED) == (np.arange(task.length) < first)).all()


def test_no_start_is_in_two_of_training_validation_and_test():
    task = MultiTask(basis=4, delays=(3, 4))
    training = task.training_examples(stream(0, "training"), 2000)
    held = {purpose: task.held_out_examples(60, purpose) for purpose in ("validation", "test")}
    for group, rule in enumerate(task.rules):
        starts = [
            {tuple(row[: rule.delay]) for row in part.inputs[part.groups == group].tolist()}
            for part in (training, held["validation"], held["test"])
        ]
        assert all(starts)
        assert not any(a & b for a, b in itertools.combinations(starts, 2))


def test_splits_say_what_the_context_tells():
    task = MultiTask(basis=3, delays=(1, 2))  # doubling, and the Fibonacci sequence
    examples = task.held_out_examples(50, "test")
    splits = task.splits(examples)
    possible = np.array([
        [
            sum(
                any((row[: t + 1] == candidate).all() for candidate in every_sequence(rule, t + 1))
                for rule in task.rules
            )
            for t in range(task.length)
        ]
        for row in examples.inputs
    ])  # fmt: skip
    assert (splits["rules possible"] == possible).all()
    assert ((splits["rule identified"] == 1) == (possible == 1)).all()
    assert {possible.min(), possible.max()} == {1, 2}
    assert task.group_name("rule", 1) == "sum, delay 2"
    assert task.group_name("rule identified", 0) == "rule not identified"


def test_a_grid_gives_lists_of_delays():
    text = 'name = "x"\n[[grid]]\ntask = { kind = "multi", basis = 4, delays = [[2, 3], [2, 5]] }'
    labels = [label for label, _, _ in parse_config(text, "x").expanded()]
    assert labels == [f"mixed sum, basis 4, delays 2 {delay}, rope" for delay in (3, 5)]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"delays": (2,)}, "at least two tasks"),
        ({"delays": (2, 2)}, "delays must differ"),
        ({"context": 2}, "context must be at least the longest delay, 3"),
        ({"operations": ("sum", "product")}, "basis must be a prime"),
        ({"test_delays": ()}, "test_delays"),
    ],
)
def test_wrong_values_are_refused(wrong, word):
    with pytest.raises(ValidationError, match=word):
        MultiTask(**{"basis": 4, "delays": (2, 3), **wrong})
