"""An interactive page of attention space: one HTML file that needs no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from torch import Tensor

from .figures import NAMES
from .plotly import plotly_script
from .record import ANGLES, MEASURES, SHARES, LayerRecord, Record

__all__ = ["write_page"]


# The parts of the page, from what to look at first: heading and the sentence below it.
_PARTS = {
    "thumbs": ("All heads", "The first 64 tokens at most: queries down, keys across. Click to choose a head."),
    "map": (
        "Attention of the chosen head",
        (
            "Orange: attention to parallel keys (z > 0). Blue: attention to antiparallel keys (z < 0). Values are "
            "shares of the query's largest. Click to choose a query."
        ),
    ),
    "keys": ("The query's keys", "Angle and length of each key. Area: attention. Square and blue: z < 0."),
    "angles": ("Angles", "Shares by the cos of query and key: pairs, attention, and random directions."),
    "heads": ("Measures of all heads", ""),
}


def write_page(
    records: Record | Mapping[str, Record],
    path: str | Path,
    *,
    title: str = "Attention space",
    tokens: Sequence[Sequence[str]] | None = None,
    megabytes: float = 5.5,
) -> Path:
    """Write the page: all heads, maps with the sign of z, each query's keys, angles, and measures of all heads.

    Two of several records are side by side: a head or query that is chosen on one side is chosen on both. The address
    of the page holds all choices, so that a link leads to what is seen.

    The page contains queries and keys of the kept tokens, in 32 bits, or in 8 bits if 32 would exceed `megabytes`. The
    browser computes maps from them, so the page of a long text stays small.

    Args:
        records: A record of `capture`, or several by name, such as EA and DPA of one run.
        path: File to write.
        title: Title of the page.
        tokens: Text of the tokens of each kept example; default: their positions.
        megabytes: Largest size of queries, keys and masks; longer texts are cut to their first tokens, and the page
            says so.

    Returns:
        The path.

    Raises:
        ValueError: There is no record, or a record has no layer.
    """
    named = {"model": records} if isinstance(records, Record) else dict(records)
    if not named or not all(record.layers for record in named.values()):
        raise ValueError("records must hold at least one record, each with layers; got an empty one")
    layers = [layer for record in named.values() for layer in record.layers.values()]
    tokens_kept = max(len(layer.query) * max(layer.query.shape[2], layer.key.shape[2]) for layer in layers)
    exact = _bytes(layers, tokens_kept, 4) <= megabytes * 1e6
    while _bytes(layers, tokens_kept, 4 if exact else 1) > megabytes * 1e6 and tokens_kept > 1:
        tokens_kept = int(tokens_kept * 0.97)
    data = {
        "measures": MEASURES,
        "shares": SHARES,
        "models": [
            {"name": name, "layers": [_layer(layer, tokens_kept, exact) for layer in record.layers.values()]}
            for name, record in named.items()
        ],
        "tokens": [list(example) for example in tokens or []],
        "edges": ANGLES.tolist(),
        "forms": NAMES,
    }
    template = Environment(loader=PackageLoader(__package__ or "", "templates"), autoescape=True).get_template(
        "page.html"
    )
    # "</" would end the script; JSON reads "<\/" as the same.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    sides = min(2, len(named))
    html = template.render(title=title, plotly=plotly_script(), data=Markup(text), parts=_PARTS, sides=sides)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _bytes(layers: Sequence[LayerRecord], tokens: int, width: int) -> int:
    """Bytes of the vectors of `tokens` tokens, at `width` bytes per number, and of their masks."""
    total = 0
    for layer in layers:
        total += tokens * (layer.query.shape[1] + layer.key.shape[1]) * (layer.dim * width + 4)
        for mask, size in ((layer.keep, 1), (layer.bias, 4)):
            if mask is not None and _diagonals(mask) is None:
                b, h, rows, keys = _once(mask).shape
                total += size * b * h * min(tokens, rows) * min(tokens, keys)
    return total


def _layer(layer: LayerRecord, kept: int, exact: bool) -> dict[str, Any]:
    examples = max(1, min(len(layer.query), kept // max(layer.query.shape[2], layer.key.shape[2])))
    query, key = layer.query[:examples, :, :kept], layer.key[:examples, :, :kept]
    keep, bias = (
        None if mask is None else mask[:examples, :, : query.shape[2], : key.shape[2]]
        for mask in (layer.keep, layer.bias)
    )
    return {
        "name": layer.name,
        "form": layer.form,
        "scale": layer.scale,
        "heads": layer.heads,
        "measures": {name: _short(values) for name, values in layer.measures().items()},
        "pairs": [_short(row) for row in layer.pairs.sum(-1)],
        "mass": [_short(row) for row in layer.mass.sum(-1)],
        "random": layer.random_shares() if layer.dim > 1 else None,
        "seen": max(layer.query.shape[2], layer.key.shape[2]),
        "query": _packed(query, exact),
        "key": _packed(key, exact),
        "keep": None if keep is None else _packed_mask(keep.to(torch.uint8)),
        "bias": None if bias is None else _packed_mask(bias.clamp(min=-1e9).float()),
    }


def _packed_mask(mask: Tensor) -> dict[str, Any]:
    """Pack the numbers of a mask ``(B, H, L | 1, S | 1)``, or one per diagonal if each diagonal is constant."""
    mask = _once(mask)
    diagonals = _diagonals(mask)
    numbers = mask if diagonals is None else diagonals
    return {"shape": list(mask.shape), "diagonals": diagonals is not None, "bytes": _base64(numbers)}


def _once(mask: Tensor) -> Tensor:
    """Reduce a mask to one row if all its rows are the same."""
    return mask[..., :1, :] if torch.equal(mask[..., 1:, :], mask[..., :-1, :]) else mask


def _diagonals(mask: Tensor) -> Tensor | None:
    """Values ``(B, H, L + S - 1)`` of a mask that depends only on j - i, from j - i = 1 - L on; else None."""
    if not torch.equal(mask[..., 1:, 1:], mask[..., :-1, :-1]):
        return None
    return torch.cat([mask[..., :, 0].flip(-1), mask[..., 0, 1:]], -1)


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def _packed(x: Tensor, exact: bool) -> dict[str, Any]:
    """Pack vectors as they are, or as 8-bit integers with one factor per vector."""
    if exact:
        return {"shape": list(x.shape), "bytes": _base64(x), "factors": None}
    factor = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    whole = (x / factor).round().to(torch.int8)
    return {"shape": list(x.shape), "bytes": _base64(whole), "factors": _base64(factor.float())}


def _base64(x: Tensor) -> str:
    return base64.b64encode(x.contiguous().numpy().tobytes()).decode()
