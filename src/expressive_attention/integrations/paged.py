"""Continuous batching of transformers (`generate_batch`), whose cache keeps keys and values in pages.

No kernel reads pages here: the cache gathers the keys and values of a batch, one sequence after the other, and they are
attended to as packed sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import wraps
from typing import Any

from torch import Tensor

from .classes import original_class

__all__ = ["allow", "gathered"]


def gathered(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Keys and values ``(1, H, S, E)`` of a batch, those that the cache has included, and the arguments for them.

    For versions of transformers that leave this to attention, and give it the cache: 4.57 to 5.20.
    """
    cache, kwargs = kwargs["cache"], {name: given for name, given in kwargs.items() if name != "cache"}
    if "read_index" not in kwargs:
        raise NotImplementedError(
            f"{original_class(module).__name__} has a cache that expressive attention does not know"
        )
    given = inspect.signature(cache.update).parameters.get("kwargs")
    if given is not None and given.kind is not given.VAR_KEYWORD:  # it chooses from the arguments what the layer needs
        key, value = cache.update(key, value, module.layer_idx, kwargs=kwargs)
    else:
        indices = {name: kwargs[name] for name in ("read_index", "write_index")}
        key, value = (x.transpose(0, 1).unsqueeze(0) for x in cache.update(key, value, module.layer_idx, **indices))
    kind = "sliding_attention" if kwargs.get("sliding_window") is not None else "full_attention"
    starts = kwargs["cu_seq_lens_k"]
    kwargs["cu_seq_lens_k"] = starts[kind] if isinstance(starts, dict) else starts  # of layers of several kinds
    return key, value, {name: given for name, given in kwargs.items() if name not in ("max_length_q", "max_length_k")}


def allow(names: Collection[str]) -> None:
    """Let continuous batching take these implementations, where it has a list of those that it takes."""
    try:
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    except ImportError:  # a version without it
        return
    manager: Any = ContinuousBatchingManager
    plain = getattr(manager, "switch_to_cb_friendly_attn", None)
    if plain is None:
        return

    @wraps(plain)
    def switch(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        # It would exchange them for flash attention where there is one.
        return None if model.config._attn_implementation in names else plain(self, model, *args, **kwargs)

    manager.switch_to_cb_friendly_attn = switch
