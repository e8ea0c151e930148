"""The configuration of a study: TOML in, a grid of conditions out. Unknown keys are errors."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from ..nn import MECHANISMS, position_codes
from .errors import ConfigError
from .presets import preset_names, preset_text
from .record import Record, RecordedTask, facts_of
from .results import Condition, Setting
from .tasks import TASKS, Task
from .user_mechanisms import load_mechanism_files, names_in
from .user_tasks import TaskFile, TaskFileError, check_task, file_of, load_task_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "PROTOCOL",
    "Cell",
    "Comparison",
    "ConfigError",
    "ModelConfig",
    "SeedsConfig",
    "StudyConfig",
    "TrainingConfig",
    "load_config",
    "parse_config",
]

# Raise it when a change of the code changes what a run means; docs/protocol.md says what each was.
PROTOCOL = 3
# As part of every cell's identity.
_PROTOCOLS = {2: "ladder-2", 3: "study-3"}
# Values that an older protocol had where a configuration says nothing.
_OLDER_DEFAULTS = {2: {"training": {"early_stop": True}, "seeds": {"tuning": 4, "confirmation": 0}}}

# Fields of a training that say which cells there are, and nothing of any one of them.
_NOT_OF_A_CELL = {"learning_rates", "initial_gains", "tuning_steps"}

# Seeds on which learning rates and gains are chosen, and those that confirm an exclusive range, start so much
# further on than the reported ones: all three are fresh.
_TUNING_SEEDS, _CONFIRMATION_SEEDS = 1_000_000, 2_000_000
# A mechanism under a second name, for comparisons in which there is no difference: its seeds draw other numbers.
_AGAIN, _AGAIN_SEEDS = "_again", 500_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"values must differ, got {list(values)}")
    return values


def _different_files(names: tuple[str, ...]) -> tuple[str, ...]:
    """A study keeps copies side by side, so their names must differ without their folders."""
    if wrong := [name for name in names if Path(name).suffix != ".py"]:
        raise ValueError(f"names must end with .py, got {wrong[0]!r}")
    if len({Path(name).name for name in names}) < len(names):
        raise ValueError(f"file names must differ, got {list(names)}")
    return names


def _one_spelling(position: str) -> str:
    """The same codes name the same cell, in whatever order they are given."""
    return "+".join(position_codes(position)) or "none"


Position = Annotated[str, AfterValidator(_one_spelling)]
Role = Literal["tuning", "final", "confirmation"]


class ModelConfig(_Strict):
    """The transformer that all mechanisms sit in; see `expressive_attention.nn.Transformer`."""

    layers: int = Field(default=1, ge=1)
    embed_dim: int = Field(default=16, ge=1)
    heads: int = Field(default=1, ge=1)
    position: Position = "rope"
    rope_base: float | None = Field(default=None, gt=0)  # None: max(10, 2 * length)
    norm: Literal["pre", "post", "none"] = "pre"
    norm_affine: bool = False
    mlp_ratio: int = Field(default=4, ge=1)
    activation: Literal["relu", "gelu"] = "relu"
    gain: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    bias: bool = True
    embedding_std: float = Field(default=0.5, gt=0)
    embedding_shift: float = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.embed_dim % self.heads:
            raise ValueError(f"embed_dim must be a multiple of heads, got {self.embed_dim} and {self.heads}")
        codes = position_codes(self.position)
        if "rope" in codes and self.embed_dim // self.heads % 2:
            raise ValueError(f"rope needs an even embed_dim / heads, got {self.embed_dim} / {self.heads}")
        if "sinusoidal" in codes and self.embed_dim % 2:
            raise ValueError(f"sinusoidal positions need an even embed_dim, got {self.embed_dim}")
        return self


class TrainingConfig(_Strict):
    """How one seed is trained and judged; the same for all mechanisms."""

    steps: int = Field(default=3000, ge=1)
    tuning_steps: int | None = Field(default=None, ge=1)  # of a tuning seed; None: as many as of all others
    batch_size: int = Field(default=32, ge=1)
    # Every pair of a learning rate and a gain is tried for each mechanism on the tuning seeds; the final seeds run at
    # the best.
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(_distinct)] = Field(
        default=(2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2), min_length=1
    )
    initial_gains: Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(_distinct)] = Field(
        default=(1.0,), min_length=1
    )
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of sgd
    weight_decay: float = Field(default=0.0, ge=0)  # decoupled in adam (AdamW)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    warmup: int = Field(default=100, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    gradient_clip: float | None = Field(default=None, gt=0)  # norm of a seed's gradient; None: not clipped
    evaluate_every: int = Field(default=100, ge=1)
    validation_sequences: int = Field(default=1024, ge=1)
    test_sequences: int = Field(default=2048, ge=1)
    rollouts: int = Field(default=256, ge=1)
    rollout_digits: int = Field(default=32, ge=1)
    # A seed is solved if its last `solved_evaluations` and the final test reach this accuracy.
    solved_accuracy: float = Field(default=0.995, gt=0, le=1)
    solved_evaluations: int = Field(default=3, ge=1)
    # Only protocol 2 has this: a seed ended when it had reached that many evaluations in a row.
    early_stop: bool = False

    @model_validator(mode="after")
    def _tuning_is_no_longer(self) -> TrainingConfig:
        if self.tuning_steps is not None and self.tuning_steps > self.steps:
            raise ValueError(f"tuning_steps must be at most steps, got {self.tuning_steps} and {self.steps}")
        return self

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What is tried for each mechanism."""
        return tuple(Setting(rate, gain) for rate in self.learning_rates for gain in self.initial_gains)

    def of(self, role: Role) -> TrainingConfig:
        """The training of the seeds of a role."""
        steps = self.steps if role != "tuning" or self.tuning_steps is None else self.tuning_steps
        return self.model_copy(update={"steps": steps, "tuning_steps": None})


