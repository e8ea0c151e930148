"""Records of `capture`: statistics of each head, and queries and keys of some tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..call import Call
from ..integrations.table import Table
from . import measures

__all__ = ["ANGLES", "MEASURES", "SHARES", "SIZES", "LayerRecord", "Record"]

# Edges of the histograms: cos of the angle of query and key, and log2 of scale |q| |k|.
ANGLES = torch.linspace(-1, 1, 65, dtype=torch.float64)
SIZES = torch.linspace(-8, 8, 33, dtype=torch.float64)

# Measures of a head, by column of a table.
MEASURES = {
    "antiparallel": "share of attention on keys with z < 0",
    "effective_keys": "number of keys that a query attends to: exp of the entropy, mean over queries",
    "evenness": "effective keys over visible keys: 1 for a head that does not distinguish keys",
    "sink": "share of attention on the first key, over queries that also see other keys",
    "saturated": "share of pairs whose score hardly affects attention",
    "score_rms": "root mean square of z",
    "log_normalizer": "ln N, mean over queries",
    "empty": "share of queries without any weight",
    "dead": "1 for a head that does not distinguish keys: evenness above 0.99, or no weight at all",
    "query_norm": "|q|, mean over tokens",
    "key_norm": "|k|, mean over tokens",
    "query_dimensions": "participation ratio of queries",
    "key_dimensions": "participation ratio of keys",
    "query_rank": "numerical rank of queries",
    "key_rank": "numerical rank of keys",
    "quiet_volume": "share of directions in which a key of typical length would have < 1/10 of its largest weight",
}
SHARES = ["antiparallel", "evenness", "sink", "saturated", "empty", "dead", "quiet_volume"]  # those from 0 to 1


class LayerRecord:
    """Record of one layer. Histograms and sums are in float64, over all calls.

    Attributes:
        name: Name of the module that attends, such as ``"layers.3.attention"``.
        form: ``"expressive"``, ``"squared"`` or ``"softmax"``.
        scale: Factor on the dot product.
        pairs: Number of pairs of query and key by cos and size ``(H, 64, 32)``; the edges are `ANGLES` and `SIZES`.
        mass: Attention of these pairs, of the same shape.
        sums: Other sums by name, ``(H,)`` or ``(H, E, E)``.
        query: Kept queries ``(B, H, L, E)``, as the mechanism receives them: after positions and gains.
        key: Kept keys ``(B, Hkv, S, E)``.
        keep: True where a key takes part, broadcastable to ``(B, H, L, S)``; None if all do.
        bias: Bias in log-weight space, broadcastable to ``(B, H, L, S)``; None if there is none.
    """

    def __init__(self, name: str) -> None:
        self.name, self.form, self.scale = name, "", 0.0
        self.pairs = self.mass = torch.zeros(0)
        self.sums: dict[str, Tensor] = {}
        self.query = self.key = torch.zeros(0)
        self.keep: Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def _shown(self) -> str:
        return self.name or "the model itself"

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.pairs.shape[0]

    @property
    def dim(self) -> int:
        """Dimension E of queries and keys."""
        return self.query.shape[-1]

    def head_name(self, head: int) -> str:
        """Name of a head, such as ``"layers.3.attention.head.5"``."""
        return f"{self.name}.head.{head}".lstrip(".")

    # ---- adding ----

    @torch.no_grad()
    def add(self, call: Call, pairs: int, max_tokens: int, generator: torch.Generator) -> None:
        """Add a call; `pairs` and `max_tokens` are those of `capture`.

        Raises:
            ValueError: The batch is empty, values are not finite, or the call does not match earlier ones.
        """
        q, k = call.query.detach(), call.key.detach()
        if not (q.shape[0] and q.shape[2] and k.shape[2]):
            raise ValueError(
                f"the batch must not be empty, but {self._shown} was given queries {tuple(q.shape)} and keys "
                f"{tuple(k.shape)}"
            )
        for name, x in (("queries", q), ("keys", k), ("values", call.value)):
            if not torch.isfinite(x).all():
                raise ValueError(f"{name} of {self._shown} hold NaN or infinity")
        if not self.form:
            self.form, self.scale = call.form, call.scale
            self.pairs = torch.zeros(q.shape[1], len(ANGLES) - 1, len(SIZES) - 1, dtype=torch.float64)
            self.mass = torch.zeros_like(self.pairs)
            self._keep_tokens(call, max_tokens)
        elif (call.form, call.scale, q.shape[1], q.shape[3]) != (self.form, self.scale, self.heads, self.dim):
            raise ValueError(
                f"{self._shown} was {self.form} with {self.heads} heads of {self.dim} and scale {self.scale:.4g}, and "
                f"is now {call.form} with {q.shape[1]} of {q.shape[3]} and scale {call.scale:.4g}: the record is of "
                "another model, or the layer makes calls of several kinds"
            )
        self._add_vectors("query", q, None)
        self._add_vectors("key", k.repeat_interleave(q.shape[1] // k.shape[1], 1), _existing_keys(call))
        self._add_pairs(call, max(1, pairs // k.shape[2]), generator)

    def _sum(self, name: str, value: Tensor) -> None:
        value = value.double().cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_vectors(self, name: str, x: Tensor, exist: Tensor | None) -> None:
        count = torch.full((x.shape[1],), x.shape[0] * x.shape[2])
        if exist is not None:
            exist = exist.expand(x.shape[:-1])
            x, count = x * exist.unsqueeze(-1), exist.sum((0, 2))
        x = x.transpose(0, 1).flatten(1, 2).float()
        self._sum(f"{name}_count", count)
        self._sum(f"{name}_norm", x.norm(dim=-1).sum(-1))
        self._sum(f"{name}_moment", x.mT @ x)

    def _add_pairs(self, call: Call, queries: int, generator: torch.Generator) -> None:
        q, k, (batch, rows) = call.query, call.key, _sample(call.query, queries, generator)
        keep, bias = _masks(call, batch, rows)
        q, k = q[batch][:, :, rows].float(), k[batch].float()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        z = call.scale * q @ k.mT
        keep = torch.ones_like(z, dtype=torch.bool) if keep is None else keep.expand_as(z)
        a = measures.attention(z, call.form, bias, keep)
        sizes = abs(call.scale) * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).unsqueeze(-2)
        self._add_histograms(z, sizes, a, keep)
        visible, weighted = keep.sum(-1), a.sum(-1) > 0
        effective = measures.effective_keys(a)
        logs = measures.log_normalizer(z, call.form, bias, keep)
        for name, value in {
            "queries": torch.ones_like(effective),
            "weighted": weighted,
            "visible": visible,
            "attention": a.sum(-1),
            "antiparallel": (a * (z < 0)).sum(-1),
            "effective": effective * weighted,
            "evenness": measures.evenness(effective, visible) * weighted,
            "saturated": (measures.saturated(z, a, call.form) & keep).sum(-1),
            "squares": (z.square() * keep).sum(-1),
            "log_normalizer": logs.where(weighted, 0),
        }.items():
            self._sum(name, value.sum((0, 2)))
        choose = weighted & (visible > 1)  # a query that sees one key has no choice
        self._sum("sink", (a[..., 0] * choose).sum((0, 2)))
        self._sum("later", choose.sum((0, 2)))

    def _add_histograms(self, z: Tensor, sizes: Tensor, a: Tensor, keep: Tensor) -> None:
        heads, angles, steps = self.pairs.shape
        cos = z / sizes.clamp(min=torch.finfo(z.dtype).tiny)
        angle = ((cos + 1) * (angles / 2)).long().clamp(0, angles - 1)
        size = ((sizes.clamp(min=1e-30).log2() + 8) * (steps / 16)).long().clamp(0, steps - 1)
        head = torch.arange(heads, device=z.device).view(1, -1, 1, 1)
        place = ((head * angles + angle) * steps + size).flatten()
        for kept, value in ((self.pairs, keep.to(a.dtype)), (self.mass, a)):
            found = torch.bincount(place, value.flatten(), kept.numel())
            kept += found.double().cpu().view_as(kept)

    def _keep_tokens(self, call: Call, max_tokens: int) -> None:
        rows, keys = call.query.shape[2], call.key.shape[2]
        batch = torch.arange(min(call.query.shape[0], max(1, max_tokens // max(rows, keys))))
        rows, keys = torch.arange(min(rows, max_tokens)), min(keys, max_tokens)
        self.query = call.query[: len(batch), :, : len(rows)].float().cpu().clone()
        self.key = call.key[: len(batch), :, :keys].float().cpu().clone()
        self.keep, self.bias = (
            None if mask is None else mask[..., :keys].cpu().clone() for mask in _masks(call, batch, rows)
        )

    # ---- reading ----

    def scores(self, example: int = 0) -> Tensor:
        """Scores z of a kept example, ``(H, L, S)`` in float32.

        Raises:
            IndexError: The example was not kept; ``max_tokens`` of ``capture`` says how many tokens are.
        """
        if not -len(self.query) <= example < len(self.query):
            raise IndexError(f"example {example}: {len(self.query)} are kept; capture(max_tokens=...) keeps more")
        q, k = self.query[example], self.key[example]
        return self.scale * q @ k.repeat_interleave(len(q) // len(k), 0).mT

    def attention(self, example: int = 0) -> Tensor:
        """Attention of a kept example, ``(H, L, S)`` in float32. For a longer sequence, only kept keys count."""
        keep, bias = (None if m is None else m[min(example, len(m) - 1)] for m in (self.keep, self.bias))
        return measures.attention(self.scores(example), self.form, bias, keep)

    def log_normalizer(self, example: int = 0) -> Tensor:
        """ln N of each query of a kept example, ``(H, L)`` in float32. For a longer sequence, only kept keys count."""
        keep, bias = (None if m is None else m[min(example, len(m) - 1)] for m in (self.keep, self.bias))
        return measures.log_normalizer(self.scores(example), self.form, bias, keep)

    def random_shares(self) -> list[float]:
        """Share of random directions in each bin of `ANGLES`."""
        return [measures.isotropic_share(low, high, self.dim) for low, high in pairwise(ANGLES.tolist())]

    def measures(self) -> dict[str, Tensor]:
        """All `MEASURES` of each head, ``(H,)`` each."""
        s = self.sums
        queries, weighted, pairs = s["queries"], s["weighted"].clamp(min=1), s["visible"].clamp(min=1)
        found = {
            "antiparallel": s["antiparallel"] / s["attention"].clamp(min=1e-300),
            "effective_keys": s["effective"] / weighted,
            "evenness": s["evenness"] / weighted,
            "sink": s["sink"] / s["later"].clamp(min=1),
            "saturated": s["saturated"] / pairs,
            "score_rms": (s["squares"] / pairs).sqrt(),
            "log_normalizer": s["log_normalizer"] / weighted,
            "empty": 1 - s["weighted"] / queries,
        }
        for name in ("query", "key"):
            moment = s[f"{name}_moment"]
            found[f"{name}_norm"] = s[f"{name}_norm"] / s[f"{name}_count"].clamp(min=1)
            found[f"{name}_dimensions"] = measures.participation_ratio(moment)
            found[f"{name}_rank"] = measures.numerical_rank(moment).double()
        usual = abs(self.scale) * found["query_norm"] * found["key_norm"]
        found["quiet_volume"] = torch.tensor(
            [
                measures.quiet_volume(size, self.dim, self.form) if size > 0 and self.dim > 1 else 1.0
                for size in usual.tolist()
            ],
            dtype=torch.float64,
        )
        found["dead"] = measures.dead(found["evenness"], found["empty"]).double()
        return {name: found[name] for name in MEASURES}

    @property
    def dead(self) -> Tensor:
        """Whether heads do not distinguish keys, bool ``(H,)``; see `measures.dead`."""
        return self.measures()["dead"] > 0

    def similarity(self, other: LayerRecord) -> Tensor:
        """How alike its heads attend to those of another layer, ``(H, H')``: `measures.head_similarity` of kept tokens.

        Raises:
            ValueError: The layers read different numbers of tokens.
        """
        examples = range(min(len(self.query), len(other.query)))
        return measures.head_similarity(*(torch.stack([x.attention(i) for i in examples]) for x in (self, other)))


class Record(Table):
    """Record of a model, by the names of its layers. It prints as a table of heads."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerRecord] = {}
        self.model = ""  # its fingerprint

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row per head: its name, layer, index, form and `MEASURES`."""
        for layer in self.layers.values():
            found = layer.measures()
            for head in range(layer.heads):
                row = {"name": layer.head_name(head), "layer": layer.name, "head": head, "form": layer.form}
                yield row | {name: values[head].item() for name, values in found.items()}

    def layer(self, name: str) -> LayerRecord:
        """Return a layer by name.

        Raises:
            ValueError: There is no layer of this name.
        """
        if name not in self.layers:
            raise ValueError(f"layer must be one of {list(self.layers)}, got {name!r}")
        return self.layers[name]

    def check(self, model: nn.Module) -> None:
        """Check that the record is of a model with the same modules and shapes of parameters.

        Raises:
            ValueError: It is not; the message names the layers that the model lacks, if any.
        """
        missing = sorted(set(self.layers) - {name for name, _ in model.named_modules()})
        if missing:
            raise ValueError(f"the record is of another model: {type(model).__name__} has no {', '.join(missing)}")
        if self.model and self.model != _fingerprint(model):
            raise ValueError(
                f"the record is of another model: this {type(model).__name__} has other modules or other shapes of "
                "parameters"
            )

    def of(self, model: nn.Module) -> Record:
        """Return the record itself, marked as one of this model.

        Raises:
            ValueError: The record is of another model; see `check`.
        """
        self.check(model)
        self.model = _fingerprint(model)
        return self

    def save(self, path: str | Path) -> None:
        """Write the record as safetensors.

        Raises:
            OSError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for number, (name, layer) in enumerate(self.layers.items()):
            about[name] = {"form": layer.form, "scale": layer.scale}
            parts = {each: getattr(layer, each) for each in ("pairs", "mass", "query", "key", "keep", "bias")}
            parts |= {f"sums.{key}": value for key, value in layer.sums.items()}
            tensors |= {f"{number}.{key}": value.contiguous() for key, value in parts.items() if value is not None}
        Path(path).write_bytes(save(tensors, {_KEY: json.dumps(about), _MODEL: self.model}))

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record that `save` has written.

        Raises:
            ValueError: The file is not a record.
        """
        record = cls()
        wrong = f"path must be a file that Record.save has written, got {str(path)!r}"
        with ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(str(path), "pt"))
            except SafetensorError as error:
                raise ValueError(f"{wrong}: {error}") from None
            about_all = (file.metadata() or {}).get(_KEY)
            if about_all is None:
                raise ValueError(wrong)
            record.model = file.metadata()[_MODEL]
            for number, (name, about) in enumerate(json.loads(about_all).items()):
                layer = record.layers[name] = LayerRecord(name)
                layer.form, layer.scale = about["form"], about["scale"]
                for key in file.keys():  # noqa: SIM118 not a mapping
                    place, _, part = key.partition(".")
                    if int(place) == number and part.startswith("sums."):
                        layer.sums[part.removeprefix("sums.")] = file.get_tensor(key)
                    elif int(place) == number:
                        setattr(layer, part, file.get_tensor(key))
        return record

    def __str__(self) -> str:
        table = [["head", "form", *_SHOWN]]
        table += [[row["name"], row["form"], *(f"{row[name]:.3g}" for name in _SHOWN)] for row in self.rows()]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        )

    def _repr_html_(self) -> str:
        """The same table for notebooks, with a bar in the cell of each share, and the meaning of each column."""
        heading = "".join(f'<th title="{escape(MEASURES[name])}">{name}</th>' for name in _SHOWN)
        rows = "".join(
            f"<tr><th>{escape(row['name'])}</th><td>{row['form']}</td>"
            f"{''.join(_cell(name, row[name]) for name in _SHOWN)}</tr>"
            for row in self.rows()
        )
        return (
            '<div style="max-height: 30em; overflow: auto"><table><thead><tr><th>head</th><th>form</th>'
            f"{heading}</tr></thead><tbody>{rows}</tbody></table></div>"
        )


# The measures of the table that a record prints.
_SHOWN = ("antiparallel", "effective_keys", "sink", "saturated", "score_rms", "query_dimensions", "quiet_volume")


def _cell(name: str, value: float) -> str:
    """A cell of the table for notebooks; colors that are half transparent suit light and dark ones."""
    filled = f"{100 * value:.0f}%"
    bar = f"background: linear-gradient(90deg, rgba(0, 114, 178, .35) {filled}, transparent {filled})"
    return f'<td style="{bar}">{value:.3g}</td>' if name in SHARES else f"<td>{value:.3g}</td>"


_KEY = "expressive_attention.geometry"
_MODEL = "expressive_attention.geometry.model"


def _fingerprint(model: nn.Module) -> str:
    """Hash of a model's modules and shapes of parameters, whatever their values."""
    parts = [name for name, _ in model.named_modules()]
    parts += [f"{name} {tuple(x.shape)}" for name, x in model.named_parameters()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sample(query: Tensor, queries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose examples and positions of about `queries` queries, or of all if there are no more."""
    batch, rows = query.shape[0], query.shape[2]
    if batch * rows <= queries:
        return torch.arange(batch), torch.arange(rows)
    examples = min(batch, queries)
    positions = min(rows, max(1, queries // examples))
    return (
        torch.randperm(batch, generator=generator)[:examples].sort().values,
        torch.randperm(rows, generator=generator)[:positions].sort().values,
    )


def _masks(call: Call, batch: Tensor, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return, for these examples and rows, where keys take part, and the bias."""
    own = call.visibility.mask_of(rows.to(call.query.device), call.query, call.key)
    own = own[batch] if len(own) > 1 else own
    keep = own if own.dtype == torch.bool else own > -torch.inf
    bias = None if own.dtype == torch.bool else own.float()
    if (relative := call.distance_bias(rows.to(call.query.device))) is not None:
        relative = relative[batch] if len(relative) > 1 else relative
        bias = relative.detach().float() if bias is None else bias + relative.detach()
    if (mask := call.attn_mask) is not None:
        mask = mask[batch] if mask.shape[0] > 1 else mask
        mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
        if mask.dtype == torch.bool:
            keep = keep & mask
        else:
            bias = mask.detach().float() if bias is None else bias + mask.detach()
            keep = keep & _seen(mask)
    return None if keep.all() else keep, bias


def _seen(mask: Tensor) -> Tensor:
    """Where a mask lets keys take part: finfo.min and -inf both mask."""
    return mask if mask.dtype == torch.bool else mask > -1e4


def _existing_keys(call: Call) -> Tensor | None:
    """Keys that some query sees by masks and lengths, ``(B | 1, H | 1, S)``; None if all are seen."""
    keys = call.key.shape[2]
    found = None
    if call.attn_mask is not None:
        found = _seen(call.attn_mask).any(2).expand(-1, -1, keys)
    if call.visibility.key_lengths is not None and call.visibility.query_starts is None:
        existing = torch.arange(keys, device=call.key.device) < call.visibility.key_lengths[:, None, None]
        found = existing if found is None else found & existing
    return found
