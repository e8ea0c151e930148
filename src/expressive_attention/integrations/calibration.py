"""From weights that were trained with softmax to expressive attention: bring scores to where it has gradient.

    z = gain_h * scale * q . k

Softmax is used to scores of any size. The slope of f(z) = z^2 / (1 + z^2), d log f / d log z = 2 / (1 + z^2), vanishes
where |z| is large: all keys weigh the same, and none can be preferred. A gain per head that brings the root mean square
of z to about 1 puts it where f is neither saturated nor its leading order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Call
from .conversion import Conversion, record_choice
from .scores import scores_of, tell_calls
from .switching import GAIN
from .table import Table

__all__ = ["Calibration", "Spread", "calibrate", "spread"]


@dataclass(frozen=True)
class Spread:
    """How large the scores of a layer are on some data, over the pairs of query and key that its mask leaves.

    Attributes:
        root_mean_square: Its value for z, per head ``(H,)``.
        saturated: Share of pairs with |z| > 3, per head ``(H,)``: f is at least 0.9 there.
        dtype: Data type of the queries.
    """

    root_mean_square: Tensor
    saturated: Tensor
    dtype: torch.dtype


class Calibration(Table):
    """The gains that a model was given. Printed, it is a table of the scores before and after.

    Attributes:
        gains: The gain ``(H,)`` of each layer, a parameter of the layer named ``expressive_gain``.
        before: Scores of each layer without them.
        after: Scores with them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        before: dict[str, Spread],
        after: dict[str, Spread],
        old: dict[str, Tensor | None],
    ) -> None:
        self._model, self._layers, self._old = model, dict(layers), old
        self.before, self.after = before, after
        self.gains: dict[str, Tensor] = {name: getattr(module, GAIN) for name, module in layers.items()}

    def undo(self) -> None:
        """Give the layers back the gains that they had, or none."""
        for name, module in self._layers.items():
            if (old := self._old[name]) is None:
                module._parameters.pop(GAIN, None)
            else:
                getattr(module, GAIN).data.copy_(old)
        record_choice(self._model)

    def __str__(self) -> str:
        rows = [("layer", "gain", "rms of z before", "after", "|z| > 3 before", "after")]
        for name, gain in self.gains.items():
            before, after = self.before[name], self.after[name]
            rows.append((
                name or "(the model)", _range(gain), _range(before.root_mean_square), _range(after.root_mean_square),
                f"{before.saturated.mean():.0%}", f"{after.saturated.mean():.0%}",
            ))  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _range(values: Tensor) -> str:
    low, high = values.detach().min().item(), values.detach().max().item()
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def calibrate(conversion: Conversion, batches: Iterable[Any], *, target: float = 1.0, rounds: int = 2) -> Calibration:
    """Give each head of a switched model the gain that brings the root mean square of its scores z to `target`.

    The gains become parameters of the layers, named ``expressive_gain``: they are trained, moved and saved with them.
    A head whose scores are all zero, as with zero-initialized projections, keeps its gain.

    Args:
        conversion: The conversion that `convert` returned.
        batches: Inputs of the model, on its device: a tensor, a tuple of positional or a mapping of named arguments
            each. A few are enough.
        target: Root mean square of z that is aimed at.
        rounds: How often all gains are set; those of a layer change what the next one is given.

    Returns:
        The gains, and the scores before and after.

    Raises:
        ValueError: There are no batches, `target` or `rounds` is not positive, or a layer is not reached.

    Example:
        >>> import torch
        >>> from expressive_attention.integrations import convert
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> calibration = calibrate(convert(model), [torch.randn(3, 7, 16)])
        >>> calibration.after["self_attn"].root_mean_square.round(decimals=2)
        tensor([1., 1.])
    """
    if not target > 0:
        raise ValueError(f"target must be positive, got {target}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    inputs = list(batches)
    layers = conversion.modules(conversion.switched)
    before = spread(conversion, inputs)
    old = {
        name: None if (gain := getattr(module, GAIN, None)) is None else gain.detach().clone()
        for name, module in layers.items()
    }
    now = before
    for _ in range(rounds):
        for name, module in layers.items():
            size = now[name].root_mean_square
            factor = torch.where(size > 0, target / size, 1.0)
            if getattr(module, GAIN, None) is None:
                module.register_parameter(GAIN, nn.Parameter(factor.to(now[name].dtype)))
            else:
                getattr(module, GAIN).data.mul_(factor)
        now = spread(conversion, inputs)
    record_choice(conversion.model)
    return Calibration(conversion.model, layers, before, now, old)


@torch.no_grad()
def spread(conversion: Conversion, batches: Sequence[Any]) -> dict[str, Spread]:
    """The size of the scores of each switched layer on some inputs; arguments as in `calibrate`.

    Raises:
        ValueError: There are no batches, or a layer is not reached.
    """
    layers = conversion.modules(conversion.switched)
    sums: dict[str, list[Tensor]] = defaultdict(list)
    dtypes: dict[str, torch.dtype] = {}

    def told(layer: str, call: Call) -> None:
        sums[layer].append(_sums(call))
        dtypes[layer] = call.query.dtype

    tell_calls(conversion.model, layers, batches, told)
    found = {}
    for name in layers:
        squares, saturated, count = torch.stack(sums[name]).sum(0)
        found[name] = Spread((squares / count).sqrt().float(), (saturated / count).float(), dtypes[name])
    return found


def _sums(call: Call) -> Tensor:
    """Sum of z^2, number of |z| > 3, and number of pairs that the mask leaves, ``(3, H)`` in float64."""
    total = torch.zeros(3, call.query.shape[1], dtype=torch.float64, device=call.query.device)
    for z, keep in scores_of(call):
        z = z.where(keep, 0.0)
        total += torch.stack([part.double().sum((0, 2, 3)) for part in (z.square(), z.abs() > 3, keep)])
    return total
