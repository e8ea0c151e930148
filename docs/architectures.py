"""Which architectures of Hugging Face transformers run expressive attention, and which do not and why.

    .venv/bin/python docs/architectures.py [--only TEXT] [--write]

Every architecture of `AutoModel` is built from a tiny configuration with random weights, converted, and verified by a
forward pass: nothing is downloaded. Those that read images need torchvision. `--write` puts the list into
docs/architectures.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from expressive_attention.integrations import ConversionError, convert

SECONDS, PARAMETERS = 60, 100_000_000

# By the names that configurations use.
TINY: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("vocab_size",), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 64),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("eos_token_id",), 1),
    **dict.fromkeys(("use_cache",), False),
}


# For those that do not fit together with all of these: the width that they have, and fewer layers.
THIN = {name: value for name, value in TINY.items() if value == 2 or name in ("vocab_size", "num_experts", "use_cache")}


class TooSlowError(Exception):
    """It took longer than `SECONDS`."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """End what takes too long."""

    def stop(*_: Any) -> None:
        raise TooSlowError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shrink(config: Any, sizes: dict[str, Any]) -> Any:
    """Make a configuration, and those inside of it, small."""
    for name, value in sizes.items():
        with contextlib.suppress(Exception):  # some raise errors of their own
            if isinstance(getattr(config, name), int):
                setattr(config, name, value)
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            shrink(getattr(config, name), sizes)
    return config


def inputs_of(model: Any) -> dict[str, Any]:
    """Something to read, by the name of the model's main input."""
    name = model.main_input_name
    if name in ("pixel_values",):
        size = getattr(model.config, "image_size", 32)
        found: dict[str, Any] = {name: torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))}
    elif name == "input_values":
        found = {name: torch.randn(1, 2000)}
    elif name == "input_features":
        found = {name: torch.randn(1, getattr(model.config, "num_mel_bins", 80), 128)}
    else:
        found = {name: torch.randint(2, 100, (1, 8))}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(2, 100, (1, 6))
    return found


def build(config_class: Any, sizes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A small model that runs, and its inputs."""
    config = shrink(config_class(), sizes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters at least")
    model = AutoModel.from_config(config).eval()
    inputs = inputs_of(model)
    with torch.no_grad():
        model(**inputs)
    return model, inputs


def outcome(config_class: Any) -> str:
    """``""`` if expressive attention ran in every layer; else a phrase that starts with what was not possible."""
    try:
        model, inputs = build(config_class, TINY)
    except Exception as error:
        try:
            model, inputs = build(config_class, THIN)
        except Exception:
            return f"not tried: {first_line(error)}"
    try:
        conversion = convert(model)
        conversion.strict = False  # a pass that reaches no layer is told below
        found = conversion.verify(**inputs)
    except (ConversionError, NotImplementedError) as error:
        if "has no attention layer" in str(error) and "it computes softmax" not in str(error):
            return "without attention: "
        return f"refused: {first_line(error)}"
    except Exception as error:
        return f"failed: {first_line(error)}"
    if found.failed:
        return f"failed: {found}"
    if found.softmax:
        return "besides: "
    reached = len(found.calls) - len(found.idle)
    return (
        f"partly: {reached} of {len(found.calls)}; the others, as of images, were given nothing" if found.idle else ""
    )


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    line = (str(error).strip().splitlines() or [""])[0]
    kind = "" if isinstance(error, (ConversionError, NotImplementedError)) else f"{type(error).__name__}: "
    return f"{kind}{textwrap.shorten(line, 150, placeholder=' ...')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only architectures whose name contains this")
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results: dict[str, str] = {}
    for config_class in sorted(MODEL_MAPPING, key=lambda each: each.model_type):
        name = config_class.model_type
        if arguments.only not in name:
            continue
        try:
            with limited(), contextlib.redirect_stdout(io.StringIO()):
                results[name] = outcome(config_class)
        except TooSlowError as error:
            results[name] = f"not tried: {error}"
        print(f"{name}: {results[name] or 'verified'}", flush=True)
    text = page(results)
    if arguments.write:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


def page(results: dict[str, str]) -> str:
    """The list as Markdown."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, found in results.items():
        groups[found.partition(":")[0] or "verified"].append(name)
    without = ", ".join(groups["without attention"]) or "none"
    lines = [
        "# Architectures of Hugging Face transformers",
        "",
        f"Made by `docs/architectures.py` with transformers {transformers.__version__}: each architecture of",
        "`AutoModel`, built tiny with random weights, converted, and verified by a forward pass.",
        "",
        f"**Expressive attention ran in every layer** ({len(groups['verified'])}): {', '.join(groups['verified'])}.",
        "",
        "The same, with softmax of three dimensions or more elsewhere, as of samplers, poolers, or attention that goes",
        f"unseen: {', '.join(groups['besides']) or 'none'}.",
        "",
        f"Without attention that calls torch or the attention interface: {without}.",
    ]
    for group, title in {
        "partly": "Expressive attention ran in every layer that the pass reached, of those that there are",
        "refused": "Refused by `convert` or by the model",
        "failed": "Not verified: an error with expressive attention, or softmax ran in the same layers",
        "not tried": "Not tried: no tiny model of it could be built and run",
    }.items():
        if groups[group]:
            lines += ["", f"## {title} ({len(groups[group])})", "", "| architecture | why |", "|---|---|"]
            reasons = {name: results[name].partition(": ")[2].replace("|", "/") for name in groups[group]}
            lines += [f"| {name} | {reason} |" for name, reason in reasons.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
