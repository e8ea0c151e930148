"""The names that the code of a module's class refers to: torch's attention, or softmax of its own?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

__all__ = ["SOFTMAX_FUNCTIONS", "attention_like", "names_used", "own_softmax"]

_DEPTH = 3  # of functions that call functions

# Parts of the names of functions that compute softmax, of torch and of libraries of kernels (flash-attn, xformers).
SOFTMAX_FUNCTIONS = re.compile("softmax|flash_att|flex_attention|efficient_attention")


@cache
def names_used(cls: type, depth: int = _DEPTH) -> frozenset[str]:
    """Names that the methods of a class refer to, and the functions of its module that they call, so deep.

    From compiled code, so that classes without source are read, too; the methods of `torch.nn.Module` do not count.
    """
    found: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for member in vars(base).values():
            if isinstance(function := inspect.unwrap(member) if callable(member) else member, FunctionType):
                found |= _of_function(function, depth)
    return frozenset(found)


def _of_function(function: FunctionType, depth: int) -> set[str]:
    found = set(_of_code(function.__code__))
    for name in tuple(found) if depth else ():
        called = function.__globals__.get(name)
        if isinstance(called, FunctionType) and called.__module__ == function.__module__:
            found |= _of_function(called, depth - 1)
    return found


def _of_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)


def attention_like(module: nn.Module) -> bool:
    """Whether a class is named as attention layers are: ``BloomAttention``, ``WindowAttn``."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def own_softmax(cls: type) -> bool:
    """Whether the methods of a class, and not the functions that they call, refer to softmax or torch's attention."""
    return any(
        SOFTMAX_FUNCTIONS.search(name.lower()) or name == "scaled_dot_product_attention" for name in names_used(cls, 0)
    )
