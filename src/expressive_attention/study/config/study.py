"""A whole study: its grid of conditions, and the arms that are compared."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from ...nn import MECHANISMS
from ...nn.mechanisms import name_here
from ..tasks import TASKS, Task
from .cells import AGAIN, Arm
from .condition import Condition
from .declared import claim_names
from .mechanism_files import names_in
from .record import Record, RecordedTask, facts_of
from .schema import PROTOCOL, ModelConfig, SeedsConfig, Strict, TrainingConfig, distinct, in_one_line
from .task_files import TaskFile, file_of
from .task_trial import check_label

__all__ = ["Files", "StudyConfig", "is_file_name"]


def is_file_name(name: str) -> bool:
    """Whether a file of Python can have this name."""
    return Path(name).suffix == ".py" and "\0" not in name  # which no system takes


def _different_files(names: tuple[str, ...]) -> tuple[str, ...]:
    """A study keeps copies side by side, so their names must differ without their folders."""
    if wrong := [name for name in names if not is_file_name(name)]:
        raise ValueError(f"names must end with .py{', without NUL' if chr(0) in wrong[0] else ''}, got {wrong[0]!r}")
    if len({Path(name).name for name in names}) < len(names):
        raise ValueError(f"file names must differ, got {list(names)}")
    return names


class Grid(Strict):
    """Conditions: every combination of the values of `task` and `model`, each a value or a list of them."""

    task: dict[str, Any]
    model: dict[str, Any] = Field(default={})


def _known_claims(claims: tuple[str, ...]) -> tuple[str, ...]:
    """The claims, each of which has a file in `study.analysis.claims`."""
    known = claim_names()
    if unknown := [claim for claim in claims if claim not in known]:
        raise ValueError(f"claims must be of {known}, got {unknown[0]!r}")
    return distinct(claims)


class StudyConfig(Strict):
    """A whole study."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    # Studies of older protocols can be read, and not be run.
    protocol: Literal[2, 3] = PROTOCOL
    # The comparisons over which p is adjusted: the study's own, or those of all presets that are declared primary.
    family: Literal["own", "primary"] = "own"
    mechanisms: Annotated[tuple[str, ...], AfterValidator(distinct)] = Field(
        default=("expressive", "dot_product"), min_length=1
    )
    # The claims to test, declared before anything is run; `study.analysis.claims` has the test of each.
    claims: Annotated[tuple[str, ...], AfterValidator(_known_claims)] = ("at_least_as_good",)
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    seeds: SeedsConfig = SeedsConfig()
    # Python files that define tasks, relative to the file that names them.
    task_files: Annotated[tuple[str, ...], AfterValidator(_different_files)] = ()
    # Python files that define mechanisms, relative to the same file.
    mechanism_files: Annotated[tuple[str, ...], AfterValidator(_different_files)] = ()
    grid: tuple[Grid, ...] = Field(min_length=1)

    _files: Files = PrivateAttr(default_factory=lambda: Files())  # noqa: PLW0108 defined below

    @property
    def sources(self) -> tuple[TaskFile, ...]:
        """`task_files` and `mechanism_files` as they were read; none where they were not run."""
        return self._files.tasks + self._files.mechanisms

    @property
    def has_files(self) -> bool:
        """Whether tasks or mechanisms are from files."""
        return bool(self.task_files or self.mechanism_files)

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> StudyConfig:
        if info.context is not None:
            self._files = info.context
        _different_files((*self.task_files, *self.mechanism_files))
        own = self._files.own_mechanisms()
        for mechanism in self.mechanisms:
            known = [*MECHANISMS, *own]
            if mechanism.removesuffix(AGAIN) not in known:
                raise ValueError(f"mechanisms must be of {known}, got {mechanism!r}{name_here(mechanism)}")
        if self.training.early_stop and self.protocol > 2:
            raise ValueError(
                f"training.early_stop is of protocol 2: protocol {self.protocol} trains every seed to the end of its "
                "schedule; leave it out"
            )
        if len(self.training.settings) > 1 and self.seeds.tuning == 0:
            several = "learning_rates" if len(self.training.learning_rates) > 1 else "initial_gains"
            raise ValueError(f"seeds.tuning must be at least 1 to choose among several training.{several}")
        if self.training.initial_gains != (1.0,) and not all(model.gain for _, _, model in self.expanded()):
            raise ValueError("training.initial_gains needs models with gain = true")
        labels = [label for label, _, _ in self.expanded()]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise ValueError(f"grid gives the condition {twice!r} more than once")
        return self

    def expanded(self) -> list[tuple[str, Task | RecordedTask, ModelConfig]]:
        """Label, task and model of every condition, in the order of the grid."""
        pairs: list[tuple[Task | RecordedTask, ModelConfig]] = []
        for grid in self.grid:
            for task in _combinations(grid.task):
                pairs += [
                    (self._files.task(task), _model({**self.model.model_dump(), **model}))
                    for model in _combinations(grid.model)
                ]
        varying = [
            name for name in ModelConfig.model_fields if len({repr(getattr(model, name)) for _, model in pairs}) > 1
        ]
        return [(_label(task, model, varying), task, model) for task, model in pairs]

    def arms(self) -> list[Arm]:
        """Every condition with every mechanism."""
        return [
            Arm(
                condition=label, task=task, model=model, mechanism=mechanism, training=self.training,
                seeds=self.seeds, protocol=self.protocol, mechanism_file=self._files.of(mechanism.removesuffix(AGAIN)),
            )
            for label, task, model in self.expanded()
            for mechanism in self.mechanisms
        ]  # fmt: skip

    def conditions(self, facts: Callable[[Task | RecordedTask, int], dict[str, Any]] = facts_of) -> list[Condition]:
        """The conditions with their facts, for a report.

        Args:
            facts: Gives the facts of a task and a number of test sequences; by default they are counted.
        """
        return [
            Condition(
                label,
                task.model_dump(exclude_none=True),
                model.model_dump(exclude_none=True),
                facts(task, self.training.test_sequences),
                task.label,
                task.formula,
            )
            for label, task, model in self.expanded()
        ]

    def record(self) -> Record:
        """The facts of the files of tasks and mechanisms that reading a study needs, in place of running them."""
        if self._files.recorded is not None:
            return self._files.recorded
        tasks = [task for grid in self.grid for task in _combinations(grid.task)]
        return Record.of(
            [(content, task) for content in tasks if file_of(task := self._files.task(content)) is not None],
            {name: file for file in self._files.mechanisms for name in names_in(file)},
            self.training.test_sequences,
        )


