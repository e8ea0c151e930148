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
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import region
from ..functional import expressive_attention
from ..masks import join_masks
from ..varlen import expressive_attention_varlen
from .classes import give_class, original_class, set_attributes
from .conversion import (
    ConversionError,
    Found,
    Undo,
    attention_layers,
    convert,
    form_of,
    forms_of,
    has_gain,
    record_choice,
)
from .guard import GUARD, Guarded, implementation_of, note_expressive
from .inspection import names_used, own_softmax
from .marks import MARK, marked
from .paged import allow, gathered
from .switching import GAIN

try:
    from safetensors import safe_open
    from transformers import AttentionInterface, AutoConfig, DynamicCache, PreTrainedModel
    from transformers.cache_utils import DynamicLayer
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    try:
        from transformers.configuration_utils import PreTrainedConfig
    except ImportError:  # its name in transformers 4
        from transformers.configuration_utils import PretrainedConfig as PreTrainedConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
except ImportError as error:
    raise ImportError(
        "transformers 4.57 or newer is needed; the extra 'huggingface' installs it: "
        "pip install 'expressive-attention[huggingface]'"
    ) from error

from .states import STATE, SquaredCache, StateLayer

__all__ = ["IMPLEMENTATIONS", "check", "find", "form_of_layer", "from_pretrained", "record", "squared_cache", "switch"]

# Names of `attn_implementation`, by form.
IMPLEMENTATIONS = {"expressive": "expressive", "squared": "expressive_squared"}
_FORMS: dict[str | None, str] = {name: form for form, name in IMPLEMENTATIONS.items()}

# The name in a saved model that has expressive attention in some layers alone, which no loader but ours can restore.
_PARTLY = "expressive_partly"

# Key of config.json with the switched layers by form; None: all.
_RECORD = "expressive_attention"

# Key of config.json with the names of the layers that have gains.
_GAINS = "expressive_gains"

# Arguments of softmax layers that expressive attention does not define. To leave them out would change the model.
_UNDEFINED = {
    "softcap": "a soft cap of the scores",
    "logits_soft_cap": "a soft cap of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a mask of heads",
    "layer_head_mask": "a mask of heads",
}


# The name that modules of transformers have for the attention interface.
_TABLE = "ALL_ATTENTION_FUNCTIONS"

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
    """Attention of a layer of transformers: ``(B, H, L, E)`` to ``(B, L, H, E)``, and weights if asked for."""
    note_expressive()
    for name, what in _UNDEFINED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{original_class(module).__name__} asks for {what} ({name}), which EA does not define"
            )
    if kwargs.get("cache") is not None:
        # Where its sequences start, and causality, tell all that a mask would.
        key, value, kwargs = gathered(module, key, value, kwargs)
        attention_mask, is_causal = None, True
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must be broadcastable to (B, H, L, S), got {shape}")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if (attend := getattr(key, STATE, None)) is not None:
        asked = {"position_bias": position_bias, "dropout": dropout or None, **kwargs}
        # A single query sees all keys, causal or not; a mask tells causality, too.
        _check_state(module, form, is_causal or attention_mask is not None or query.shape[2] == 1, asked)
        output = attend(_with_gain(module, query), key, value, attention_mask)
        return output.transpose(1, 2).contiguous(), None
    keep = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    for bias in (position_bias, *_chosen_keys(module, query, key, keep, kwargs)):
        if bias is not None:
            bias = bias[..., : key.shape[2]]
            keep = bias if keep is None else join_masks(keep, bias)
    query, wants_weights = _with_gain(module, query), _wants_weights(module, kwargs)
    starts = _starts(kwargs)
    if starts is not None and keep is None and not wants_weights:
        sides = _window(kwargs, is_causal)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = expressive_attention_varlen(q, k, v, *starts, dropout, scaling, is_causal, sides, form=form)
        return output.unflatten(0, (query.shape[0], -1)), None
    if starts is not None:
        same = _same_sequence(query, key, *starts[:2])
        keep = same if keep is None else join_masks(keep, same)
    # A mask tells all there is to tell. Without one, queries that are fewer than keys are the last ones: they continue
    # a cache, or a model has left out those before them.
    settings: dict[str, Any] = {
        "is_causal": is_causal and attention_mask is None, "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1], "form": form, "causal_alignment": "lower_right",
    }  # fmt: skip
    if region.active() is not None:
        _check_region(module, kwargs, wants_weights)
        settings["window_size"] = _window(kwargs, is_causal)
    output = expressive_attention(query, key, value, keep, dropout, **settings)
    weights = None
    if wants_weights:
        every_key = torch.eye(key.shape[2], dtype=value.dtype, device=value.device)
        weights = expressive_attention(query, key, every_key.expand(*key.shape[:2], -1, -1), keep, **settings)
    return output.transpose(1, 2).contiguous(), weights


