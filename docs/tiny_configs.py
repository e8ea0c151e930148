"""Small configurations of Hugging Face transformers, by rules."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

VOCABULARY, ORDINARY = 128, 64  # tokens; identifiers below the second are special

# Sizes that fit together in most models of language, by the names that configurations use.
FIXED: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 64),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
}

# Values for attributes that a configuration leaves open, or that have no rule.
GIVEN: dict[str, Any] = {
    "use_cache": False,
    "upsample_groups": 1,
    "mm_tokens_per_image": 4,
    "latent_query_num": 4,
    "attn_layer_indices": [1],
    "num_kv_shared_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "prediction_length": 4,
}
OPEN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "mlp_layer_types": ["dense", "sparse"] * 4,
    "layer_types": ["full_attention"] * 8,
    "moe_intermediate_size": 32,
    "top_k_experts": 2,
    "context_length": 8,
    "block_repeats": [1, 1, 1],
    "vocabulary_map": {"<image>": 4},
    "deepstack_layer_map": [[1, 0], [1, 1]],
    "spatial_target_layers": [0, 1],
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}

# By the class of a configuration whose defaults do not make a model.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "CohereCompassTextConfig": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]}
        }
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "Granite4VisionConfig": {"downsample_rate": "1/2"},
    "Step3p7TextConfig": {"sliding_window": 4},
    "MoonshineStreamingConfig": {"num_key_value_heads": 8},
}

_DEPTH = re.compile(r"(^|_)(layers?|blocks|depths?)$")
_EXPERTS = re.compile(r"(^|_)experts$")
_FREE = re.compile(r"intermediate_size|ffn_(dim|hidden_size)|(^|_)d_ff$|^n_inner$")
_HEADS = re.compile(r"(^|_)heads$|^n_head$")
_WIDTH = re.compile(
    r"(size|sizes|dims?|width|widths|channels|rank|d_model|d_ff|d_kv|d_inner|n_embd|planes|mrope_section)$"
)
_NO_WIDTH = re.compile(
    r"vocab|image|patch|kernel|window|max|position|chunk|stride|sample|type|batch|block|grid|merge_size|group|context|crop"
    r"|state|memory_size|codebook_size|bucket|_bins|size_divisor|conv"
)
_TOKEN = re.compile(r"token_(id|ids|index|idx)$")


@dataclass(frozen=True)
class Size:
    """How small: widths by name, or divided. With `heads`, there are fewer heads, as wide as they were."""

    layers: int
    fixed: bool = False
    divisor: int = 1
    heads: bool = False


def sizes(layers: int) -> Iterator[Size]:
    """Yield sizes, the smallest first. Some models hold sizes of their own, so not every size fits."""
    yield Size(layers, fixed=True)
    for divisor in (8, 4, 2):
        for heads in (True, False):
            yield Size(layers, divisor=divisor, heads=heads)
    yield Size(layers)


def shrink(config: Any, size: Size) -> Any:
    """Make a configuration, and those inside of it, small."""
    _shrink(config, size)
    if (width := get(text_of(config), "hidden_size")) is not None:
        for _, part in parts(config):
            for name in ("out_hidden_size", "text_hidden_size"):
                if isinstance(get(part, name), int):
                    setattr(part, name, width)
            if get(part, "embed_dim") and get(part, "spatial_merge_size"):  # its hidden size is that of the text
                part.hidden_size = width
    return config


def _shrink(config: Any, size: Size) -> None:
    for name, value in EXCEPTIONS.get(type(config).__name__, {}).items():
        setattr(config, name, value)
    grouped = get(config, "num_key_value_heads") not in (None, get(config, "num_attention_heads"))
    staged = any(isinstance(get(config, name), list | tuple) for name in ("depth", "depths"))
    depths = [get(config, name) for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers")]
    for name, value in list(_attributes(config)):
        if name in getattr(config, "sub_configs", {}) or hasattr(value, "sub_configs"):
            if value is not None and not isinstance(value, dict):
                _shrink(value, size)
            continue
        new = _small(name, value, size)
        if isinstance(new, list | tuple) and len(new) in depths and not staged:
            new = new[: size.layers]
        if new is not value:
            with contextlib.suppress(Exception):  # some raise errors of their own
                setattr(config, name, new)
    heads, width = get(config, "num_attention_heads"), get(config, "hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int) or not heads:
        return
    for name, value in (("head_dim", width // heads), ("num_key_value_heads", heads)):
        now = get(config, name, 0)
        if now is None or (now and name == "num_key_value_heads" and not grouped):
            with contextlib.suppress(Exception):
                setattr(config, name, value)
    if "rope_type" in (rope := get(config, "rope_parameters") or {}):
        half = int(get(config, "head_dim", width // heads) * rope.get("partial_rotary_factor", 1)) // 2
        rope["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]


def get(config: Any, name: str, default: Any = None) -> Any:
    """An entry of a configuration; some raise errors of their own."""
    with contextlib.suppress(Exception):
        return getattr(config, name)
    return default


def _attributes(config: Any) -> Iterator[tuple[str, Any]]:
    for name in {**vars(config), **dict.fromkeys(getattr(config, "attribute_map", {}))}:
        if not name.startswith("_"):
            with contextlib.suppress(Exception):
                yield name, getattr(config, name)


def _small(name: str, value: Any, size: Size) -> Any:
    """The value of one entry of a small configuration."""
    if name in GIVEN:
        return GIVEN[name]
    if value is None:
        return _token(name, 0) if re.match("(image|video|audio)_token_", name) else OPEN.get(name)
    if isinstance(value, dict):
        return {key: _small(str(key), each, size) for key, each in value.items()}
    if isinstance(value, bool | str | float):
        return value
    if _TOKEN.search(name):
        return _token(name, value)
    if "vocab" in name:
        return _each(value, lambda x: min(x, VOCABULARY))
    if _EXPERTS.search(name) or name == "num_experts_per_tok":
        return _each(value, lambda x: min(x, 2 if "per_tok" in name or "shared" in name else 4))
    if _DEPTH.search(name):
        of_stages = isinstance(value, list | tuple)  # one of which may be numbered up to the layers in it, as in CvT
        return _each(value, lambda x: min(x, size.layers + of_stages))
    if size.fixed:
        return FIXED.get(name, value)
    if "feature_sizes" in name or name == "image_size":
        return _each(value, lambda x: x // 4 if x >= 1000 or name != "image_size" else x)
    if size.heads and _FREE.search(name):
        return _each(value, lambda x: min(x, 64))
    if size.heads and _HEADS.search(name):
        return _each(value, lambda x: max(1, x // size.divisor))
    if size.heads and ("head_dim" in name or "section" in name):
        return value
    if _WIDTH.search(name) and not _NO_WIDTH.search(name):
        small = size.divisor
        return _each(value, lambda x: x // small if x % small == 0 and (x >= 32 or "section" in name) else x)
    return value


def _each(value: Any, change: Callable[[int], int]) -> Any:
    """A number, or a list of numbers and lists, with each number changed."""
    if isinstance(value, list | tuple):
        return type(value)(_each(each, change) for each in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _token(name: str, value: Any) -> Any:
    """A special token's identifier: the same one for the same name, below all ordinary ones."""
    if isinstance(value, list | tuple):
        return type(value)(_token(name, each) for each in value[:1])
    if not isinstance(value, int) or value < 0:
        return value
    usual = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "mask": 3}
    return next(
        (number for key, number in usual.items() if name.startswith(key)), 4 + sum(map(ord, name)) % (ORDINARY - 4)
    )


def text_of(config: Any) -> Any:
    """The part of a configuration that is of text, if there is one; else all of it."""
    with contextlib.suppress(Exception):  # there are several
        return config.get_text_config()
    return config


def parts(config: Any) -> Iterator[tuple[str, Any]]:
    """A configuration and those inside of it, by name."""
    yield "", config
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            for inner, each in parts(part):
                yield f"{name}.{inner}", each
