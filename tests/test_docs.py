"""The examples of README, docs and docstrings are run."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import expressive_attention
from expressive_attention.study.config.load import parse_config
from tests.integrations.torchvision_stub import make_importable

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


# Modules of `integrations` that need a library which is an extra.
FOR_A_LIBRARY = {
    "huggingface": "transformers",
    "states": "transformers",
    "timm": "timm",
    "diffusers": "diffusers",
    "x_transformers": "x_transformers",
}
make_importable()


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), namespace)


def test_the_readme_shows_the_library():
    assert any("expressive_attention(" in text for text in blocks(ROOT / "README.md", "python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_shown_are_valid(page):
    for text in blocks(page, "toml"):
        if "name" in text:
            assert parse_config(text, page.name).grid


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_commands_are_one_line_each_and_pinned():
    shell = blocks(ROOT / "README.md", "bash")
    assert len(shell) == 2
    assert all(text.count("\n") == 1 and "-c constraints.txt" in text for text in shell)


def modules():
    found = [module.name for module in pkgutil.walk_packages(expressive_attention.__path__, "expressive_attention.")]
    missing = [name for name, library in FOR_A_LIBRARY.items() if find_spec(library) is None]
    return ["expressive_attention", *(name for name in found if name.rpartition(".")[2] not in missing)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_are_right(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_every_public_name_is_documented():
    for name in modules():
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            thing = getattr(module, public)
            if callable(thing):
                thing = getattr(thing, "fn", thing)  # what Triton has made a kernel of
                assert thing.__doc__, f"{name}.{public}"


def test_the_import_needs_torch_alone():
    code = (
        "import sys; from expressive_attention import expressive_attention, expressive_attention_varlen, nn; "
        "heavy = {'numpy', 'polars', 'pydantic', 'scipy', 'matplotlib', 'typer', 'rich'}; "
        "import torch; loaded = heavy & set(sys.modules); "
        "assert not any(m.startswith('expressive_attention.study') for m in sys.modules); "
        "print(sorted(loaded - {'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