def _window(kwargs: dict[str, Any], is_causal: bool) -> tuple[int, int]:
    """The window of a layer, where no mask tells it."""
    window = kwargs.get("sliding_window")
    return (-1, -1) if window is None else (window - 1, 0 if is_causal else window - 1)


def _check_region(module: Any, kwargs: dict[str, Any], wants_weights: Any) -> None:
    """Raise an error for a layer that asks for what no rank of a region of `distributed.ContextParallel` has.

    There is no mask in a region: which keys a token sees is causality, a window, and the sequences of the region.
    """
    name = original_class(module).__name__
    if wants_weights:
        raise NotImplementedError(f"{name} asks for weights of attention, of which each rank has a part")
    kinds, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    kind = kinds[index] if kinds and index is not None else "full_attention"
    if kind not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(f"{name} asks for {kind}, which a region of ContextParallel does not have")
    if kind == "sliding_attention" and kwargs.get("sliding_window") is None:
        raise NotImplementedError(f"{name} does not say how long its window is, which its mask would have told")


def _with_gain(module: nn.Module, query: Tensor) -> Tensor:
    """The queries ``(B, H, L, E)`` times the gains of `calibrate`, if there are any."""
    gain = getattr(module, GAIN, None)
    return query if gain is None else query * gain[:, None, None]


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    return kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False))


# Arguments of layers that a state of constant size has no answer to.
_NOT_OF_A_STATE = {
    "position_bias": "a bias of positions",
    "dropout": "dropout",
    "sliding_window": "a sliding window",
    "cu_seq_lens_q": "packed sequences",
    "indices": "chosen keys",
    "block_indices": "chosen keys",
}


def _check_state(module: nn.Module, form: str, is_causal: bool, asked: dict[str, Any]) -> None:
    """Raise an error for a layer that asks for more than a state of constant size tells."""
    name = original_class(module).__name__
    if form != "squared":
        raise ConversionError(f"{name} has a state of the form 'squared' and computes {form!r}; make the cache anew")
    found = [what for argument, what in _NOT_OF_A_STATE.items() if asked.get(argument) is not None]
    found += ["attention that is not causal"] * (not is_causal)
    found += ["weights of attention"] * bool(_wants_weights(module, asked))
    if found:
        raise NotImplementedError(
            f"{name} asks for {' and '.join(found)}, which a state of constant size does not have; use the cache that "
            "the model makes by itself"
        )


def _chosen_keys(
    module: Any, query: Tensor, key: Tensor, keep: Tensor | None, kwargs: dict[str, Any]
) -> Iterator[Tensor]:
    """Masks of layers that choose keys for each query, and make the mask themselves for torch's attention alone."""
    if (indices := kwargs.get("indices")) is not None:  # (B, L, keys chosen)
        chosen = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=key.device)
        yield chosen.scatter(-1, indices.long(), True).unsqueeze(1)
    if (blocks := kwargs.get("block_indices")) is not None:
        length, keys = query.shape[2], key.shape[2]
        if (positions := kwargs.get("position_ids")) is None:
            positions = torch.arange(keys - length, keys, device=query.device)
        positions = (positions if positions.ndim > 1 else positions.unsqueeze(0)).expand(query.shape[0], -1)
        yield module.indexer.build_block_mask(blocks, keep, keys, query.dtype, query.device, positions)


def _starts(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, int, int] | None:
    """Where packed sequences start among queries and keys, and the longest of them; None: there are none."""
    queries, keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if queries is None:
        return None
    keys = queries if keys is None else keys
    longest = [
        int(starts.diff().max() if (given := kwargs.get(name)) is None else given)
        for name, starts in (("max_length_q", queries), ("max_length_k", keys))
    ]
    return queries, keys, longest[0], longest[1]


