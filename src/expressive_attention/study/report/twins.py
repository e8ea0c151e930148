"""Trained twins: models that differ in the mechanism alone, as files that are read without the study.

FOLDER/<mechanism>.safetensors    a trained model: parameters, the arguments of `nn.Transformer`, what it reached
FOLDER/examples.safetensors       examples for them: inputs and targets, from the validation sequences of its task
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...nn import Transformer
from ..analysis.comparisons import BASELINE
from ..analysis.summaries import evidence
from ..analysis.trained import cells_by_seed, trained
from ..config.cells import Arm, Cell
from ..config.record import RecordedTask
from ..errors import StudyError
from ..files import write_atomically
from ..runs.results import collect
from ..runs.store import Store, StoreError
from ..training.model import model_arguments
from .attention_space import chosen_condition

__all__ = ["Twins", "TwinsError", "load_twins", "write_twins"]

_EXAMPLES = 64
_EXAMPLES_FILE = "examples.safetensors"


class TwinsError(StudyError):
    """A folder without twins; the message says why."""


@dataclass(frozen=True)
class Twins:
    """Models of one task, shape and seed.

    Attributes:
        models: Models by mechanism, as `nn.MECHANISMS` names them, in evaluation mode; parameters are float32.
        about: Facts of each model, by mechanism: ``study``, ``condition``, ``task``, ``seed``,
            ``learning_rate``, ``initial_gain``, ``accuracy`` and ``cross_entropy`` (on test sequences, in nats).
        inputs: Tokens ``(n, L)`` or vectors ``(n, L, C)`` that no training has seen.
        targets: Classes ``(n, L)``; -100 where nothing is to be predicted.
    """

    models: dict[str, Transformer]
    about: dict[str, dict[str, Any]]
    inputs: Tensor
    targets: Tensor


def write_twins(
    directory: Path,
    out: Path,
    condition: str | None = None,
    seed: int | None = None,
    *,
    half: bool = False,
    trust: bool = False,
) -> list[Path]:
    """Write the trained models of one condition and seed of a study, one file per mechanism, and examples.

    Args:
        directory: Folder of the study, with its cells.
        out: Folder to write to; it is made if it does not exist.
        condition: Label of a condition; None: the one on which the mechanisms differ most.
        seed: A final seed; None: the one in the middle by the accuracy of DPA, or of the first mechanism.
        half: Keep parameters in float16: files of half the size.
        trust: Run the study's Python files, without which the models of its own tasks cannot be used.

    Returns:
        The files.

    Raises:
        StoreError: There is no such condition or seed with trained models, or its task is in a file that is not
            trusted.
    """
    store = Store(directory)
    results = collect(store, trust=trust)
    label = chosen_condition(results, condition)
    config, _ = store.config(trust=trust)
    cells: dict[str, dict[int, Cell]] = {}
    for arm in sorted(config.arms(), key=_baseline_first):
        if arm.condition != label or arm.mechanism_file is not None:
            continue
        if isinstance(arm.task, RecordedTask):
            raise StoreError(f"{directory}: the task of {label!r} is in a Python file, which --trust runs")
        cells[arm.mechanism] = cells_by_seed(results, store, arm)
    finished = {mechanism: by_seed for mechanism, by_seed in cells.items() if by_seed}
    shared = set.intersection(*(set(by_seed) for by_seed in finished.values())) if finished else set()
    if seed is None and shared:
        ranked = [s for s in evidence(results.seeds, label, next(iter(finished)), by="accuracy")["seed"] if s in shared]
        seed = ranked[len(ranked) // 2]
    if seed is None or seed not in shared:
        asked = "" if seed is None else f", seed {seed}"
        raise StoreError(f"{directory} has no trained models of {label!r}{asked} that all of its mechanisms share")
    files: dict[str, bytes] = {}
    for mechanism, by_seed in finished.items():
        cell = by_seed[seed]
        reached = evidence(results.seeds, label, mechanism).row(by_predicate=pl.col("seed") == seed, named=True)
        about = {
            "study": results.name,
            "condition": label,
            "task": cell.task.model_dump(mode="json", exclude_none=True),
            "mechanism": mechanism,
            "seed": seed,
            **cell.setting._asdict(),
            **{name: reached[name] for name in ("accuracy", "cross_entropy")},
        }
        model = trained(store, cell, seed)
        state = {name: x.detach().to(torch.float16 if half else x.dtype) for name, x in model.state_dict().items()}
        metadata = {"model": model_arguments(cell.task, cell.model, cell.function), "about": about}
        files[f"{mechanism}.safetensors"] = save(
            {name: x.contiguous() for name, x in state.items()}, {key: json.dumps(x) for key, x in metadata.items()}
        )
    task = next(iter(finished.values()))[seed].task
    examples = task.held_out_examples(_EXAMPLES, "validation")
    shown = {name: torch.from_numpy(np.array(getattr(examples, name))) for name in ("inputs", "targets")}
    files[_EXAMPLES_FILE] = save(shown)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def load_twins(folder: Path | str) -> Twins:
    """The models and examples that `write_twins` has written to a folder.

    Raises:
        TwinsError: A file is missing or is not what was written; the message names it.
    """
    folder = Path(folder)
    tensors, _ = _read(folder / _EXAMPLES_FILE)
    models: dict[str, Transformer] = {}
    about: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == _EXAMPLES_FILE:
            continue
        state, metadata = _read(path)
        try:
            model = Transformer(**json.loads(metadata["model"]))
            model.load_state_dict({name: x.float() for name, x in state.items()})
            known = json.loads(metadata["about"])
            models[known["mechanism"]], about[known["mechanism"]] = model.eval(), known
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TwinsError(f"{path} is not the file of a trained twin: {str(error).splitlines()[0]}") from None
    if not models:
        raise TwinsError(f"{folder} has no trained models")
    try:
        return Twins(models, about, tensors["inputs"], tensors["targets"])
    except KeyError as error:
        raise TwinsError(f"{folder / _EXAMPLES_FILE} has no {error}") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise TwinsError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 it is no dict
    except SafetensorError as error:
        raise TwinsError(f"{path} cannot be read: {error}") from None


def _baseline_first(arm: Arm) -> bool:
    return arm.mechanism != BASELINE
