"""Each rank takes all tokens of some heads: two exchanges, and a call as on one machine between them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..functional import expressive_attention
from ..varlen import expressive_attention_varlen
from .links import Links
from .moving import Heads, by_heads, by_tokens
from .orders import Shards

__all__ = ["all_to_all"]


def all_to_all(
    links: Links, shards: Shards, tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output ``(B, Hq, L_rank, Ev)`` and N ``(B, Hq, L_rank)``.

    Args:
        links: The ranks.
        shards: Which tokens each rank has.
        tensors: Query, key and value of this rank's tokens.
        options: Arguments of `expressive_attention`; ``attn_mask`` has the rows of this rank, ``log_decay`` its keys.
    """
    query, key, value = tensors
    heads, kv_heads = query.shape[1], key.shape[1]
    of_queries = Heads.of_queries(heads, links.ranks)
    of_keys = of_queries.of_keys(heads, kv_heads)
    given, sharded = [query, key, value], [of_queries, of_keys, of_keys]
    start, stop = of_queries.ranges[links.rank]
    options = {name: x for name, x in options.items() if x is not None}
    mask, decay, slopes = (options.pop(name, None) for name in ("attn_mask", "log_decay", "alibi_slopes"))
    if mask is not None and mask.shape[-2] != 1:
        given.append(mask.expand(-1, heads if mask.shape[1] > 1 else links.ranks, -1, -1))
        sharded.append(of_queries if mask.shape[1] > 1 else Heads.of_queries(links.ranks, links.ranks))
    if decay is not None:
        given.append(decay.unsqueeze(-1))
        sharded.append(of_queries if decay.shape[1] == heads else of_keys)
    query, key, value, *rest = by_heads(links, shards, given, sharded)
    if mask is not None:
        if mask.shape[-2] != 1:
            mask = rest.pop(0)
        elif mask.shape[1] > 1:
            mask = mask[:, start:stop]
        options["attn_mask"] = mask
    if decay is not None:
        options["log_decay"] = rest.pop(0).squeeze(-1)
    if slopes is not None:
        options["alibi_slopes"] = slopes[..., start:stop]
    if query.shape[1] % key.shape[1] or (start % (heads // kv_heads) and key.shape[1] > 1):
        # A group of heads is cut: each head of queries gets its own copy.
        read = torch.arange(start, stop, device=key.device) // (heads // kv_heads) - of_keys.ranges[links.rank][0]
        key, value = key[:, read], value[:, read]
        if decay is not None and decay.shape[1] != heads:
            options["log_decay"] = options["log_decay"][:, read]
    if len(shards.lengths) == 1:
        output, normalizer = expressive_attention(query, key, value, enable_gqa=True, return_normalizer=True, **options)
    else:
        output, normalizer = _packed(shards, query, key, value, options)
    results = [output, normalizer.unsqueeze(-1)]
    output, normalizer = by_tokens(links, shards, results, [of_queries, of_queries])
    return output, normalizer.squeeze(-1)


def _packed(
    shards: Shards, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The same of packed sequences, whose batch dimension is 1."""
    starts = torch.tensor([0, *itertools.accumulate(shards.lengths)], device=query.device, dtype=torch.int32)
    decay, slopes = options.get("log_decay"), options.get("alibi_slopes")
    decay = None if decay is None else decay.squeeze(0).transpose(0, 1)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    output, normalizer = expressive_attention_varlen(
        query, key, value,
        starts, starts, max(shards.lengths), max(shards.lengths), options.get("dropout_p", 0.0), options.get("scale"),
        options.get("is_causal", False), options.get("window_size", (-1, -1)),
        alibi_slopes=None if slopes is None else slopes[0], log_decay=decay,
        form=options.get("form", "expressive"), return_normalizer=True, backend=options.get("backend"),
    )  # fmt: skip
    return output.transpose(0, 1).unsqueeze(0), normalizer.unsqueeze(0)
