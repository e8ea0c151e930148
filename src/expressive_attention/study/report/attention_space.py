"""Attention space of the models that a study has trained: each mechanism, the same condition and seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...geometry import Record, capture
from ..analysis.summaries import evidence
from ..analysis.trained import cells_by_seed, finite_seeds, trained
from ..analysis.wording import mechanism_name
from ..config.record import RecordedTask
from ..runs.results import StudyResults, collect
from ..runs.store import Store, StoreError
from .drawing.layout import most_different

__all__ = ["Look", "chosen_condition", "look_into"]

_EXAMPLES = 32
_SEEN = ("expressive", "dot_product", "squared")  # the weights of others cannot be captured


@dataclass(frozen=True)
class Look:
    """Attention of trained models on validation examples.

    Attributes:
        title: The condition and the seed.
        records: Records by the name of the mechanism.
        tokens: The examples, as text.
        unseen: Names of mechanisms that were trained, and cannot be captured.
        diverged: Names of mechanisms whose training diverged on this seed: there is nothing finite to show.
    """

    title: str
    records: dict[str, Record]
    tokens: list[list[str]]
    unseen: list[str]
    diverged: list[str]


def look_into(
    directory: Path | str, condition: str | None = None, seed: int | None = None, *, trust: bool = False
) -> Look:
    """Capture the trained models of a study on validation examples.

    Args:
        directory: Folder of the study, with its cells.
        condition: Label of a condition; None: the one on which the mechanisms differ most.
        seed: A final seed; None: the one with the lowest accuracy of DPA, or of what there is, that did not diverge.
        trust: Run the study's Python files, without which the models of its own tasks cannot be used.

    Raises:
        StoreError: There is no such condition or seed, or none of its cells, or all of them diverged, or its task is in
            a file that is not trusted.
    """
    store = Store(directory)
    results = collect(store, trust=trust)
    label = chosen_condition(results, condition)
    records: dict[str, Record] = {}
    tokens: list[list[str]] = []
    config, _ = store.config(trust=trust)
    arms = [c for c in config.arms() if c.condition == label]
    if any(isinstance(c.task, RecordedTask) for c in arms):
        raise StoreError(f"{directory}: the task of {label!r} is in a Python file, which --trust runs")
    unseen = sorted({mechanism_name(c.mechanism) for c in arms if c.mechanism not in _SEEN})
    arms = [c for c in arms if c.mechanism in _SEEN]
    diverged: list[str] = []
    for arm in sorted(arms, key=lambda each: each.mechanism != "dot_product"):  # which chooses the seed
        name = mechanism_name(arm.mechanism)
        rows = evidence(results.seeds, label, arm.mechanism).sort("accuracy", "seed")
        finite = finite_seeds(rows)
        cells = cells_by_seed(results, store, arm)
        if seed is None and (kept := [each for each in finite if each in cells]):
            seed = kept[0]
        if cells and (seed is None or seed in cells) and seed not in finite:
            diverged.append(name)
        elif seed in cells:
            cell = cells[seed]
            model = trained(store, cell, seed)
            examples = torch.from_numpy(cell.task.held_out_examples(_EXAMPLES, "validation").inputs)
            with torch.no_grad(), capture(model, max_tokens=_EXAMPLES * examples.shape[1]) as record:
                model(examples)
            records[name] = record
            if not examples.is_floating_point():
                tokens = [[str(digit) for digit in example] for example in examples.tolist()]
    asked = "" if seed is None else f", seed {seed}"
    if not records and diverged:
        raise StoreError(
            f"{directory} has nothing to show of {label!r}{asked}: the training of {', '.join(diverged)} diverged"
        )
    if not records:
        watched = f", of a mechanism that can be watched, which {', '.join(unseen)} cannot" if unseen else ""
        raise StoreError(f"{directory} has no trained model of {label!r}{asked}{watched}")
    return Look(f"{label}, seed {seed}", records, tokens, unseen, diverged)


def chosen_condition(results: StudyResults, condition: str | None) -> str:
    """The label of a condition; None: of the one on which the mechanisms differ most.

    Raises:
        StoreError: There is no such condition.
    """
    labels = [each.label for each in results.conditions]
    if condition is None:
        found = most_different(results, 1)
        return found[0].label if found else labels[0]
    if condition not in labels:
        raise StoreError(f"condition must be one of {labels}, got {condition!r}")
    return condition
