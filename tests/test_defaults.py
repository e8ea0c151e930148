"""The pages say which defaults the code has, all of them and no others."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from expressive_attention.study.config.schema import ModelConfig, SeedsConfig, TrainingConfig
from expressive_attention.study.config.study import StudyConfig
from expressive_attention.study.config.toml import tomllib
from tests.integrations.torchvision_stub import make_importable

DOCS = Path(__file__).parents[1] / "docs"
DIRECTIVE = re.compile(r"^::: expressive_attention\.?(\S*)\n((?: +.*\n)*)", re.MULTILINE)

# Extras that modules of the API need.
LIBRARIES = {"integrations.huggingface": "transformers", "integrations.timm": "timm",
             "integrations.diffusers": "diffusers", "integrations.x_transformers": "x_transformers"}  # fmt: skip


def public():
    """The objects that docs/api.md documents, by their names below `expressive_attention`, methods included."""
    make_importable()
    found = {}
    for path, options in DIRECTIVE.findall((DOCS / "api.md").read_text()):
        thing = _at(path)
        names = re.findall(r"- (\w+)", options) or getattr(thing, "__all__", [])
        things = {f"{path}.{name}": getattr(thing, name) for name in names} if names else {path: thing}
        for name, member in things.items():
            if not callable(member):
                continue
            found[name] = member
            if inspect.isclass(member):
                methods = {key: getattr(member, key) for key in vars(member) if not key.startswith("_")}
                found |= {f"{name}.{key}": method for key, method in methods.items() if callable(method)}
    return found


def _at(path):
    """A module below `expressive_attention`, or what is in one."""
    library = next((library for name, library in LIBRARIES.items() if path.startswith(name)), None)
    if library is not None:
        pytest.importorskip(library, exc_type=ImportError)
    try:
        return importlib.import_module(f"expressive_attention.{path}")
    except ModuleNotFoundError:
        parent, _, name = f"expressive_attention.{path}".rpartition(".")
        return getattr(importlib.import_module(parent), name)


def defaults(thing):
    """Its defaults in the order of its arguments; none where torch or Python define it."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except ValueError:  # an exception
        return {}
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def shown(found):
    return ", ".join(f"`{name}={_quoted(value)}`" for name, value in found.items())


def _quoted(value):
    return f'"{value}"' if isinstance(value, str) else repr(value)


def test_the_page_has_the_defaults_of_the_api():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", (DOCS / "defaults.md").read_text(), re.MULTILINE)
    written = dict(rows)
    assert len(rows) == len(written)
    assert written == {name: shown(found) for name, thing in public().items() if (found := defaults(thing))}


@pytest.mark.parametrize(
    ("section", "config", "in_words"),
    [
        ("At the top:", StudyConfig, {"name": "required"}),
        ("`[model]`, ", ModelConfig, {"rope_base": "max(10, 2 x `context`)"}),
        ("`[training]`:", TrainingConfig, {"gradient_clip": "none", "tuning_steps": "none"}),
        ("`[seeds]`:", SeedsConfig, {}),
    ],
)
def test_the_page_of_the_study_has_the_defaults_of_its_configuration(section, config, in_words):
    table = (DOCS / "study.md").read_text().split(f"\n{section}")[1].split("\n\n")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)
    tables = ("model", "training", "seeds", "grid")  # which the page shows one by one
    older = ("early_stop",)  # of protocol 2, which is read and no longer run
    assert {name for name, _ in rows} == {name for name in config.model_fields if name not in tables + older}
    for name, value in rows:
        default = config.model_fields[name].default
        if name in in_words:
            assert value == in_words[name]
            assert default is None or config.model_fields[name].is_required()
        else:
            default = list(default) if isinstance(default, tuple) else default
            assert tomllib.loads(f"x = {value.strip('`')}")["x"] == default, name
