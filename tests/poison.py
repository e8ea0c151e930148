"""NaN, infinities and huge biases where they must not matter, and in one place where they do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.budget import Case

# How many numbers before and after each tensor hold NaN: odd, so that vectors of the kernels are not aligned.
MARGIN = 5

# A mask for each of the results selects what is compared; see `Poison.into`.
Selection = dict[str, Tensor]


@dataclass(frozen=True)
class Poison:
    """Numbers that are put into inputs.

    Attributes:
        number: NaN or an infinity. Keys and values that no query sees hold nothing else, nor do queries that see none.
        bias: In a float mask, wherever something other than the mask hides all that an element of it is for.
        seen: Which input holds `number` in one place that is seen: "query", "key", "value", "mask" (there -inf is inf),
            or "nothing".
        seed: The seed of the choice of that place.
    """

    number: float
    bias: float
    seen: str
    seed: int

    def into(self, case: Case) -> tuple[Case, Selection, Tensor]:
        """The case with the poison in it, where its results are still those without, and which rows it spoils.

        Selections have the shapes of the results, rows ``(B, Hq, L)``.
        """
        pattern, visible = case.visibility_bias() > -torch.inf, case.visible()
        query, key, value, mask = case.query, case.key, case.value, case.mask
        groups = query.shape[1] // key.shape[1]
        of_key = _keys_of(visible.any(-2), groups).any(2).unsqueeze(-1)
        query = replaced(query, ~visible.any(-1, keepdim=True), self.number)
        key, value = (replaced(x, ~of_key, self.number) for x in (key, value))
        if mask is not None and mask.is_floating_point():
            mask = replaced(mask, ~_reduced(pattern, mask), self.bias)

        spoiled = torch.zeros_like(visible.any(-1))
        generator = torch.Generator().manual_seed(self.seed)
        target = {"query": query, "key": key, "value": value, "mask": mask}.get(self.seen)
        if target is not None and target.is_floating_point() and target.numel():
            place = torch.zeros(target.shape, dtype=torch.bool, device=target.device)
            place.view(-1)[torch.randint(place.numel(), (), generator=generator)] = True
            place &= target > -torch.inf  # a bias that hides goes on hiding
            target = replaced(target, place, abs(self.number) if self.seen == "mask" else self.number)
            if self.seen == "query":
                query, touched = target, visible & place.any(-1, keepdim=True)
            elif self.seen == "mask":
                mask, touched = target, visible & place
            else:
                of_place = place.any(-1).repeat_interleave(groups, 1).unsqueeze(-2)
                key, value = (target, value) if self.seen == "key" else (key, target)
                touched = visible & of_place
            spoiled = touched.any(-1)

        kept = ~spoiled.unsqueeze(-1)
        kept_keys = ~_keys_of((visible & ~kept).any(-2), groups).any(2).unsqueeze(-1)
        selection = {
            "output": kept.expand(*kept.shape[:-1], value.shape[-1]),
            "normalizer": kept.squeeze(-1),
            "query": kept.expand(query.shape),
            "key": kept_keys.expand(key.shape),
            "value": kept_keys.expand(value.shape),
        }
        relative = case.settings.get("relative_bias")
        if relative is not None:  # of which one number is for many pairs
            selection["relative"] = torch.full(relative.shape, not bool(spoiled.any()))
        if mask is not None:
            selection["mask"] = ~_reduced(visible & ~kept, mask)
        dirty = replace(case, query=query, key=key, value=value, mask=mask, margin=MARGIN, poison=None)
        return dirty, selection, spoiled


def _keys_of(x: Tensor, groups: int) -> Tensor:
    """``(B, Hq, S)`` as ``(B, Hkv, G, S)``."""
    return x.unflatten(1, (x.shape[1] // groups, groups))


def _reduced(pairs: Tensor, mask: Tensor) -> Tensor:
    """Which elements of a mask are for some of the `pairs` ``(B, H, L, S)``."""
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    return pairs.long().sum_to_size(shape).reshape(mask.shape) > 0


def placed(x: Tensor, margin: int) -> Tensor:
    """A copy of x with its strides, and NaN (or True) in all memory between its numbers, and around them."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.new_full((2 * margin + (extent if x.numel() else 0),), torch.nan)
    copy = memory.as_strided(x.shape, x.stride(), margin)
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())
    copy[once] = x[once]
    return copy


def replaced(x: Tensor, where: Tensor, number: float) -> Tensor:
    """x with another number where it says so, in its layout if no two of its elements share their memory."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        return x.masked_fill(where, number)
    copy = placed(x, 0)
    return copy.masked_fill_(where, number)
