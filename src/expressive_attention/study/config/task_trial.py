"""The trial of a task from a file: each of its members is asked, as a study asks it, before any work.

A mistake in a member that is asked only after a training would cost the training.
"""

from __future__ import annotations

import math
import pickle
from typing import Any, NoReturn

import numpy as np
import tomli_w

from ..tasks import IGNORED, Examples, Task
from ..tasks.rng import stream
from .schema import TrainingConfig
from .task_files import TaskFileError, blame, file_of, named

__all__ = ["check_label", "check_task"]

_FEW = 8  # examples that are drawn twice
_REQUIRED_FACTS = ("complexity", "chance")
_NUMBERS = (*_REQUIRED_FACTS, "majority", "copy_last", "ceiling", "held_out", "state_space", "test_sequences")


def check_label(task: Task) -> None:
    """Check the label of a task from a file, which a configuration asks first.

    Raises:
        TaskFileError: It is no text of one line.
    """
    if file_of(task) is not None:
        _Trial(task).label()


def check_task(task: Task, training: TrainingConfig) -> None:
    """Try all members of a task from a file: on a few examples, and on those that will be the test.

    Args:
        task: The task.
        training: The training, which says how many examples there will be.

    Raises:
        TaskFileError: It breaks a rule of `Task`.
    """
    if file_of(task) is None:
        return
    trial = _Trial(task)
    trial.label()
    trial.properties()
    trial.fields()
    trained = trial.training()
    trial.held_out(training.validation_sequences, "validation")
    test = trial.held_out(training.test_sequences, "test")
    for examples in (trained, test):
        trial.solution(examples[:_FEW])
        trial.ceiling(examples)
        trial.splits(examples)
    trial.contexts(trained, test)
    trial.continued(test[: training.rollouts], training.rollout_digits)
    trial.facts()


