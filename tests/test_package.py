"""The package imports its public names when they are first asked for."""

import subprocess
import sys

import pytest

import expressive_attention
from expressive_attention import functional, integrations, varlen


def fresh(code):
    """The text that a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_torch_is_imported_with_the_first_name():
    assert fresh(
        "import sys, expressive_attention as package; print('torch' in sys.modules);"
        "package.expressive_attention; print('torch' in sys.modules)"
    ) == "False\nTrue\n"  # fmt: skip


def test_the_names_are_what_they_say():
    assert expressive_attention.expressive_attention is functional.expressive_attention
    assert expressive_attention.expressive_attention_varlen is varlen.expressive_attention_varlen
    assert expressive_attention.convert is integrations.convert
    assert expressive_attention.calibrate is integrations.calibrate
    assert fresh("import expressive_attention as package; print(package.nn.SelfAttention.__module__)") == (
        "expressive_attention.nn.attention\n"
    )
    assert fresh("from expressive_attention import *; print(nn.__name__, callable(expressive_attention))") == (
        "expressive_attention.nn True\n"
    )


def test_all_names_are_listed_before_they_are_imported():
    listed = fresh("import expressive_attention as package; print(*dir(package))").split()
    assert {*expressive_attention.__all__, "__version__"} <= set(listed)


def test_sources_that_are_not_installed_run():
    code = """
import importlib.metadata as metadata
def missing(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = missing
import expressive_attention as package
print(package.__version__)
"""
    assert fresh(code) == "0+unknown\n"


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'expressive_attention' has no attribute 'softmax'"):
        expressive_attention.softmax  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'softmax'"):
        from expressive_attention import softmax  # noqa: F401


def test_torch_compile_meets_a_name_that_was_not_imported():
    assert fresh(
        "import torch, expressive_attention as package; q = torch.randn(1, 2, 4, 8);"
        "f = torch.compile(lambda q: package.expressive_attention(q, q, q), fullgraph=True, backend='eager');"
        "print(torch.equal(f(q), package.expressive_attention(q, q, q)))"
    ) == "True\n"  # fmt: skip
