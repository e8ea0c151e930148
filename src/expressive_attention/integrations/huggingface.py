"""Hugging Face transformers: ``attn_implementation="expressive"``, once this module has been imported.

    import expressive_attention.integrations.huggingface

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="expressive")
    model.set_attn_implementation("expressive")     # or of a model that exists

``"expressive_squared"`` is the form ``"squared"``. Only models that go through transformers' attention interface
follow that name; others accept it and run softmax. `convert` tells them apart, and its `verify` proves it.

The choice is kept when a model is saved, if `convert` made it, and `from_pretrained` of this module restores it. The
loaders of transformers 5 do so, too, or raise an error where this module has not been imported or single layers were
switched; those of transformers 4 give softmax without a word, which `check` finds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import expressive_attention
from ..nn.mechanisms import joined
from .conversion import ConversionError, Found, Undo, convert
from .inspection import names_used
from .switching import GAIN, set_attributes

try:
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError as error:
    raise ImportError(
        "transformers 4.57 or newer is needed; the extra 'huggingface' installs it: "
        "pip install 'expressive-attention[huggingface]'"
    ) from error

__all__ = ["IMPLEMENTATIONS", "check", "find", "from_pretrained", "switch"]

# Names of `attn_implementation`, by form.
IMPLEMENTATIONS = {"expressive": "expressive", "squared": "expressive_squared"}

# Of a model that was saved with expressive attention in some layers alone, which no loader but ours can restore.
_PARTLY = "expressive_partly"

# Key of config.json with the arguments of `convert`.
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
    """Load a model with the attention that it was saved with: all or some layers of the attention interface.

    Args:
        model_class: A class of transformers, such as ``AutoModelForCausalLM``.
        name: As for ``model_class.from_pretrained``.
        **kwargs: For ``model_class.from_pretrained``.

    Raises:
        ConversionError: The saved choice cannot be restored.
        ValueError: The same, where its layers do not exist.
    """
    from transformers import AutoConfig

    where = {key: kwargs[key] for key in _WHERE if key in kwargs}
    config = copy.deepcopy(kwargs.pop("config", None)) or AutoConfig.from_pretrained(name, **where)
    record = getattr(config, _RECORD, None)
    if record is not None:
        # That alone says what there is to do; converting anew leaves it as it is.
        config.__dict__.pop("attn_implementation", None)
        config._attn_implementation = None
    model = model_class.from_pretrained(name, config=config, **kwargs)
    if record is not None:
        convert(model, **record)
    return model


def check(model: PreTrainedModel) -> None:
    """Raise an error if a model was saved with expressive attention and has been loaded without.

    Raises:
        ConversionError: Its configuration says one thing and it would do another.
    """
    record, now = getattr(model.config, _RECORD, None), model.config._attn_implementation
    if record is None:
        return
    configs: dict[str, Any] = {found.name: found.module.config for found in find(model)}
    switched = [name for name, config in configs.items() if config._attn_implementation in IMPLEMENTATIONS.values()]
    wanted = record["layers"]
    if now != IMPLEMENTATIONS[record["form"]] if wanted is None else switched != wanted:
        raise ConversionError(
            f"{type(model).__name__} was saved with expressive attention and would run {now!r}; load it with "
            "expressive_attention.integrations.huggingface.from_pretrained"
        )


def find(model: nn.Module) -> list[Found]:
    """Layers of models of transformers that go through its attention interface."""
    roots = [name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
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
    if isinstance(model, PreTrainedModel):  # what is saved
        record = {"form": form, "layers": None if whole else [found.name for found in layers]}
        implementation = name if whole else _PARTLY
        yield set_attributes(model.config, attn_implementation=implementation, **{_RECORD: record})


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
