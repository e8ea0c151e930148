"""An entry in the state dict of each switched layer, which a model that was not converted refuses.

Many libraries save a state dict and nothing else (Lightning, timm, plain `torch.save`). Their models come back as they
were made, with softmax. With `strict=True`, the default, `load_state_dict` raises an error for the entry there. A
converted model takes state dicts with the entry and without it: weights that were trained with softmax are loaded, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..forms import FORMS
from .classes import set_attributes

__all__ = ["LINEARIZED", "MARK", "mark", "marked"]

# Name of the entry: a number, the place of the form in `FORMS`. The layer has it as an attribute, too, by which
# torch.distributed.checkpoint finds what an entry belongs to.
MARK = "expressive_attention_form"

# The attribute of layers whose form `linearize` has changed.
LINEARIZED = "_expressive_linearized"


def mark(module: nn.Module, form: str) -> Callable[[], None]:
    """Put the entry into the state dict of a layer; returns what takes it out."""
    undo_attribute = set_attributes(module, **{MARK: torch.tensor(FORMS.index(form), device="cpu")})
    handles = (
        module.register_state_dict_post_hook(_save),
        module.register_load_state_dict_pre_hook(_load),
    )

    def undo() -> None:
        for handle in handles:
            handle.remove()
        undo_attribute()

    return undo


def marked(model: nn.Module) -> Iterator[str]:
    """The names of the entries in the state dict of a model."""
    for name, module in model.named_modules():
        if MARK in module.__dict__:
            yield f"{name}.{MARK}".lstrip(".")


def _save(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    state_dict[prefix + MARK] = module.__dict__[MARK].clone()


def _load(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: list[str],
) -> None:
    found = state_dict.pop(prefix + MARK, None)
    if found is None or found.is_meta:
        return
    saved, form = FORMS[int(found)], FORMS[int(module.__dict__[MARK])]
    if saved != form:
        errors.append(f"{prefix}{MARK}: saved with the form {saved!r}, and the layer has {form!r}")