class SeedsConfig(_Strict):
    """How many seeds, and how many train together in one program."""

    tuning: int = Field(default=8, ge=0)
    final: int = Field(default=16, ge=1)
    # Fresh ones, for conditions on which the final seeds show an exclusive range.
    confirmation: int = Field(default=32, ge=0)
    # The first of the final seeds: who starts elsewhere repeats a study on seeds of their own, tuning included.
    start: int = Field(default=0, ge=0, lt=_TUNING_SEEDS)
    together: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _seeds_are_others(self) -> SeedsConfig:
        for name in ("tuning", "final", "confirmation"):
            if self.start + getattr(self, name) > _TUNING_SEEDS:
                raise ValueError(
                    f"start + {name} must be at most {_TUNING_SEEDS}, got {self.start} + {getattr(self, name)}"
                )
        return self


class Grid(_Strict):
    """Conditions: every combination of the values of `task` and `model`, each a value or a list of them."""

    task: dict[str, Any]
    model: dict[str, Any] = {}


# The questions that a study can be asked; `study.claims` has the test of each.
Claim = Literal[
    "at_least_as_good", "lead_grows", "exclusive_range", "ahead_on_mixed", "ahead_at_every_position", "two_sidedness",
    "no_difference",
]  # fmt: skip


class StudyConfig(_Strict):
    """A whole study."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    # Studies of older protocols can be read, and not be run.
    protocol: Literal[2, 3] = PROTOCOL
    # Over which comparisons p is adjusted: the study's own, or those of all presets that are declared primary.
    family: Literal["own", "primary"] = "own"
    mechanisms: Annotated[tuple[str, ...], AfterValidator(_distinct)] = Field(
        default=("expressive", "dot_product"), min_length=1
    )
    # What is asked, declared before anything is run; `study.claims` says how each is tested.
    claims: Annotated[tuple[Claim, ...], AfterValidator(_distinct)] = ("at_least_as_good",)
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    seeds: SeedsConfig = SeedsConfig()
    # Python files that define tasks, relative to the file that names them.
    task_files: Annotated[tuple[str, ...], AfterValidator(_different_files)] = ()
    # Python files that define mechanisms, relative to the same file.
    mechanism_files: Annotated[tuple[str, ...], AfterValidator(_different_files)] = ()
    grid: tuple[Grid, ...] = Field(min_length=1)

    _files: _Files = PrivateAttr(default_factory=lambda: _Files())  # noqa: PLW0108 defined below

    @property
    def sources(self) -> tuple[TaskFile, ...]:
        """`task_files` and `mechanism_files` as they were read; none where they were not run."""
        return self._files.tasks + self._files.mechanisms

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> StudyConfig:
        if info.context is not None:
            self._files = info.context
        _different_files((*self.task_files, *self.mechanism_files))
        own = self._files.own_mechanisms()
        for mechanism in self.mechanisms:
            known = [*MECHANISMS, *own]
            if mechanism.removesuffix(_AGAIN) not in known:
                raise ValueError(f"mechanisms must be of {known}, got {mechanism!r}")
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
                    (
                        self._files.task(task),
                        ModelConfig.model_validate({**self.model.model_dump(), **model}, strict=True),
                    )
                    for model in _combinations(grid.model)
                ]
        varying = [
            name for name in ModelConfig.model_fields if len({repr(getattr(model, name)) for _, model in pairs}) > 1
        ]
        return [(_label(task, model, varying), task, model) for task, model in pairs]

    def comparisons(self) -> list[Comparison]:
        """What is compared: every condition with every mechanism."""
        return [
            Comparison(
                condition=label, task=task, model=model, mechanism=mechanism, training=self.training,
                seeds=self.seeds, protocol=self.protocol, mechanism_file=self._files.of(mechanism.removesuffix(_AGAIN)),
            )
            for label, task, model in self.expanded()
            for mechanism in self.mechanisms
        ]  # fmt: skip

    def conditions(self, facts: Callable[[Task | RecordedTask, int], dict[str, Any]] = facts_of) -> list[Condition]:
        """The conditions with their facts, for a report.

        Args:
            facts: Tells those of a task and a number of test sequences; by default they are counted.
        """
        return [
            Condition(
                label,
                task.model_dump(exclude_none=True),
                model.model_dump(exclude_none=True),
                facts(task, self.training.test_sequences),
            )
            for label, task, model in self.expanded()
        ]

    def record(self) -> Record:
        """The facts of the files of tasks and mechanisms that reading a study needs, in place of running them."""
        tasks = [task for grid in self.grid for task in _combinations(grid.task)]
        return Record.of(
            [(content, task) for content in tasks if file_of(task := self._files.task(content)) is not None],
            {name: file for file in self._files.mechanisms for name in names_in(file)},
            self.training.test_sequences,
        )


class Cell(_Strict):
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
    mechanism_file: TaskFile | None = None  # that defines the mechanism; None: it is one of the package

    @property
    def function(self) -> str:
        """The mechanism as `nn.attend` knows it, whatever the study calls it."""
        name = self.mechanism.removesuffix(_AGAIN)
        return name if self.mechanism_file is None else f"{name}@{self.mechanism_file.digest}"

    @property
    def streams(self) -> tuple[int, ...]:
        """The seeds of what is drawn at random: of a mechanism under a second name, others than of the first."""
        return tuple(seed + self.mechanism.endswith(_AGAIN) * _AGAIN_SEEDS for seed in self.seeds)

    @property
    def identity(self) -> str:
        """Names the cell on disk: a hash of all that its result depends on."""
        content = self.model_dump(mode="json", exclude={"condition", "task", "training", "mechanism_file"})
        content["task"] = self.task.model_dump(mode="json")
        content["training"] = self.training.model_dump(mode="json", exclude=_NOT_OF_A_CELL)
        content["protocol"] = _PROTOCOLS[self.protocol]
        if (file := file_of(self.task)) is not None:
            content["task_file"] = file.digest
        if self.mechanism_file is not None:
            content["mechanism_file"] = self.mechanism_file.digest
        text = json.dumps(content, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def __str__(self) -> str:
        gain = "" if self.initial_gain == 1 else f", gain {self.initial_gain:g}"
        return f"{self.condition}, {self.mechanism}, {self.role}, learning rate {self.learning_rate:g}{gain}"


class Comparison(_Strict):
    """One condition with one mechanism: cells to tune on, cells to report, and cells to confirm these."""

    condition: str
    task: Any
    model: ModelConfig
    mechanism: str
    training: TrainingConfig
    seeds: SeedsConfig
    protocol: int = PROTOCOL
    mechanism_file: TaskFile | None = None

    def tuning_cells(self, finished: Callable[[Cell], bool] | None = None) -> list[Cell]:
        """One set of cells per setting; none where there is nothing to choose.

        Args:
            finished: Whether a cell is on disk. Seeds of a cell that was finished when a study had fewer of them are
                not trained again: only those that it lacks make a cell of their own.
        """
        settings = self.training.settings
        if len(settings) == 1:
            return []
        return [cell for setting in settings for cell in self._cells("tuning", setting, self.seeds.tuning, finished)]

    def final_cells(self, setting: Setting, finished: Callable[[Cell], bool] | None = None) -> list[Cell]:
        """The cells of the reported seeds; `finished` as in `tuning_cells`."""
        return self._cells("final", setting, self.seeds.final, finished)

    def confirmation_cells(self, setting: Setting, finished: Callable[[Cell], bool] | None = None) -> list[Cell]:
        """The cells of the seeds that confirm what the reported ones show; `finished` as in `tuning_cells`."""
        return self._cells("confirmation", setting, self.seeds.confirmation, finished)

    def _cells(self, role: Role, setting: Setting, count: int, finished: Callable[[Cell], bool] | None) -> list[Cell]:
        first = self.seeds.start + {"tuning": _TUNING_SEEDS, "final": 0, "confirmation": _CONFIRMATION_SEEDS}[role]
        together, cells = self.seeds.together, []
        for start in range(0, count, together):
            seeds = range(first + start, first + min(start + together, count))
            cells += self._split(role, setting, seeds, finished or (lambda cell: False))
        return cells

    def _split(self, role: Role, setting: Setting, seeds: range, finished: Callable[[Cell], bool]) -> list[Cell]:
        """One cell, or the longest finished one that these seeds begin with, and the cells of the others."""
        whole = self._cell(role, setting, seeds)
        if finished(whole):
            return [whole]
        for count in range(len(seeds) - 1, 0, -1):
            part = self._cell(role, setting, seeds[:count])
            if finished(part):
                return [part, *self._split(role, setting, seeds[count:], finished)]
        return [whole]

    def _cell(self, role: Role, setting: Setting, seeds: range) -> Cell:
        return Cell(
            condition=self.condition, task=self.task, model=self.model, mechanism=self.mechanism,
            learning_rate=setting.learning_rate, initial_gain=setting.initial_gain, role=role,
            training=self.training.of(role), seeds=tuple(seeds), protocol=self.protocol,
            mechanism_file=self.mechanism_file,
        )  # fmt: skip


class _Files:
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
        return TASKS[kind].model_validate_json(json.dumps(content), strict=True)


def _combinations(values: dict[str, Any]) -> list[dict[str, Any]]:
    empty = [name for name, value in values.items() if value == []]
    if empty:
        raise ValueError(f"{empty[0]} must have at least one value in the grid, got []")
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*lists)]


def _label(task: Task | RecordedTask, model: ModelConfig, varying: list[str]) -> str:
    """The task, its position code, and what else differs between the models of the study."""
    extra = [f"{name} {getattr(model, name)}" for name in varying if name != "position"]
    return ", ".join([task.label, model.position, *extra])


# ---- reading ----


def load_config(preset_or_file: str) -> tuple[StudyConfig, str]:
    """The configuration of a preset or a TOML file, and its text.

    Raises:
        ConfigError: No such preset or file, not TOML, or a key or value does not fit.
    """
    path = Path(preset_or_file)
    if preset_or_file in preset_names():
        text = preset_text(preset_or_file)
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
    else:
        raise ConfigError(f"no preset or file {preset_or_file!r}; presets are: {', '.join(preset_names())}")
    return parse_config(text, preset_or_file, lambda name: path.parent / name), text


def parse_config(
    text: str,
    source: str,
    find: Callable[[str], Path] = Path,
    *,
    protocol: int = PROTOCOL,
    record: Record | None = None,
) -> StudyConfig:
    """The configuration in a TOML text, whose `task_files` and `mechanism_files` are run.

    Args:
        text: The TOML.
        source: Where it is from, to be named in errors.
        find: Where a file named in `task_files` is; by default, relative to the working directory.
        protocol: The number of its protocol, where it does not say.
        record: The facts known of the files, which are then not run.

    Raises:
        ConfigError: Not TOML, a key or value does not fit, or a file of tasks or mechanisms cannot be used.
    """
    try:
        content = tomllib.loads(text)
        content.setdefault("protocol", protocol)
        for table, defaults in _OLDER_DEFAULTS.get(content["protocol"], {}).items():
            if isinstance(content.setdefault(table, {}), dict):
                content[table] = defaults | content[table]
        files = _Files(record=record)
        if record is None:
            tasks, mechanisms = ([find(name) for name in _names(content, key)] for key in _FILE_KEYS)
            files = _Files(load_task_files(tasks), load_mechanism_files(mechanisms))
        # As JSON, for strictness: "30" and true are not numbers there, but a list is a tuple.
        text = json.dumps(content, default=str)
        config = StudyConfig.model_validate_json(text, strict=True, context=files)
        for _, task, _ in config.expanded() if files.tasks else []:
            if not isinstance(task, RecordedTask):
                check_task(task)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    except TaskFileError as error:
        raise ConfigError(f"{source}: {error.key}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: {_in_one_line(error)}") from None
    return config


_FILE_KEYS = ("task_files", "mechanism_files")


def runs_files(text: str) -> bool:
    """Whether a configuration names files that would be run."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return any(_names(content, key) for key in _FILE_KEYS)


def _names(content: dict[str, Any], key: str) -> list[str]:
    """File names in a key; none where they are no names, which is left to the validation."""
    names = content.get(key, [])
    well_formed = isinstance(names, list) and all(isinstance(name, str) and name.endswith(".py") for name in names)
    return names if well_formed else []


def _in_one_line(error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
        got = problem["input"]
        if not isinstance(got, dict) and problem["type"] not in ("extra_forbidden", "missing", "value_error"):
            message += f", got {got!r}"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)
