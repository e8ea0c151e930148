"""A cache of transformers whose layers keep a state of constant size in the place of keys and values.

A layer of a model hands its keys to the cache, and what it gets back to attention. A `StateLayer` gives back the new
keys alone, with a note (`STATE`) of how to attend to all that came before. So the state moves on in attention, which
has the queries. Masks are of the new keys alone, unless other layers of the cache grow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..call import accumulation_dtype
from ..recurrent import SquaredState
from .errors import ConversionError

__all__ = ["STATE", "SquaredCache", "StateLayer"]

# The attribute of new keys that holds the method of the layer by which they are attended to.
STATE = "_expressive_state"

# Whether `crop` is given the number of tokens to remove, and not that of tokens to keep, as in transformers 4.
_CROP_COUNTS_REMOVED = hasattr(CacheLayerMixin, "is_croppable")


class StateLayer(CacheLayerMixin):
    """The part of a layer in a `SquaredCache`.

    Attributes:
        state: Its `SquaredState`; None before the first use.
        length: Number of tokens seen, padding included.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.state: SquaredState | None = None
        self.length = 0
        self.is_initialized = False
        self._kept: Tensor | None = None  # how many tokens of each example are not padding, (B, 1, 1)
        self._waits = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Make an empty state for keys and values of these shapes."""
        value_states = key_states if value_states is None else value_states
        batch, heads, _, dim = key_states.shape
        dtype = accumulation_dtype(key_states.dtype)
        self.state = SquaredState(batch, heads, dim, value_states.shape[-1], device=key_states.device, dtype=dtype)
        self._kept = torch.zeros(batch, 1, 1, dtype=torch.int64, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """New keys and values as they are, with a note for attention."""
        if self._waits:
            raise ConversionError(
                "a layer has not attended to its state: its attention is no longer that of the form 'squared', or the "
                "model changes keys after they went to the cache; use the cache that the model makes by itself"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._waits = True
        key_states = key_states.view_as(key_states)  # an object of its own
        setattr(key_states, STATE, self.attend)
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Causal attention ``(B, Hq, T, Ev)`` of the new tokens.

        Args:
            query: ``(B, Hq, T, E)``.
            key: ``(B, H, T, E)``.
            value: ``(B, H, T, Ev)``.
            mask: ``(B | 1, 1, T, S)``, S at least T: causality, and which tokens are padding. None: none are.

        Raises:
            ValueError: The mask hides something else, or there is another number of examples than before.
        """
        assert self.state is not None
        assert self._kept is not None
        tokens = key.shape[2]
        kept = torch.full_like(self._kept, tokens)
        if mask is not None:
            keep = _not_padding(mask, tokens, self._kept)
            kept = keep.sum(-1, keepdim=True)
            # A key of zeros has no weight.
            key, value = (x.masked_fill(~keep.unsqueeze(-1), 0.0) for x in (key, value))
        output = self.state.extend(query, key, value)
        self._kept = self._kept + kept
        self.length += tokens
        self._waits = False
        return output

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the keys that attention is given: the new ones."""
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), self.length

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.length

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other examples, as beam search asks for it."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these examples alone."""
        if self.state is not None and self._kept is not None:
            self.state, self._kept = self.state.reorder(indices.to(self._kept.device)), self._kept[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each example."""
        if self._kept is not None:
            every = torch.arange(self._kept.shape[0], device=self._kept.device)
            self.batch_select_indices(every.repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """Refuse to take tokens back.

        Raises:
            ValueError: There are tokens to remove.
        """
        if (tokens == 0) if _CROP_COUNTS_REMOVED else (tokens >= self.length):
            return
        raise ValueError(
            "a state of constant size cannot take tokens back, as assisted generation asks for; use the cache that the "
            "model makes by itself"
        )


class SquaredCache(Cache):
    """A cache of layers, some of which are `StateLayer`; `huggingface.squared_cache` makes it.

    Args:
        layers: One for each layer of the model.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask is for: layers share it, so those that grow decide."""
        if isinstance(self.layers[layer_idx], StateLayer):
            growing = (i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer)
            layer_idx = next(growing, layer_idx)
        return super().get_mask_sizes(query_length, layer_idx)

    @property
    def nbytes(self) -> int:
        """Bytes that states, keys and values take."""
        kept = [getattr(layer, name, None) for layer in self.layers for name in ("keys", "values", "state")]
        return sum(x.nbytes for x in kept if x is not None)


def _not_padding(mask: Tensor, tokens: int, before: Tensor) -> Tensor:
    """Which of the new tokens are not padding, ``(B | 1, 1, T)``.

    Raises:
        ValueError: The mask says more than causality and padding.
    """
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not ((mask == 0) | hidden).all():
            raise ValueError("attention_mask must hide keys or leave them as they are: a state has no biases")
        mask = ~hidden
    if mask.shape[1] != 1:
        raise ValueError(f"attention_mask must be the same for all heads of a state, got {mask.shape[1]} of them")
    own = mask[..., -tokens:]
    keep = own.diagonal(dim1=-2, dim2=-1)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    wrong = (own != (causal & keep.unsqueeze(-2))).any(-1)
    if mask.shape[-1] > tokens:
        wrong = wrong | (mask[..., :-tokens].sum(-1) != before)
    if (wrong & keep).any():
        raise ValueError(
            "attention_mask must be causal, and hide padding alone: a state holds all tokens that came before"
        )
    return keep
