"""The rule of each task in one line."""

import pytest

from expressive_attention.study.config.load import load_config
from expressive_attention.study.config.presets import preset_names
from expressive_attention.study.tasks import TASKS


@pytest.mark.parametrize(
    ("fields", "formula"),
    [
        ({"kind": "nt", "basis": 16, "delay": 5}, "x(t) = x(t - 1) + x(t - 5), mod 16"),
        ({"kind": "nt", "operation": "difference", "basis": 4, "delay": 2}, "x(t) = x(t - 1) - x(t - 2), mod 4"),
        ({"kind": "nt", "operation": "product", "basis": 5, "delay": 3}, "x(t) = x(t - 1) * x(t - 3), mod 5"),
        ({"kind": "linear", "coefficients": [1, 0, 3], "basis": 5}, "x(t) = x(t - 1) + 3 x(t - 3), mod 5"),
        (
            {"kind": "multi", "operations": ["sum", "difference"], "basis": 4, "delays": [7]},
            "x(t) = x(t - 1) + or - x(t - 7), mod 4",
        ),
        (
            {"kind": "multi", "basis": 4, "delays": [2, 5]},
            "x(t) = x(t - 1) + x(t - d), mod 4; d is one of 2, 5",
        ),
        (
            {"kind": "noisy", "basis": 4, "delay": 3, "noise": 0.1},
            "x(t) = x(t - 1) + x(t - 3), mod 4; 10% of the digits are read wrong",
        ),
        ({"kind": "modular_addition", "modulus": 61, "operation": "divide"}, "a / b = ?, mod 61"),
    ],
)
def test_the_rule_is_told(fields, formula):
    signs = str.maketrans({"\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/"})
    assert TASKS[fields["kind"]].model_construct(**fields).formula.translate(signs) == formula


def test_every_task_of_the_presets_has_a_rule():
    tasks = [task for name in preset_names() for _, task, _ in load_config(name)[0].expanded()]
    assert {task.kind for task in tasks} | {"linear"} == {
        kind for kind in TASKS if TASKS[kind].__module__.startswith("expressive_attention.")
    }
    for task in tasks:
        assert task.formula != ""