class Files:
    """The tasks and mechanisms of a study: those of the package, and of files that were run or are on record."""

    def __init__(
        self,
        tasks: tuple[TaskFile, ...] = (),
        mechanisms: tuple[TaskFile, ...] = (),
        record: Record | None = None,
    ) -> None:
        self.tasks, self.mechanisms, self.recorded = tasks, mechanisms, record

    def own_mechanisms(self) -> dict[str, TaskFile]:
        """The file that each mechanism of a file is from."""
        if self.recorded is not None:
            return self.recorded.mechanisms
        return {name: file for file in self.mechanisms for name in names_in(file)}

    def of(self, mechanism: str) -> TaskFile | None:
        return self.own_mechanisms().get(mechanism)

    def task(self, content: dict[str, Any]) -> Task | RecordedTask:
        """The task that a table of the grid asks for."""
        if self.recorded is not None and (found := self.recorded.task(content)) is not None:
            return found
        kind = content.get("kind", "nt")
        if not isinstance(kind, str) or kind not in TASKS:
            raise ValueError(f"grid.task.kind must be one of {sorted(TASKS)}, got {kind!r}")
        try:
            task = TASKS[kind].model_validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            raise ValueError(in_one_line(error, TASKS[kind], "grid.task")) from None
        check_label(task)
        return task


def _model(content: dict[str, Any]) -> ModelConfig:
    """The model that a table of the grid asks for."""
    try:
        return ModelConfig.model_validate(content, strict=True)
    except ValidationError as error:
        raise ValueError(in_one_line(error, ModelConfig, "grid.model")) from None


def _combinations(values: dict[str, Any]) -> list[dict[str, Any]]:
    empty = [name for name, value in values.items() if value == []]
    if empty:
        raise ValueError(f"{empty[0]} must have at least one value in the grid, got []")
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*lists)]


def _label(task: Task | RecordedTask, model: ModelConfig, varying: list[str]) -> str:
    """The task, its position code, and other fields that differ between the models of the study."""
    extra = [f"{name} {getattr(model, name)}" for name in varying if name != "position"]
    return ", ".join([task.label, model.position, *extra])
