"""The interface of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

__all__ = ["IGNORED", "TASKS", "Examples", "Task", "always", "one_in", "same_as", "worded"]

# The target of a position at which nothing is to be predicted; what torch's cross_entropy leaves out.
IGNORED = -100

# Kinds of tasks by name: every subclass of `Task` with a kind is here.
TASKS: dict[str, type[Task]] = {}


@dataclass(frozen=True)
class Examples:
    """The input of a model, and its target at each position.

    Attributes:
        inputs: Tokens ``(n, L)``, int64, or vectors ``(n, L, C)``, float32.
        targets: Classes ``(n, L)``, int64; `IGNORED` where nothing is to be predicted.
        groups: Number of each example's problem in a mixture ``(n,)``, for measures by group; the model does not see
            it.
    """

    inputs: np.ndarray
    targets: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, part: slice | np.ndarray) -> Examples:
        return Examples(self.inputs[part], self.targets[part], None if self.groups is None else self.groups[part])


def needed(doc: str) -> Any:
    """An abstract property, which a task defines in full or with one of the three below."""

    @abstractmethod
    def get(self: Any) -> Any: ...

    return property(get, doc=doc)


def same_as(field: str) -> Any:
    """A property that is a field of the task under another name.

    A task whose tokens are digits has ``vocab_size = same_as("basis")``.
    """
    return property(lambda self: getattr(self, field), doc=f"The field `{field}`.")


def always(value: Any) -> Any:
    """A property that is the same for all tasks of a kind.

    A task of bits has ``vocab_size = always(2)``.
    """
    return property(lambda self: value, doc=f"Always {value}.")


def worded(text: str) -> Any:
    """A property that is a text with fields of the task in it.

    A task that repeats digits has ``formula = worded("repeat the last {delay} digits")``.
    """
    return property(lambda self: text.format_map(vars(self)), doc=text)


def one_in(number: str) -> Any:
    """A property that is 1 over another one.

    A task whose answers are equally likely digits has ``chance = one_in("basis")``.
    """
    return property(lambda self: 1.0 / getattr(self, number), doc=f"1 / `{number}`.")


class Task(BaseModel, ABC):
    """A family of problems: sequences, and what is to be predicted at some of their positions.

    A new task is one file with one subclass: fields are its settings, `kind` is its name in a configuration, and
    the abstract members describe it. The class registers itself. The other members have defaults that fit a task whose
    targets follow from the inputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str

    # Raised where the same settings come to mean other examples. It is part of the identity of cells.
    revision: ClassVar[int] = 1

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            TASKS[kind] = cls

    # ---- what the model sees ----

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name, e.g. ``"sum, basis 16, delay 5"``."""

    # The rule in one line, for a reader who knows nothing of it; empty: the label says it all.
    formula = worded("")
    vocab_size = needed("Number of different tokens, of input and target alike, int.")
    length = needed("Number of positions L, int.")

    @property
    def input_dim(self) -> int | None:
        """Width C of input vectors; None: inputs are tokens."""
        return None

    @property
    def is_causal(self) -> bool:
        """Whether a position sees itself and those before it alone."""
        return True

    @abstractmethod
    def training_examples(self, bits: np.random.Philox, count: int) -> Examples:
        """The next `count` training examples of a stream, whose raw numbers are all that may be random."""

    @abstractmethod
    def held_out_examples(self, count: int, purpose: str) -> Examples:
        """Up to `count` examples for ``"validation"`` or ``"test"``, the same for every seed.

        The two purposes never share an example where the task has enough of them.
        """

    # ---- what is measured ----

    @abstractmethod
    def solve(self, inputs: np.ndarray) -> np.ndarray | None:
        """The best predictions ``(n, L)`` that follow from the inputs; None: the best is not known."""

    def scored(self, examples: Examples) -> np.ndarray:
        """Positions ``(n, L)`` that count for the accuracy; by default, all that have a target."""
        return examples.targets != IGNORED

    def ceiling(self, examples: Examples) -> np.ndarray:
        """Probability ``(n, L)`` that the best predictor is right; 1 where the inputs determine the target."""
        return np.ones(examples.targets.shape)

    def splits(self, examples: Examples) -> dict[str, np.ndarray]:
        """Groups of positions by which accuracy is split: from a name to integers ``(n, L)``; below 0: in no group.

        Unlike `scored`, all positions with a target count.
        """
        return {"position": np.broadcast_to(np.arange(examples.targets.shape[1]), examples.targets.shape)}

    def group_name(self, split: str, group: int) -> str:
        """The name of a group of a split."""
        return f"{split} {group}"

    def contexts(self, examples: Examples) -> np.ndarray | None:
        """An identifier, uint64, of what determines the target at each of the last k positions ``(n, k)``.

        They tell which of the targets that are scored were seen in training. None: what is tested is never met in
        training, or this says nothing.
        """
        return None

    @property
    def fixed_data(self) -> bool:
        """Whether there are no further examples, so that results depend on which of them are the test."""
        return False

    def continued(self, examples: Examples, tokens: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Prompts ``(n, p)`` and their true continuations ``(n, tokens)``, for rollouts; None: there are none."""
        return None

    @property
    @abstractmethod
    def complexity(self) -> float:
        """Difficulty in bits, by which tasks of one family are ordered: log2 of the number of states."""

    chance = needed("Accuracy of a guess at a scored position, float.")

    def facts(self) -> dict[str, Any]:
        """Facts that put an accuracy into perspective; keys as in `study.config.condition.Condition`."""
        test = self.held_out_examples(2048, "test")
        counted = self.scored(test)
        answers = test.targets[counted]
        facts = {
            "complexity": self.complexity,
            "chance": self.chance,
            "majority": float(np.bincount(answers).max() / answers.size),
        }
        if self.input_dim is None:
            facts["copy_last"] = float((answers == test.inputs[counted]).mean())
        if self.solve(test.inputs[:1]) is not None:
            facts["ceiling"] = float(self.ceiling(test)[counted].mean())
        return facts
