"""The choice of a setting, and the cells that a study needs and has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from ..config.cells import Arm, Cell
from ..config.condition import Setting
from ..config.declared import alone
from ..config.schema import PROTOCOL
from ..config.study import StudyConfig
from ..training.result import CellResult
from .store import Store

__all__ = ["candidates", "choose_setting", "finished_cells", "of_another_task", "progress_of"]


def choose_setting(results: Iterable[tuple[Cell, CellResult]]) -> Setting:
    """The setting whose tuning seeds are most accurate on validation sequences, then fastest, then the smaller one.

    Fastest is by the mean of the steps to solve, an unsolved seed counting as all steps. Every process that asks has to
    choose the same: sums are exact, and do not depend on the order of the cells. Protocol 2 ranked by test sequences,
    and by the steps taken.
    """
    seeds: dict[Setting, list[tuple[float, int]]] = {}
    for cell, result in results:
        if cell.protocol < PROTOCOL:
            rows = result.seeds.select("accuracy", "steps")
        else:
            steps = pl.col("steps_to_solve").fill_null(cell.training.steps)
            rows = result.seeds.select("validation", steps)
        seeds.setdefault(cell.setting, []).extend(rows.iter_rows())

    def rank(setting: Setting) -> tuple[float, float, Setting]:
        accuracies, steps = zip(*seeds[setting], strict=True)
        return -math.fsum(accuracies) / len(accuracies), sum(steps) / len(steps), setting

    return min(seeds, key=rank)


@dataclass(frozen=True)
class Progress:
    """The progress of one arm.

    Attributes:
        arm: The arm.
        cells: The cells that it needs, as far as is known: the final ones once a setting is chosen.
        setting: The setting chosen; None: the tuning is not finished.
    """

    arm: Arm
    cells: list[Cell]
    setting: Setting | None

    @property
    def final(self) -> list[Cell]:
        """The final cells, once they are known."""
        return [cell for cell in self.cells if cell.role == "final"]

    def confirmation_cells(self, store: Store) -> list[Cell]:
        """The cells of fresh seeds at the setting chosen."""
        assert self.setting is not None
        return self.arm.confirmation_cells(self.setting, store)


def progress_of(store: Store, arm: Arm) -> Progress:
    """The progress of an arm.

    Raises:
        CorruptCellError: A tuning cell is corrupt.
    """
    tuning = arm.tuning_cells(store)
    if not all(store.has(cell) for cell in tuning):
        return Progress(arm, tuning, None)
    chosen = choose_setting((cell, store.counted(cell)) for cell in tuning) if tuning else arm.training.settings[0]
    return Progress(arm, tuning + arm.final_cells(chosen, store), chosen)


def candidates(store: Store, config: StudyConfig, progress: Sequence[Progress]) -> list[Progress]:
    """The arms whose conditions EA or DPA has to itself by the final seeds, where the study asks for that.

    Either both arms of a condition are there or neither is.
    """
    if "exclusive_range" not in config.claims or not config.seeds.confirmation:
        return []
    sides: dict[str, dict[str, Progress]] = {}
    for found in progress:
        if found.setting is not None and all(store.has(cell) for cell in found.final):
            sides.setdefault(found.arm.condition, {})[found.arm.mechanism] = found
    chosen = []
    for by_mechanism in sides.values():
        pair = [by_mechanism.get(name) for name in ("expressive", "dot_product")]
        known = [found for found in pair if found is not None]
        if len(known) == 2:
            (ours, theirs) = (_solved(store, found.final) for found in known)
            if alone(ours, theirs) or alone(theirs, ours):
                chosen += known
    return chosen


def _solved(store: Store, cells: Sequence[Cell]) -> tuple[int, int]:
    seeds = pl.concat([store.counted(cell).seeds for cell in cells])
    return int(seeds["solved"].sum()), len(seeds)


def finished_cells(store: Store, config: StudyConfig) -> tuple[list[Cell], list[str]]:
    """The finished cells of a study, and a line about each that is not finished.

    Raises:
        StoreError: A cell on which a setting was chosen is corrupt; the message names the file.
    """
    finished: list[Cell] = []
    unfinished: list[str] = []
    progress = [progress_of(store, arm) for arm in config.arms()]
    confirmed = {id(found) for found in candidates(store, config, progress)}
    for found in progress:
        cells = list(found.cells)
        if found.setting is None:
            unfinished.append(f"{found.arm.condition}, {found.arm.mechanism}, final: waits for tuning")
        elif id(found) in confirmed:
            cells += found.confirmation_cells(store)
        finished += [cell for cell in cells if store.has(cell)]
        unfinished += [str(cell) for cell in cells if not store.has(cell)]
    return finished, unfinished


def of_another_task(store: Store, config: StudyConfig) -> str | None:
    """The difference between the tasks of the study and those of cells with the same names that its folder has.

    A task may depend on the machine, as one on the texts of its Python does; None where no cell differs so.
    """
    tasks = {(arm.condition, arm.mechanism): arm.task.model_dump(mode="json") for arm in config.arms()}
    for cell in store.described():
        now = tasks.get((str(cell.get("condition")), str(cell.get("mechanism"))), {})
        before = cell.get("task", {})
        differ = [name for name in now if before.get(name, now[name]) != now[name]]
        if differ:
            told = (f"{name} {before[name]!r}, now {now[name]!r}" for name in differ)
            return f"{cell['condition']}: {', '.join(told)}"
    return None