class _Trial:
    """The questions to a task, one method for each subject."""

    def __init__(self, task: Task) -> None:
        self.task = task
        file = file_of(task)
        assert file is not None
        self.name = f"{file.name}: {type(task).__name__}"

    # ---- properties ----

    def label(self) -> None:
        for member, may_be_empty in (("label", False), ("formula", True)):
            text = self._ask(member)
            is_line = isinstance(text, str) and len(text.splitlines()) < 2 and (may_be_empty or bool(text.strip()))
            self._must(is_line, f"{member} must be a text of one line", text)

    def properties(self) -> None:
        for member in ("vocab_size", "length"):
            value = self._ask(member)
            self._must(_is_integer(value) and value >= 1, f"{member} must be an integer of at least 1", value)
        width = self._ask("input_dim")
        is_width = width is None or (_is_integer(width) and width >= 1)
        self._must(is_width, "input_dim must be None or an integer of at least 1", width)
        for member in ("is_causal", "fixed_data"):
            value = self._ask(member)
            self._must(isinstance(value, bool), f"{member} must be True or False", value)
        bits, chance = self._ask("complexity"), self._ask("chance")
        self._must(_is_number(bits), "complexity must be a finite number", bits)
        self._must(_is_number(chance), "chance must be a finite number", chance)
        self._must(0 <= chance <= 1, "chance must be from 0 to 1", chance)

    def fields(self) -> None:
        """A cell keeps the fields as TOML, and goes to another process."""
        accepted = "values that TOML has"
        try:
            tomli_w.dumps(self.task.model_dump(mode="json", exclude_none=True))
            accepted = "values that pickle takes to other processes"
            pickle.dumps(self.task)
        except Exception as error:
            self._fail(f"its fields must be {accepted}: {named(error)}")

    def facts(self) -> None:
        facts = self._ask("facts", ())
        self._must(isinstance(facts, dict), "facts() must give a dictionary", facts)
        for name, value in facts.items():
            self._must(isinstance(name, str), "facts() must have texts as keys", name)
            is_fact = value is None or isinstance(value, (str, bool)) or _is_number(value)
            self._must(is_fact, f"facts() must give a number, a text or a truth value for {name!r}", value)
        for name in _REQUIRED_FACTS:
            self._must(name in facts, f"facts() must have {name!r}, as those of Task do", sorted(facts))
        for name in _NUMBERS:
            if name in facts:
                self._must(_is_number(facts[name]), f"facts() must give a finite number for {name!r}", facts[name])

    # ---- examples ----

    def training(self) -> Examples:
        """A few examples of a training, always the same for the same stream."""
        call = f"training_examples(bits, {_FEW})"
        drawn, again = (
            self._examples(self._ask("training_examples", (stream(0, "check"), _FEW)), "training_examples")
            for _ in range(2)
        )
        if len(drawn) != _FEW:
            self._fail(f"{call} must give {_FEW} examples, got {len(drawn)}")
        self._is_scored(drawn, "training_examples")
        self._same(drawn, again, "training_examples")
        return drawn

    def held_out(self, count: int, purpose: str) -> Examples:
        """The examples that a study takes for a purpose."""
        few, again, whole = (
            self._examples(self._ask("held_out_examples", (number, purpose)), "held_out_examples")
            for number in (_FEW, _FEW, count)
        )
        for number, found in ((_FEW, few), (count, whole)):
            if not 1 <= len(found) <= number:
                self._fail(
                    f"held_out_examples({number}, {purpose!r}) must give 1 to {number} examples, got {len(found)}"
                )
        self._same(few, again, "held_out_examples")
        self._is_scored(whole, "held_out_examples")
        return whole

    def _examples(self, examples: Any, origin: str) -> Examples:
        """The examples, whose form is what a model can read."""
        self._must(isinstance(examples, Examples), f"{origin} must give Examples", examples)
        arrays = {"inputs": examples.inputs, "targets": examples.targets}
        for name, array in arrays.items():
            self._must(isinstance(array, np.ndarray) and array.ndim >= 1, f"{origin} must give {name}, an array", array)
        width, classes = self.task.input_dim, self.task.vocab_size
        positions = (len(examples), self.task.length)
        inputs = (positions, "int64") if width is None else ((*positions, width), "float32")
        for (name, array), (shape, dtype) in zip(arrays.items(), (inputs, (positions, "int64")), strict=True):
            is_form = array.shape == shape and array.dtype == dtype
            self._must(is_form, f"{origin} must give {name} of shape {shape}, {dtype}", array)
        asked = examples.targets[examples.targets != IGNORED]
        for name, values in (("targets", asked), *([("inputs", examples.inputs)] if width is None else [])):
            if values.size and not 0 <= values.min() <= values.max() < classes:
                self._fail(
                    f"{origin} must give {name} from 0 to vocab_size - 1 = {classes - 1}, "
                    f"got {values.min()} to {values.max()}"
                )
        groups = examples.groups
        if groups is not None:
            fits = _is_array(groups, (len(examples),), "iu")
            self._must(fits, f"{origin} must give groups as None or integers of shape ({len(examples)},)", groups)
        return examples

    def _is_scored(self, examples: Examples, origin: str) -> None:
        scored = self._ask("scored", (examples,))
        shape = examples.targets.shape
        self._must(_is_array(scored, shape, "b"), f"scored(examples) must give truth values of shape {shape}", scored)
        if not scored.any():
            self._fail(f"{origin} gives no position that is scored")
        if (scored & (examples.targets == IGNORED)).any():
            self._fail("scored(examples) must leave out positions whose target is IGNORED, got some of them")

    def _same(self, examples: Examples, again: Examples, origin: str) -> None:
        pairs = ((examples.inputs, again.inputs), (examples.targets, again.targets))
        if not all(np.array_equal(one, other) for one, other in pairs):
            self._fail(f"{origin} must give the same examples when asked for the same, got others")

    # ---- measures ----

    def solution(self, examples: Examples) -> None:
        solved, shape = self._ask("solve", (examples.inputs,)), examples.targets.shape
        is_solution = solved is None or _is_array(solved, shape)
        self._must(is_solution, f"solve(inputs) must give None or an array of the shape {shape}", solved)

    def ceiling(self, examples: Examples) -> None:
        ceiling, shape = self._ask("ceiling", (examples,)), examples.targets.shape
        self._must(_is_array(ceiling, shape, "fiu"), f"ceiling(examples) must give numbers of shape {shape}", ceiling)
        asked = ceiling[examples.targets != IGNORED]
        if asked.size and not 0 <= asked.min() <= asked.max() <= 1 + 1e-9:  # sums of probabilities are rounded
            self._fail(f"ceiling(examples) must give numbers from 0 to 1, got {asked.min():g} to {asked.max():g}")

    def splits(self, examples: Examples) -> None:
        splits, shape = self._ask("splits", (examples,)), examples.targets.shape
        self._must(isinstance(splits, dict), "splits(examples) must give a dictionary", splits)
        for split, groups in splits.items():
            self._must(isinstance(split, str), "splits(examples) must have texts as keys", split)
            fits = _is_array(groups, shape, "iu")
            self._must(fits, f"splits(examples) must give integers of shape {shape} for {split!r}", groups)
            for group in np.unique(groups[(examples.targets != IGNORED) & (groups >= 0)]).tolist():
                name = self._ask("group_name", (split, group))
                self._must(isinstance(name, str), f"group_name({split!r}, {group}) must be a text", name)

    def contexts(self, *parts: Examples) -> None:
        forms = set()
        for examples in (*parts, parts[-1][:1]):
            found, (count, length) = self._ask("contexts", (examples,)), examples.targets.shape
            fits = found is None or (
                _is_array(found, None, "iu")
                and found.ndim == 2
                and len(found) == count
                and 1 <= found.shape[1] <= length
            )
            accepted = f"None or identifiers, uint64, of shape ({count}, k) with k from 1 to {length}"
            self._must(fits, f"contexts(examples) must give {accepted}", found)
            forms.add(None if found is None else found.shape[1])
        if len(forms) > 1:
            said = " and ".join("None" if form is None else f"k = {form}" for form in forms)
            self._fail(f"contexts(examples) must give identifiers of the same positions for all examples, got {said}")
        last = forms.pop()
        if last is not None and not self.task.scored(parts[-1])[:, -last:].any():
            self._fail(f"contexts(examples) must reach a scored position, got the last {last}, none of which is scored")

    def continued(self, examples: Examples, tokens: int) -> None:
        found = self._ask("continued", (examples, tokens))
        if found is None:
            return
        if self.task.input_dim is not None:
            self._fail("continued(examples, tokens) must give None where inputs are vectors")
        is_pair = isinstance(found, tuple) and len(found) == 2
        self._must(
            is_pair, "continued(examples, tokens) must give None or two arrays, prompts and continuations", found
        )
        prompts, truth = found
        fits = _is_array(prompts, None, "i", "int64") and prompts.ndim == 2 and prompts.size > 0
        self._must(fits, "continued(examples, tokens) must give prompts (n, p), int64", prompts)
        shape = (len(prompts), tokens)
        fits = _is_array(truth, shape, "i", "int64")
        self._must(fits, f"continued(examples, {tokens}) must give continuations of shape {shape}, int64", truth)
        for name, values in (("prompts", prompts), ("continuations", truth)):
            if not 0 <= values.min() <= values.max() < self.task.vocab_size:
                self._fail(
                    f"continued(examples, tokens) must give {name} from 0 to vocab_size - 1 = "
                    f"{self.task.vocab_size - 1}, got {values.min()} to {values.max()}"
                )

    # ---- questions ----

    def _ask(self, member: str, arguments: tuple[Any, ...] | None = None) -> Any:
        """A property of the task, or the result of a method; an error in it is laid to its line."""
        try:
            found = getattr(self.task, member)
            return found if arguments is None else found(*arguments)
        except (Exception, SystemExit) as error:  # a task may call sys.exit
            raise TaskFileError(blame(error) or f"{self.name}: {member}: {named(error)}") from None

    def _must(self, holds: bool, rule: str, got: Any) -> None:
        if not holds:
            self._fail(f"{rule}, got {_described(got)}")

    def _fail(self, problem: str) -> NoReturn:
        raise TaskFileError(f"{self.name}: {problem}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether it is a finite int or float of Python, as JSON has them."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _is_array(value: Any, shape: tuple[int, ...] | None, kinds: str = "", dtype: str | None = None) -> bool:
    """Whether it is an array of a shape, of some kinds of dtype, and of one dtype; None and "": of any."""
    return (
        isinstance(value, np.ndarray)
        and (shape is None or value.shape == shape)
        and (not kinds or value.dtype.kind in kinds)
        and (dtype is None or value.dtype == dtype)
    )


def _described(value: Any) -> str:
    """A value in a few words, for an error."""
    if isinstance(value, np.ndarray):
        return f"{value.shape}, {value.dtype}"
    kind = type(value).__name__
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a class of the user's own, or of an int with more digits than Python writes
        return f"a value of type {kind}"
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return text if type(value).__module__ == "builtins" else f"{text} of type {kind}"