def _same_sequence(query: Tensor, key: Tensor, query_starts: Tensor, key_starts: Tensor) -> Tensor:
    """A mask ``(B, 1, L, S)``, True where query and key are of one packed sequence."""
    places = [
        torch.bucketize(torch.arange(x.shape[0] * x.shape[2], device=x.device), starts[1:].to(x.device), right=True)
        for x, starts in ((query, query_starts), (key, key_starts))
    ]
    rows, columns = (place.view(x.shape[0], x.shape[2]) for place, x in zip(places, (query, key), strict=True))
    return rows[:, None, :, None] == columns[:, None, None, :]


def _mask(*args: Any, **kwargs: Any) -> Any:
    """As torch's attention is given it; but with a static cache, the first queries of many keys have a mask, too.

    Without one, they could not be told from queries that are the last ones.
    """
    if region.active() is not None:
        return _no_mask(kwargs)
    queries = kwargs["cache_position"].shape[0] if "cache_position" in kwargs else kwargs.get("q_length")
    if queries != 1 and queries != kwargs.get("kv_length"):
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def _no_mask(kwargs: dict[str, Any]) -> None:
    """The mask of a model in a region of `distributed.ContextParallel`, which knows places that the model does not."""
    padding = kwargs.get("attention_mask")
    if padding is not None and not bool(padding.all()):
        raise ValueError(
            "attention_mask must hide no token in a region of ContextParallel: give that one key_lengths, or shards of "
            "packed sequences"
        )
    if kwargs.get("use_vmap"):  # of a model that joins a function of its own to causality
        raise NotImplementedError("masks of a model's own are not implemented in a region of ContextParallel")


def _partly(module: nn.Module, *_: Any, **__: Any) -> Any:
    raise ConversionError(
        f"{type(module).__name__}: this model was saved with expressive attention in some of its layers; load it with "
        "expressive_attention.integrations.huggingface.from_pretrained"
    )


# The entries of transformers' interface of attention.
_ENTRIES = {name: partial(_attention, form) for form, name in IMPLEMENTATIONS.items()}

for _name, _entry in _ENTRIES.items():
    AttentionInterface.register(_name, _entry)
    AttentionInterface.register(f"paged|{_name}", _entry)  # as transformers 5.0 calls it
    AttentionMaskInterface.register(_name, _mask)
allow(IMPLEMENTATIONS.values())
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
    gains = getattr(config, _GAINS, [])
    # The record alone says what there is to do; converting anew leaves it as it is.
    for key in ("attn_implementation", _RECORD, _GAINS):
        config.__dict__.pop(key, None)
    config._attn_implementation = None
    loaded = model_class.from_pretrained(name, config=config, **kwargs)
    model = loaded[0] if kwargs.get("output_loading_info") else loaded
    for form, layers in record.items():
        convert(model, form=form, layers=layers)
    where.pop("trust_remote_code", None)
    _restore_gains(model, name, where, kwargs.get("variant"))
    prefix = f"{model.base_model_prefix}."  # of the layers of a base model inside of one with a head
    if missing := sorted({n.removeprefix(prefix) for n in gains} - {n.removeprefix(prefix) for n in _gains(model)}):
        raise ConversionError(
            f"{type(model).__name__} was saved with gains in {', '.join(missing)}, which are not in its files of "
            "safetensors"
        )
    record_choice(model)
    return loaded


def squared_cache(model: PreTrainedModel) -> SquaredCache:
    """An empty cache of constant size for generation: ``model.generate(..., past_key_values=squared_cache(model))``.

    Layers that compute the form ``"squared"`` keep a `SquaredState` in it, of E (E + 1) / 2 times E numbers for each
    head of keys, all others what they have in the cache that transformers makes: keys and values, of a window where
    there is one. Where all layers have the form, neither the time of a step nor memory grows with the context. Beam
    search and padding work as ever. Tokens cannot be taken back, so there is no assisted generation with it.

    Args:
        model: A model that generates, with the form ``"squared"`` in some of its layers.

    Raises:
        ConversionError: It has no such layer, or layers share their keys.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes)).eval()
        >>> conversion = convert(model, form="squared")
        >>> squared_cache(model)
        SquaredCache(layers=[StateLayer])
    """
    name = type(model).__name__
    config: Any = model.config.get_text_config(decoder=True)
    modules: list[Any] = [found.module for found in attention_layers(model)]
    indexed = [(index, module) for module in modules if (index := getattr(module, "layer_idx", None)) is not None]
    layers: list[Any] = DynamicCache(config=config).layers
    if getattr(config, "is_encoder_decoder", False) or max((i for i, _ in indexed), default=-1) >= len(layers):
        raise ConversionError(f"{name} has layers that share keys or attend to an encoder, which states do not hold")
    for index, module in indexed:
        is_squared = form_of_layer(module) == "squared" and getattr(module, "is_causal", True)
        if is_squared and type(layers[index]) is DynamicLayer and not getattr(module, "sliding_window", None):
            layers[index] = StateLayer()
    if not any(isinstance(layer, StateLayer) for layer in layers):
        raise ConversionError(
            f"{name} has no layer of the form 'squared' that sees all tokens before; convert it with form='squared'"
        )
    return SquaredCache(layers)


