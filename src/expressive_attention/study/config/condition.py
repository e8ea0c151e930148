"""A condition, on which mechanisms are compared, and a setting, which is tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Condition", "Setting"]


class Setting(NamedTuple):
    """The hyperparameters that are tuned for each mechanism on each condition."""

    learning_rate: float
    initial_gain: float

    def __str__(self) -> str:
        gain = "" if self.initial_gain == 1 else f", gain {self.initial_gain:g}"
        return f"learning rate {self.learning_rate:g}{gain}"


@dataclass(frozen=True)
class Condition:
    """One task and one model on which the mechanisms are compared.

    Attributes:
        label: Short name, unique within a study, e.g. ``"sum, basis 16, delay 5, rope"``.
        task: Fields of the task, e.g. ``{"kind": "nt", "operation": "sum", "basis": 16, "delay": 5}``.
        model: Fields of the model, e.g. ``{"layers": 1, "embed_dim": 16, "position": "rope", ...}``.
        facts: The worth of a number on this task: ``complexity`` (bits), ``chance`` and ``majority`` (accuracies of
            trivial predictors), ``test_sequences``, ``predictions`` (scored) and ``contexts`` (different ones among
            them; all int), ``fixed_data`` (bool: there are no more examples than these); and, where they apply,
            ``copy_last`` (accuracy), ``ceiling`` (accuracy of the best predictor), ``state_space`` (int), ``cycles``
            (str), ``held_out`` (share of starting states never trained on), and what else a task has to say.
        task_label: Short name of the task alone, e.g. ``"sum, basis 16, delay 5"``.
        formula: Its rule in one line, as `Task.formula`; empty: the label says it all.
    """

    label: str
    task: dict[str, Any]
    model: dict[str, Any]
    facts: dict[str, Any]
    task_label: str
    formula: str = ""
