"""Fixtures that the tests of the study share."""

import base64

import pytest

from tests.study.runs.workers import forked_workers

EMPTY = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True)
def _pictures_are_empty(request, monkeypatch):
    """Reports are written with empty pictures, whose rendering takes most of their time, but for the marker `pictures`.

    Fixtures of modules and processes of their own render them, too.
    """
    if request.node.get_closest_marker("pictures") is None:
        from expressive_attention.study.report import files

        monkeypatch.setattr(files, "png", lambda figure: EMPTY)


@pytest.fixture(autouse=True)
def _workers_start_at_once():
    """Not those of fixtures of modules, nor of a study in a process of its own."""
    with forked_workers():
        yield