def _restore_gains(model: PreTrainedModel, name: str, where: dict[str, Any], variant: str | None) -> None:
    """Give layers the gains that lie in the files of a saved model, which transformers has no place for."""
    for file, keys in _files(name, where, variant).items():
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
    like = next(module.parameters(), next(model.parameters()))
    dtype = model.dtype if model.dtype.is_floating_point else gain.dtype  # weights may be quantized
    module.register_parameter(GAIN, nn.Parameter(gain.to(like.device, dtype)))


def _files(name: str, where: dict[str, Any], variant: str | None) -> dict[str, list[str]]:
    """The files of weights of a saved model, and the names in each; none: to be seen in it."""
    index_name, file_name = (
        f".{variant}.".join(known.rsplit(".", 1)) if variant else known
        for known in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )
    find_file = partial(cached_file, name, **where, _raise_exceptions_for_missing_entries=False)
    if (index := find_file(filename=index_name)) is not None:
        keys: dict[str, list[str]] = {}
        for key, file in json.loads(Path(index).read_text())["weight_map"].items():
            keys.setdefault(file, []).append(key)
        return {str(find_file(filename=file)): names for file, names in keys.items() if any(GAIN in n for n in names)}
    return {} if (file := find_file(filename=file_name)) is None else {file: []}


def record(model: nn.Module) -> None:
    """Write what attention each model of transformers has now into its configuration, with which it is saved."""
    for name in _roots(model):
        root: Any = model.get_submodule(name)
        forms, gains, attributes = _forms(root), _gains(root), root.config.__dict__
        for key in (_RECORD, _GAINS, "attn_implementation"):
            attributes.pop(key, None)
        if forms:
            by_class = any(form_of(module) is not None for module in root.modules())
            by_name = list(forms.values()) == [None] and not by_class and not gains
            implementation = IMPLEMENTATIONS[next(iter(forms))] if by_name else _PARTLY
            attributes.update({_RECORD: forms, "attn_implementation": implementation})
        if gains:
            attributes[_GAINS] = gains
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # whose configuration says what the marks say
            kept = [key for key in module._keys_to_ignore_on_save or () if not key.endswith(MARK)]
            module._keys_to_ignore_on_save = {*kept, *marked(module)}


def _gains(model: PreTrainedModel) -> list[str]:
    """The layers that have gains of `calibrate`."""
    return [name for name, module in model.named_modules() if has_gain(module)]


def _to_dict(config: Any) -> dict[str, Any]:
    """As transformers makes it, with the name of expressive attention, which it would leave out."""
    output, name = _plain_to_dict(config), config._attn_implementation
    if name in _FORMS or name == _PARTLY:
        output.setdefault("attn_implementation", name)
    if name in _FORMS:
        output.setdefault(_RECORD, {_FORMS[name]: None})
    return output


def _from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """As transformers does it, with the name that was saved, which its fourth generation overwrites."""
    name = config_dict.get("attn_implementation")
    if name in _FORMS or name == _PARTLY:
        kwargs["attn_implementation"] = kwargs.get("attn_implementation") or name
    return _plain_from_dict.__func__(cls, config_dict, **kwargs)


# Configurations are saved in many ways, and transformers offers no place where a name could be added to all of them.
_configurations: Any = PreTrainedConfig
_plain_to_dict, _plain_from_dict = _configurations.to_dict, _configurations.from_dict
_configurations.to_dict = wraps(_plain_to_dict)(_to_dict)
_configurations.from_dict = classmethod(wraps(_plain_from_dict.__func__)(_from_dict))


