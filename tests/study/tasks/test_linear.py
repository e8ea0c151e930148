import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expressive_attention.study.config.load import parse_config
from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.recurrences.linear import LinearTask
from expressive_attention.study.tasks.recurrences.nt import NTTask


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=5).filter(lambda a: a[-1] % 5 != 0), st.integers(0, 3))
def test_targets_are_the_sums_which_a_solver_finds(coefficients, extra):
    delay = len(coefficients)
    task = LinearTask(coefficients=coefficients, basis=5, context=delay + extra)
    examples = task.held_out_examples(12, "test")
    x = np.concatenate([examples.inputs, examples.targets[:, -1:]], axis=1)
    for t in range(delay, task.length + 1):
        expected = sum(a * x[:, t - 1 - i] for i, a in enumerate(coefficients)) % 5
        assert (x[:, t] == expected).all()
        assert (examples.targets[:, t - 1] == expected).all()
    assert (examples.targets[:, : delay - 1] == IGNORED).all()
    assert (task.solve(examples.inputs) == examples.targets).all()


def test_nt_tasks_are_linear():
    linear, nt = LinearTask(coefficients=(1, 0, -1), basis=6), NTTask(operation="difference", basis=6, delay=3)
    states = np.random.default_rng(0).integers(6, size=(50, 3))
    assert (linear.following(states) == nt.following(states)).all()
    assert linear.cycles() == nt.cycles()


def test_a_grid_gives_lists_of_coefficients():
    text = 'name = "x"\n[[grid]]\ntask = { kind = "linear", basis = 4, coefficients = [[1, 2, 1], [1, 3]] }'
    labels = [label for label, _, _ in parse_config(text, "x").expanded()]
    assert labels == ["linear 1 2 1, basis 4, rope", "linear 1 3, basis 4, rope"]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"coefficients": (1, 4)}, "coefficients"), ({"delay": 3}, "delay"), ({"coefficients": ()}, "coefficients")],
)
def test_wrong_values_are_refused(wrong, word):
    with pytest.raises(ValidationError, match=word):
        LinearTask(**{"basis": 4, "coefficients": (1, 1), **wrong})
