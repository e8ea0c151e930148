"""The parts of a configuration: model, training and seeds. Unknown keys are errors, which are said in one line."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...nn import position_codes
from .condition import Setting

__all__ = [
    "PROTOCOL",
    "TUNING_SEEDS",
    "ModelConfig",
    "SeedsConfig",
    "Strict",
    "TrainingConfig",
    "distinct",
    "in_one_line",
]


# Raise it when a change of the code changes what a run means; docs/protocol.md describes each.
PROTOCOL = 3

# No scale and no count may be larger; float32 has room for the square of such a scale.
_LARGEST = 1_000_000_000

# Seeds on which learning rates and gains are chosen start so much further on than the reported ones.
TUNING_SEEDS = 1_000_000


class Strict(BaseModel):
    """A part of a configuration: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, which must differ."""
    if len(set(values)) < len(values):
        raise ValueError(f"values must differ, got {list(values)}")
    return values


def _one_spelling(position: str) -> str:
    """One spelling of position codes, so that their order does not change the identity of a cell."""
    return "+".join(position_codes(position)) or "none"


_Scale = Annotated[float, Field(gt=0, le=_LARGEST)]
_Count = Annotated[int, Field(ge=1, le=_LARGEST)]
Position = Annotated[str, AfterValidator(_one_spelling)]
Role = Literal["tuning", "final", "confirmation"]


class ModelConfig(Strict):
    """The transformer that all mechanisms sit in; see `expressive_attention.nn.Transformer`."""

    layers: _Count = 1
    embed_dim: _Count = 16
    heads: _Count = 1
    position: Position = "rope"
    rope_base: float | None = Field(default=None, gt=0)  # None: max(10, 2 * length)
    norm: Literal["pre", "post", "none"] = "pre"
    norm_affine: bool = False
    mlp_ratio: _Count = 4
    activation: Literal["relu", "gelu"] = "relu"
    gain: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    bias: bool = True
    embedding_std: _Scale = 0.5
    embedding_shift: float = Field(default=0.0, ge=-_LARGEST, le=_LARGEST)

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


class TrainingConfig(Strict):
    """The training and evaluation of one seed, the same for all mechanisms."""

    steps: _Count = 3000
    tuning_steps: _Count | None = None  # of a tuning seed; None: as many as of all others
    batch_size: _Count = 32
    # Every pair of a learning rate and a gain is tried for each mechanism on the tuning seeds; the final seeds run at
    # the best.
    learning_rates: Annotated[tuple[_Scale, ...], AfterValidator(distinct)] = Field(
        default=(2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2), min_length=1
    )
    initial_gains: Annotated[tuple[_Scale, ...], AfterValidator(distinct)] = Field(default=(1.0,), min_length=1)
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of sgd
    weight_decay: float = Field(default=0.0, ge=0, le=_LARGEST)  # decoupled in adam (AdamW)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    warmup: int = Field(default=100, ge=0, le=_LARGEST)
    schedule: Literal["cosine", "constant"] = "cosine"
    gradient_clip: float | None = Field(default=None, gt=0)  # norm of a seed's gradient; None: not clipped
    evaluate_every: _Count = 100
    validation_sequences: _Count = 1024
    test_sequences: _Count = 2048
    rollouts: _Count = 256
    rollout_digits: _Count = 32
    # A seed is solved if its last `solved_evaluations` and the final test reach this accuracy.
    solved_accuracy: float = Field(default=0.995, gt=0, le=1)
    solved_evaluations: _Count = 3
    # Protocol 2 alone has this: a seed ended when it had reached that many evaluations in a row.
    early_stop: bool = Field(default=False, json_schema_extra={"protocol": 2})

    @model_validator(mode="after")
    def _tuning_is_no_longer(self) -> TrainingConfig:
        if self.tuning_steps is not None and self.tuning_steps > self.steps:
            raise ValueError(f"tuning_steps must be at most steps, got {self.tuning_steps} and {self.steps}")
        return self

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings that are tried for each mechanism."""
        return tuple(Setting(rate, gain) for rate in self.learning_rates for gain in self.initial_gains)

    def of(self, role: Role) -> TrainingConfig:
        """The training of the seeds of a role."""
        steps = self.steps if role != "tuning" or self.tuning_steps is None else self.tuning_steps
        return self.model_copy(update={"steps": steps, "tuning_steps": None})


class SeedsConfig(Strict):
    """The numbers of seeds, and of seeds that train together in one program."""

    tuning: int = Field(default=8, ge=0)
    final: _Count = 16
    # Fresh seeds, for conditions on which the final seeds show an exclusive range.
    confirmation: int = Field(default=32, ge=0)
    # The first of the final seeds: another start repeats a study on other seeds, tuning seeds included.
    start: int = Field(default=0, ge=0, lt=TUNING_SEEDS)
    together: _Count = 16

    @model_validator(mode="after")
    def _seeds_are_others(self) -> SeedsConfig:
        for name in ("tuning", "final", "confirmation"):
            if self.start + getattr(self, name) > TUNING_SEEDS:
                raise ValueError(
                    f"start + {name} must be at most {TUNING_SEEDS}, got {self.start} + {getattr(self, name)}"
                )
        return self


# ---- errors ----

_UNSAID = ("extra_forbidden", "missing", "value_error")  # errors whose value says nothing, or is in the message


def in_one_line(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """All problems: the key of each, the problem, and the value that came.

    Args:
        error: The problems.
        model: The class that was to be made.
        where: The key under which its content stands; empty: it is the whole configuration.
    """
    parts = []
    problems = error.errors(include_url=False)
    for problem in problems:
        location = problem["loc"]
        within = [other["loc"] for other in problems if other["loc"][: len(location)] == location != other["loc"]]
        if problem["type"] == "too_short" and within:
            continue  # of what is wrong in it, nothing was left
        key = ".".join(str(part) for part in (*([where] if where else []), *location))
        message = _in_our_words(problem["msg"])
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; known keys are {', '.join(_keys(model, location[:-1]))}"
        got = problem["input"]
        if not isinstance(got, dict) and problem["type"] not in _UNSAID:
            message += f", got {got!r}"
        parts.append(f"{key}: {message}" if key else message)
    return "; ".join(parts)


def _in_our_words(message: str) -> str:
    message = message.removeprefix("Value error, ").replace("Field required", "is missing")
    message = re.sub(r"^(Input|Tuple|List|Dictionary|String|Value) should ", "must ", message)
    return re.sub(r" after validation, not \d+$", "", message)


def _keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys that the table at a path of keys and places in lists may have; those of protocol 2 are left out."""
    for name in path:
        if isinstance(name, str):
            model = next(iter(_models(model.model_fields[name].annotation)))
    return [key for key, field in model.model_fields.items() if not field.json_schema_extra]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The classes of pydantic in a type."""
    if isinstance(annotation, type(BaseModel)):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models(part)]