def _forms(model: PreTrainedModel) -> dict[str, list[str] | None]:
    """Its layers by the form that they are switched to; None: every layer that it has."""
    return forms_of(model, form_of_layer)


def form_of_layer(module: nn.Module) -> str | None:
    """The form that an attention layer computes; None: it computes softmax."""
    follows = _TABLE in names_used(type(module))
    return form_of(module) or (_FORMS.get(_name_of(module)) if follows else None)


def _name_of(module: Any) -> str | None:
    """The name by which a layer goes in the attention interface."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name and name.removeprefix("paged|")


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
    gains, found = getattr(model.config, _GAINS, []), _gains(model)
    if gains != found:
        raise ConversionError(
            f"{type(model).__name__} was saved with gains in {', '.join(gains) or 'no layer'} and has them in "
            f"{', '.join(found) or 'no layer'}; load it with "
            "expressive_attention.integrations.huggingface.from_pretrained, or save it after `merge_gains`"
        )
    if saved is None and model.config._attn_implementation in _FORMS:
        left = [found for found in attention_layers(model) if form_of_layer(found.module) is None]
        if left:
            names = ", ".join(f"{found.name} ({type(found.module).__name__})" for found in left)
            raise ConversionError(
                f"{type(model).__name__} has the name of expressive attention, and softmax in {names}"
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
        and _TABLE in names_used(type(module))
        and hasattr(module, "config")
    ]


def _always(_: Any) -> bool:
    return True


def _named_otherwise(own: dict[str, Any], everyones: dict[str, Any]) -> Callable[[Any], bool]:
    """Whether a layer goes by another name, another entry has its name, or its forward pass has been replaced."""

    def has_changed(self: Any) -> bool:
        attributes: Any = self.__dict__
        name: Any = implementation_of(self)
        return (
            (GUARD in attributes and name != attributes[GUARD].implementation)
            or "forward" in attributes
            or own.get(name, everyones.get(name)) is not _ENTRIES.get(name)
        )

    return has_changed


class _Named(Guarded):
    """A layer that asks the attention interface for the implementation of its configuration."""

    _original: Any
    _has_notes = False
    # The entries of what its code calls ALL_ATTENTION_FUNCTIONS: those of its module, which come first, and of all.
    _entries: tuple[dict[str, Any], dict[str, Any]]

    def __init_subclass__(cls) -> None:
        modules = [sys.modules[base.__module__] for base in cls._original.__mro__ if base.__module__ in sys.modules]
        tables = [vars(module)[_TABLE] for module in modules if _TABLE in vars(module)]
        table: Any = tables[0] if tables else AttentionInterface()
        cls._entries = table._local_mapping, table._global_mapping
        # Its own code computes softmax for some calls, and torch's functions are to be seen.
        check: Any = _always if own_softmax(cls._original) else _named_otherwise(*cls._entries)
        cls._has_changed = check
        super().__init_subclass__()

    def _changes(self) -> list[str]:
        name: Any = implementation_of(self)
        own, everyones = self._entries
        changes, entry = super()._changes(), own.get(name, everyones.get(name))
        if name in _ENTRIES and entry is not _ENTRIES[name]:
            told = f"the entry {name!r} of transformers' attention interface was that of this package and is "
            changes.append(told + getattr(entry, "__name__", repr(entry)))
        return changes


def switch(model: nn.Module, layers: Sequence[Found], form: str, whole: bool) -> Iterator[Undo]:
    """Switch whole models by their configuration, single layers by one of their own."""
    name = IMPLEMENTATIONS[form]
    for found in layers:
        if not isinstance(found.module, _Named):  # as it is where another name was set after a conversion
            yield give_class(found.module, _Named)
    if whole:
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        yield _switch_models(models, [found.module for found in layers], name)
    else:
        for found in layers:
            yield _switch_layer(found.module, name)


def _switch_models(models: Sequence[PreTrainedModel], layers: Sequence[Any], name: str) -> Undo:
    # Layers may have a configuration that their model has made of its own and does not know, as in X-CLIP.
    hidden = [layer.config for layer in layers]
    configs = [*(config for model in models for config in _with_parts(model.config)), *hidden]
    before = [config._attn_implementation_internal for config in configs]
    for model in models:
        model.set_attn_implementation(name)
    for config in hidden:
        config._attn_implementation_internal = name

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
