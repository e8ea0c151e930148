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
from ..analysis.trained import cells_by_seed, finite_seeds, trained
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
_SHARED = ("study", "condition", "task", "seed")  # what twins have in common


class TwinsError(StudyError):
    """A folder without twins, or with files of several pairs of them; the message says why."""


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
    directory: Path | str,
    out: Path | str,
    condition: str | None = None,
    seed: int | None = None,
    *,
    half: bool = False,
    trust: bool = False,
) -> list[Path]:
    """Write the trained models of one condition and seed of a study, one file per mechanism, and examples.

    Files that an earlier call has left in the folder are replaced, or removed.

    Args:
        directory: Folder of the study, with its cells.
        out: Folder to write to; it is made if it does not exist.
        condition: Label of a condition; None: the one on which the mechanisms differ most.
        seed: A final seed; None: the one in the middle by the accuracy of DPA, or of the first mechanism, among those
            on which no mechanism diverged.
        half: Keep parameters in float16: files of half the size.
        trust: Run the study's Python files, without which the models of its own tasks cannot be used.

    Returns:
        The files.

    Raises:
        StoreError: There is no such condition or seed with trained models of two mechanisms at least, or a training
            of all its seeds diverged, or its task is in a file that is not trusted.
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
    if not finished:
        raise StoreError(f"{directory} has no trained models of {label!r}")
    if len(finished) == 1:
        others = ", ".join(mechanism for mechanism in cells if mechanism not in finished)
        missing = f"{others} has none, and `ea study run` trains it" if others else "the study has no other mechanism"
        raise StoreError(
            f"{directory} has trained models of {label!r} of {next(iter(finished))} alone, which have no twins: "
            f"{missing}"
        )
    asked = "" if seed is None else f", seed {seed}"
    ranked: list[int] = evidence(results.seeds, label, next(iter(finished)), by="accuracy")["seed"].to_list()
    wanted = ranked if seed is None else [seed]
    shared = [each for each in wanted if all(each in by_seed for by_seed in finished.values())]
    if not shared:
        raise StoreError(f"{directory} has no trained models of {label!r}{asked} that all of its mechanisms share")
    finite = [set(finite_seeds(evidence(results.seeds, label, mechanism))) for mechanism in finished]
    usable = [each for each in shared if all(each in seeds for seeds in finite)]
    if not usable:
        raise StoreError(f"{directory} has no usable models of {label!r}{asked}: their training diverged")
    seed = usable[len(usable) // 2]
    task = next(iter(finished.values()))[seed].task
    content = task.model_dump(mode="json", exclude_none=True)
    common = {"study": results.name, "condition": label, "task": content, "seed": seed}  # `_SHARED`
    files: dict[str, bytes] = {}
    for mechanism, by_seed in finished.items():
        cell = by_seed[seed]
        reached = evidence(results.seeds, label, mechanism).row(by_predicate=pl.col("seed") == seed, named=True)
        about = {
            **common,
            "mechanism": mechanism,
            **cell.setting._asdict(),
            **{name: reached[name] for name in ("accuracy", "cross_entropy")},
        }
        model = trained(store, cell, seed)
        state = {name: x.detach().to(torch.float16 if half else x.dtype) for name, x in model.state_dict().items()}
        metadata = {"model": model_arguments(cell.task, cell.model, cell.function), "about": about}
        files[f"{mechanism}.safetensors"] = save(
            {name: x.contiguous() for name, x in state.items()}, {key: json.dumps(x) for key, x in metadata.items()}
        )
    examples = task.held_out_examples(_EXAMPLES, "validation")
    shown = {name: torch.from_numpy(np.array(getattr(examples, name))) for name in ("inputs", "targets")}
    files[_EXAMPLES_FILE] = save(shown, {"about": json.dumps(common)})
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, written in files.items():
        write_atomically(out / name, written)
    for path in _models_in(out):
        if path.name not in files and _is_twin(path):  # of an earlier call, with other mechanisms
            path.unlink()
    return [out / name for name in files]


def load_twins(folder: Path | str) -> Twins:
    """The models and examples that `write_twins` has written to a folder.

    Raises:
        TwinsError: A file is missing, is not what was written, or is of another condition or seed than the others; the
            message names it.
    """
    folder = Path(folder)
    tensors, metadata = _read(folder / _EXAMPLES_FILE)
    models: dict[str, Transformer] = {}
    about: dict[str, dict[str, Any]] = {}
    common = {folder / _EXAMPLES_FILE: _parsed(folder / _EXAMPLES_FILE, metadata, "about")} if metadata else {}
    for path in _models_in(folder):
        state, metadata = _read(path)
        arguments, known = (_parsed(path, metadata, key) for key in ("model", "about"))
        try:
            model = Transformer(**arguments)
            model.load_state_dict({name: x.float() for name, x in state.items()})
            mechanism, shared = known["mechanism"], {name: known[name] for name in _SHARED}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TwinsError(f"{path} is not the file of a trained twin: {str(error).splitlines()[0]}") from None
        if mechanism in models:
            raise TwinsError(f"{folder} has two models of {mechanism}, one of them in {path.name}: remove one")
        common[path] = shared | {"model": {**arguments, "mechanism": None}}
        models[mechanism], about[mechanism] = model.eval(), known
    if not models:
        raise TwinsError(f"{folder} has no trained models")
    _check_shared(folder, common)
    try:
        return Twins(models, about, tensors["inputs"], tensors["targets"])
    except KeyError as error:
        raise TwinsError(f"{folder / _EXAMPLES_FILE} has no {error}") from None


def _check_shared(folder: Path, common: dict[Path, dict[str, Any]]) -> None:
    """All files have to say the same of what twins share."""
    said: dict[str, tuple[str, Any]] = {}
    for path, content in common.items():
        for name, value in content.items():
            first, expected = said.setdefault(name, (path.name, value))
            if value != expected:
                raise TwinsError(
                    f"{folder} mixes models that are no twins: {name} is {expected!r} in {first} and {value!r} in "
                    f"{path.name}; `ea study twins` writes all files again"
                )


def _models_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name != _EXAMPLES_FILE]


def _is_twin(path: Path) -> bool:
    """Whether a file was written as that of a twin; others in the folder are somebody's own."""
    try:
        return {"model", "about"} <= _read(path)[1].keys()
    except TwinsError:
        return False


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise TwinsError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 it is no dict
    except SafetensorError as error:
        raise TwinsError(f"{path} cannot be read: {error}") from None


def _parsed(path: Path, metadata: dict[str, str], key: str) -> dict[str, Any]:
    """A part of the metadata of a file, which is a table in JSON."""
    try:
        content = json.loads(metadata[key])
    except (KeyError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise TwinsError(f"{path} is not the file of a trained twin: its metadata have no {key!r}")
    return content


def _baseline_first(arm: Arm) -> bool:
    return arm.mechanism != BASELINE
