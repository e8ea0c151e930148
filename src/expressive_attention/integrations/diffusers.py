"""diffusers: set `ExpressiveAttnProcessor` as any other processor, or `convert` a model with the processors it has.

unet.set_attn_processor(expressive_attention.integrations.diffusers.ExpressiveAttnProcessor())
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

from torch import nn

from ..forms import check_form
from .conversion import Found, Undo, attention_layers, convert, form_of, forms_of, has_gain
from .errors import ConversionError
from .inspection import names_used
from .sdpa import expressive_sdpa
from .switching import WithExpressiveSdpa
from .switching import switch as give_class

try:
    from diffusers import ModelMixin
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.attention_processor import AttnProcessor2_0
except ImportError as error:
    raise ImportError(
        "diffusers 0.31 or newer is needed; the extra 'diffusers' installs it: "
        "pip install 'expressive-attention[diffusers]'"
    ) from error

__all__ = ["ExpressiveAttnProcessor", "find", "record", "switch"]

# Key of config.json with the switched layers by form, and with those that have gains of `calibrate`.
_RECORD, _GAINS = "expressive_attention", "expressive_gains"

_CALLS = {"scaled_dot_product_attention", "dispatch_attention_fn"}


class ExpressiveAttnProcessor(AttnProcessor2_0):
    """`AttnProcessor2_0` with expressive attention.

    Args:
        form: ``"expressive"`` or ``"squared"``.
    """

    def __init__(self, form: str = "expressive") -> None:
        check_form(form)
        super().__init__()
        self.form = form

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `AttnProcessor2_0`."""
        with expressive_sdpa(self.form):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)


def find(model: nn.Module) -> list[Found]:
    """Layers with a processor."""
    return [
        _described(name, module)
        for name, module in model.named_modules()
        if _has_processor(module) and not isinstance(module.processor, ExpressiveAttnProcessor)
    ]


def _has_processor(module: nn.Module) -> bool:
    return hasattr(module, "processor") and hasattr(module, "set_processor")


def _described(name: str, module: nn.Module) -> Found:
    processor = type(module.processor)
    if names_used(processor).isdisjoint(_CALLS):
        return Found(name, module, why_not=f"its processor {processor.__name__} does not call torch's attention")
    return Found(name, module, how=f"calls of torch's attention in {processor.__name__} are replaced")


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
    """Let each of them run inside of `expressive_sdpa`, whatever processor it has or is given."""
    for found in layers:
        yield give_class(found.module, WithExpressiveSdpa, form)


# ---- saving: the configuration keeps the choice, and the loader of diffusers restores it ----


def record(model: nn.Module) -> None:
    """Write what attention each model of diffusers has now into its configuration, with which it is saved."""
    for root in model.modules():
        if not isinstance(root, ModelMixin) or not hasattr(root, "_internal_dict"):
            continue
        forms, gains = _forms(root), [name for name, module in root.named_modules() if has_gain(module)]
        kept = {key: value for key, value in root._internal_dict.items() if key not in (_RECORD, _GAINS)}
        added = {key: value for key, value in ((_RECORD, forms), (_GAINS, gains)) if value}
        root.__dict__["_internal_dict"] = FrozenDict({**kept, **added})


def _forms(model: nn.Module) -> dict[str, list[str] | None]:
    own: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if form_of(module) is None and isinstance(processor, ExpressiveAttnProcessor):
            own.setdefault(processor.form, []).append(name)
    if not own:
        return forms_of(model)
    for form, names in forms_of(model).items():  # of which all are not all, since `find` leaves those alone
        own.setdefault(form, []).extend(names or [found.name for found in attention_layers(model)])
    return dict(own)


def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    record(self)
    return _plain_save(self, *args, **kwargs)


def _from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
    loaded = _plain_load.__func__(cls, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if gains := model.config.get(_GAINS):
        raise ConversionError(
            f"{type(model).__name__} was saved with gains in {', '.join(gains)}, which diffusers does not load; "
            "save it after `merge_gains`"
        )
    for form, layers in (model.config.get(_RECORD) or {}).items():
        convert(model, form=form, layers=layers)
    return loaded


# Models are saved and loaded as parts of pipelines, too, and diffusers calls nothing of ours then.
_models: Any = ModelMixin
_plain_save, _plain_load = _models.save_pretrained, _models.from_pretrained
_models.save_pretrained = wraps(_plain_save)(_save_pretrained)
_models.from_pretrained = classmethod(wraps(_plain_load.__func__)(_from_pretrained))
