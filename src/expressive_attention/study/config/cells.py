"""Cells: seeds that train together, and their names on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .condition import Setting
from .schema import PROTOCOL, TUNING_SEEDS, ModelConfig, Role, SeedsConfig, Strict, TrainingConfig
from .task_files import TaskFile, file_of

__all__ = ["AGAIN", "Arm", "Cell", "Finished"]


# The protocol's name in the identity of every cell.
_PROTOCOLS = {2: "ladder-2", 3: "study-3"}

# Fields of a training that decide which cells there are; no single cell depends on them.
_NOT_OF_A_CELL = {"learning_rates", "initial_gains", "tuning_steps"}
# Seeds that confirm an exclusive range start so much further on than the reported ones.
_CONFIRMATION_SEEDS = 2_000_000
# A mechanism under a second name, for arms in which there is no difference: its seeds draw other numbers.
AGAIN = "_again"
_AGAIN_SEEDS = 500_000_000


class Cell(Strict):
    """Seeds that train together: one task, model, mechanism and setting."""

    condition: str
    task: Any
    model: ModelConfig
    mechanism: str
    learning_rate: float
    initial_gain: float = 1.0
    role: Role
    seeds: tuple[int, ...]
    training: TrainingConfig
    protocol: int = PROTOCOL
    mechanism_file: TaskFile | None = None  # the file that defines the mechanism; None: it is one of the package
    surplus: int = 0  # so many of its last seeds are more than the study asks for: it was finished when that was more

    @property
    def counted(self) -> tuple[int, ...]:
        """The seeds that count."""
        return self.seeds[: len(self.seeds) - self.surplus]

    @property
    def setting(self) -> Setting:
        """The setting, whose parts are fields of the cell on disk."""
        return Setting(self.learning_rate, self.initial_gain)

    @property
    def function(self) -> str:
        """The mechanism as `nn.attend` knows it, whatever the study calls it."""
        name = self.mechanism.removesuffix(AGAIN)
        return name if self.mechanism_file is None else f"{name}@{self.mechanism_file.digest}"

    @property
    def streams(self) -> tuple[int, ...]:
        """Seeds of the random numbers: those of a mechanism under a second name differ from those of the first."""
        return tuple(seed + self.mechanism.endswith(AGAIN) * _AGAIN_SEEDS for seed in self.seeds)

    @property
    def identity(self) -> str:
        """The name of the cell on disk: a hash of all that its result depends on."""
        content = self.model_dump(mode="json", exclude={"condition", "task", "training", "mechanism_file", "surplus"})
        content["task"] = self.task.model_dump(mode="json")
        content["training"] = self.training.model_dump(mode="json", exclude=_NOT_OF_A_CELL)
        content["protocol"] = _PROTOCOLS[self.protocol]
        if (file := file_of(self.task)) is not None:
            content["task_file"] = file.digest
        elif self.task.revision > 1:
            content["task_revision"] = self.task.revision
        if self.mechanism_file is not None:
            content["mechanism_file"] = self.mechanism_file.digest
        text = json.dumps(content, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def __str__(self) -> str:
        return f"{self.condition}, {self.mechanism}, {self.role}, {self.setting}"


class Finished(Protocol):
    """The cells on disk."""

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished."""
        ...

    def lengths(self) -> Mapping[int, Sequence[int]]:
        """Numbers of seeds that finished cells have, the largest first, by the first of the seeds."""
        ...


class Arm(Strict):
    """One condition with one mechanism: cells to tune on, cells to report, and cells to confirm these."""

    condition: str
    task: Any
    model: ModelConfig
    mechanism: str
    training: TrainingConfig
    seeds: SeedsConfig
    protocol: int = PROTOCOL
    mechanism_file: TaskFile | None = None

    def tuning_cells(self, finished: Finished | None = None) -> list[Cell]:
        """One set of cells per setting; none where there is nothing to choose.

        Args:
            finished: The cells on disk. Their seeds are not trained again, whether the study had fewer or more of them
                when it ran, or other numbers together: only seeds that they lack make cells of their own.
        """
        settings = self.training.settings
        if len(settings) == 1:
            return []
        return [cell for setting in settings for cell in self._cells("tuning", setting, finished)]

    def final_cells(self, setting: Setting, finished: Finished | None = None) -> list[Cell]:
        """The cells of the reported seeds; `finished` as in `tuning_cells`."""
        return self._cells("final", setting, finished)

    def confirmation_cells(self, setting: Setting, finished: Finished | None = None) -> list[Cell]:
        """The cells of the seeds that confirm what the reported ones show; `finished` as in `tuning_cells`."""
        return self._cells("confirmation", setting, finished)

    def seeds_of(self, role: Role) -> range:
        """The seeds of a role that the study asks for."""
        first = self.seeds.start + {"tuning": TUNING_SEEDS, "final": 0, "confirmation": _CONFIRMATION_SEEDS}[role]
        return range(first, first + getattr(self.seeds, role))

    def makes(self, cell: Cell) -> bool:
        """Whether the seeds of a cell train together where none are finished yet."""
        return any(cell.seeds == fresh.seeds for fresh in self._cells(cell.role, cell.setting, None))

    def _cells(self, role: Role, setting: Setting, finished: Finished | None) -> list[Cell]:
        wanted, together, cells = self.seeds_of(role), self.seeds.together, list[Cell]()
        at = first = wanted.start
        while at < wanted.stop:
            group = range(at, min(at + together - (at - first) % together, wanted.stop))
            cell = self._cell(role, setting, group)
            if finished is not None and not finished.has(cell):
                cell = self._kept(cell, finished)
            at = cell.seeds[-1] + 1
            surplus = max(0, at - wanted.stop)
            cells.append(cell.model_copy(update={"surplus": surplus}) if surplus else cell)
        return cells

    def _kept(self, cell: Cell, finished: Finished) -> Cell:
        """The longest finished cell with the first of the seeds; else a new one, up to where a finished one begins."""
        lengths = finished.lengths()

        def longest(first: int) -> Cell | None:
            known = (range(first, first + length) for length in lengths.get(first, ()))
            return next(filter(finished.has, (self._cell(cell.role, cell.setting, seeds) for seeds in known)), None)

        if (found := longest(cell.seeds[0])) is not None:
            return found
        new = itertools.takewhile(lambda seed: longest(seed) is None, cell.seeds[1:])
        return self._cell(cell.role, cell.setting, range(cell.seeds[0], [cell.seeds[0], *new][-1] + 1))

    def _cell(self, role: Role, setting: Setting, seeds: range) -> Cell:
        return Cell(
            condition=self.condition, task=self.task, model=self.model, mechanism=self.mechanism,
            **setting._asdict(), role=role, training=self.training.of(role), seeds=tuple(seeds), protocol=self.protocol,
            mechanism_file=self.mechanism_file,
        )  # fmt: skip
