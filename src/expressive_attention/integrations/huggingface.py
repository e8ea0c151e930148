"""Hugging Face transformers: ``attn_implementation="expressive"``, once this module has been imported.

    import expressive_attention.integrations.huggingface

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="expressive")
    model.set_attn_implementation("expressive")     # or of a model that exists

``"expressive_squared"`` is the form ``"squared"``. Only models that go through transformers' attention interface
follow that name; others accept it and run softmax. `convert` tells them apart, and its `verify` proves it.

The choice is kept when a model is saved, if `convert` made it, and `from_pretrained` of this module restores it. The
loaders of transformers 5 restore whole models of the interface, too, or raise an error where this module has not been
imported or single layers were switched; those of transformers 4 give softmax without a word, which `check` finds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import expressive_attention
from ..nn.mechanisms import joined
from .conversion import ConversionError, Found, Undo, attention_layers, convert, form_of
from .guard import note_expressive
from .inspection import names_used
from .switching import GAIN, set_attributes

try:
    from safetensors import safe_open
    from transformers import AttentionInterface, AutoConfig, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
except ImportError as error:
    raise ImportError(
        "transformers 4.57 or newer is needed; the extra 'huggingface' installs it: "
        "pip install 'expressive-attention[huggingface]'"
    ) from error

__all__ = ["IMPLEMENTATIONS", "check", "find", "from_pretrained", "record", "switch"]

# Names of `attn_implementation`, by form.
IMPLEMENTATIONS = {"expressive": "expressive", "squared": "expressive_squared"}
_FORMS: dict[str | None, str] = {name: form for form, name in IMPLEMENTATIONS.items()}

# Of a model that was saved with expressive attention in some layers alone, which no loader but ours can restore.
_PARTLY = "expressive_partly"

# Key of config.json with the switched layers by form; None: all.
_RECORD = "expressive_attention"

# What a softmax layer may be given that expressive attention does not define. To leave it out would change the model.
_UNDEFINED = {
    "softcap": "a soft cap of the scores",
    "logits_soft_cap": "a soft cap of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a mask of heads",
    "layer_head_mask": "a mask of heads",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


# Arguments of loaders that say where a model is.
_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")


def _attention(
    form: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every layer: ``(B, H, L, E)`` to ``(B, L, H, E)``, and weights if asked for."""
    note_expressive()
    for name, what in _UNDEFINED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} asks for {what} ({name}), which EA does not define")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must be broadcastable to (B, H, L, S), got {shape}")
    length, keys = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A mask tells all there is to tell, and so does a single query, which continues a cache and sees all of it.
    is_causal = bool(length > 1 and attention_mask is None and is_causal)
    keep = None if attention_mask is None else attention_mask[..., :keys]
    if position_bias is not None:
        position_bias = position_bias[..., :keys]
        keep = position_bias if keep is None else joined(keep, position_bias)
    if (gain := getattr(module, GAIN, None)) is not None:
        query = query * gain[:, None, None]
    settings: dict[str, Any] = {
        "is_causal": is_causal, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1], "form": form,
    }  # fmt: skip
    output = expressive_attention(query, key, value, keep, dropout, **settings)
    weights = None
    if kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)):
        every_key = torch.eye(keys, dtype=value.dtype, device=value.device).expand(*key.shape[:2], keys, keys)
        weights = expressive_attention(query, key, every_key, keep, **settings)
    return output.transpose(1, 2).contiguous(), weights


def _partly(module: nn.Module, *_: Any, **__: Any) -> Any:
    raise ConversionError(
        f"{type(module).__name__}: this model was saved with expressive attention in some of its layers; load it with "
        "expressive_attention.integrations.huggingface.from_pretrained"
    )


for _form, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, partial(_attention, _form))
    AttentionMaskInterface.register(_name, sdpa_mask)
AttentionInterface.register(_PARTLY, _partly)
AttentionMaskInterface.register(_PARTLY, sdpa_mask)


def from_pretrained(model_class: Any, name: str, **kwargs: Any) -> Any:
    """Load a model with the attention that it was saved with, in each of its layers, and with its gains.

    Args:
        model_class: A class of transformers, such as ``AutoModelForCausalLM``.
        name: As for ``model_class.from_pretrained``.
        **kwargs: For ``model_class.from_pretrained``.

    Raises:
        ConversionError: The saved choice cannot be restored.
        ValueError: The same, where its layers do not exist.
    """
    where = {key: kwargs[key] for key in _WHERE if key in kwargs}
    config = copy.deepcopy(kwargs.pop("config", None)) or AutoConfig.from_pretrained(name, **where)
    record = getattr(config, _RECORD, None)
    if record is None:
        return model_class.from_pretrained(name, config=config, **kwargs)
    # The record alone says what there is to do; converting anew leaves it as it is.
    config.__dict__.pop("attn_implementation", None)
    config._attn_implementation = None
    loaded = model_class.from_pretrained(name, config=config, **kwargs)
    model = loaded[0] if kwargs.get("output_loading_info") else loaded
    for form, layers in record.items():
        convert(model, form=form, layers=layers)
    where.pop("trust_remote_code", None)
    _restore_gains(model, name, where)
    return loaded


