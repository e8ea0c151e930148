"""Attention of a Hugging Face transformers model on a text."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from .capture import capture
from .record import Record

__all__ = ["record_text"]


def record_text(model: str | Path, text: str, *, max_tokens: int = 512) -> tuple[Record, list[str]]:
    """Capture a model while it reads the start of a text.

    Args:
        model: Folder or name of a model with weights, loaded with the attention that it was saved with; or a
            ``config.json``, which gives a model with random weights.
        text: Text to read; as bytes if the model comes from a ``config.json`` or has no tokenizer.
        max_tokens: Largest number of tokens of the text.

    Returns:
        The record and the tokens.

    Raises:
        ValueError: The text is empty, the model does not read text, or no attention was seen.
        OSError: There is no such model.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from ..integrations import huggingface

    if not text.strip():
        raise ValueError("text must not be empty")
    path = Path(model)
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"model must be a folder, a name or a config.json, and there is no file {path}")
        config: Any = AutoConfig.from_pretrained(str(path))
        loaded: Any = AutoModel.from_config(config)
    else:
        loaded = huggingface.from_pretrained(AutoModel, str(model))
    loaded.eval()
    if not getattr(loaded.config, "vocab_size", None):
        raise ValueError(f"model must be one that reads text, got {type(loaded).__name__}, which has no vocabulary")
    longest = min(max_tokens, getattr(loaded.config, "max_position_embeddings", None) or max_tokens)
    ids = [byte % loaded.config.vocab_size for byte in text.encode()[:longest]]
    tokens = [chr(byte) for byte in text.encode()[:longest]]
    if path.suffix != ".json":
        with contextlib.suppress(OSError, ValueError, KeyError):  # there is no tokenizer
            tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
            ids = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
            tokens = tokenizer.convert_ids_to_tokens(ids)
    with torch.no_grad(), capture(loaded, max_tokens=max_tokens) as record:
        given = {"input_ids": torch.tensor([ids])}
        if loaded.config.is_encoder_decoder:  # the decoder also reads it
            given["decoder_input_ids"] = given["input_ids"]
        loaded(**given)
    return record, tokens
