"""Worker processes that start at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from expressive_attention.study.runs.engines import local
from tests.processes import forking


@contextmanager
def forked_workers() -> Iterator[None]:
    """Workers of `LocalEngine` are forked from a process that has imported what they need, inside of the block.

    Outside, each imports torch for itself, which takes longer than the studies of the tests.
    """
    context = forking()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "multiprocessing", SimpleNamespace(get_context=lambda method: context))
        yield