def _restore_gains(model: PreTrainedModel, name: str, where: dict[str, Any]) -> None:
    """Give layers the gains that lie in the files of a saved model, which transformers has no place for."""
    for file, keys in _files(name, where).items():
        with safe_open(file, "pt") as weights:
            for key in keys or weights.keys():
                if key.endswith(f".{GAIN}"):
                    _restore_gain(model, key.removesuffix(f".{GAIN}"), weights.get_tensor(key))


def _restore_gain(model: PreTrainedModel, layer: str, gain: Tensor) -> None:
    prefix = f"{model.base_model_prefix}."  # of the layers of a base model inside of one with a head
    modules = dict(model.named_modules())
    module = next((modules[n] for n in (layer, prefix + layer, layer.removeprefix(prefix)) if n in modules), None)
    if module is None:
        raise ConversionError(f"{type(model).__name__} was saved with gains of {layer!r}, and has no such layer")
    like = next(module.parameters(), model.get_parameter(next(iter(dict(model.named_parameters())))))
    module.register_parameter(GAIN, nn.Parameter(gain.to(like.device, like.dtype)))


def _files(name: str, where: dict[str, Any]) -> dict[str, list[str]]:
    """The files of weights of a saved model, and the names in each; none: to be seen in it."""
    find_file = partial(cached_file, name, **where, _raise_exceptions_for_missing_entries=False)
    if (index := find_file(filename=SAFE_WEIGHTS_INDEX_NAME)) is not None:
        keys: dict[str, list[str]] = {}
        for key, file in json.loads(Path(index).read_text())["weight_map"].items():
            keys.setdefault(file, []).append(key)
        return {str(find_file(filename=file)): names for file, names in keys.items() if any(GAIN in n for n in names)}
    return {} if (file := find_file(filename=SAFE_WEIGHTS_NAME)) is None else {file: []}


def record(model: nn.Module) -> None:
    """Write what attention each model of transformers has now into its configuration, with which it is saved."""
    for name in _roots(model):
        root: Any = model.get_submodule(name)
        forms, attributes = _forms(root), root.config.__dict__
        if forms:
            by_name = list(forms.values()) == [None] and all(form_of(module) is None for module in root.modules())
            implementation = IMPLEMENTATIONS[next(iter(forms))] if by_name else _PARTLY
            attributes.update({_RECORD: forms, "attn_implementation": implementation})
        elif attributes.pop(_RECORD, None) is not None:
            attributes.pop("attn_implementation", None)


def _forms(model: PreTrainedModel) -> dict[str, list[str] | None]:
    """Its layers by the form that they are switched to; None: every layer that it has."""
    layers = attention_layers(model)
    forms: dict[str, list[str]] = {}
    for found in layers:
        if (form := form_of(found.module) or _FORMS.get(_name_of(found.module))) is not None:
            forms.setdefault(form, []).append(found.name)
    return {form: None if len(names) == len(layers) else names for form, names in forms.items()}


def _name_of(module: Any) -> str | None:
    """Of a layer of the attention interface, the name by which it goes."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def check(model: PreTrainedModel) -> None:
    """Raise an error if a model was saved with expressive attention and has been loaded without.

    Raises:
        ConversionError: Its configuration says one thing and it would do another.
    """
    saved, now = getattr(model.config, _RECORD, None), _forms(model)
    if saved is not None and saved != now:
        raise ConversionError(
            f"{type(model).__name__} was saved with expressive attention in {_told(saved)} and has it in {_told(now)}; "
            "load it with expressive_attention.integrations.huggingface.from_pretrained"
        )


def _told(forms: dict[str, list[str] | None]) -> str:
    said = ("all layers" if names is None else ", ".join(names) for names in forms.values())
    return "; ".join(said) or "no layer"


def _roots(model: nn.Module) -> list[str]:
    """Names of the models of transformers that are not part of another one."""
    roots: list[str] = []
    for name, module in model.named_modules():  # the outer before the inner
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{r}." if r else "") for r in roots):
            roots.append(name)
    return roots


def find(model: nn.Module) -> list[Found]:
    """Layers of models of transformers that go through its attention interface."""
    roots = _roots(model)
    return [
        Found(name, module, how="attention interface of transformers")
        for name, module in model.named_modules()
        if any(name.startswith(f"{root}." if root else "") for root in roots)
        and not isinstance(module, PreTrainedModel)
        and "ALL_ATTENTION_FUNCTIONS" in names_used(type(module))
        and hasattr(module, "config")
    ]


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
    """Switch whole models by their configuration, single layers by one of their own."""
    name = IMPLEMENTATIONS[form]
    if whole:
        yield _switch_models([module for module in model.modules() if isinstance(module, PreTrainedModel)], name)
    else:
        for found in layers:
            yield _switch_layer(found.module, name)


def _switch_models(models: Sequence[PreTrainedModel], name: str) -> Undo:
    configs = [config for model in models for config in _with_parts(model.config)]
    before = [config._attn_implementation_internal for config in configs]
    for model in models:
        model.set_attn_implementation(name)

    def undo() -> None:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation

    return undo


def _with_parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside of it, as of a model that reads images and text."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _with_parts(part)


def _switch_layer(module: nn.Module, name: str) -> Undo:
    config: Any = copy.copy(module.config)
    config._attn_implementation_internal = name
    return set_attributes(module, config=config)
