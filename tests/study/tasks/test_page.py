"""The page of tasks says what the code does."""

import re
from pathlib import Path

import pytest

from expressive_attention.study.tasks import TASKS

PAGE = Path(__file__).parents[3] / "docs" / "tasks.md"
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("kind", TASKS)
def test_every_kind_is_on_the_page(kind):
    if TASKS[kind].__module__.startswith("expressive_attention."):
        assert f"`{kind}`" in PAGE.read_text()


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_key_is_there_with_its_default(kind):
    keys = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", SECTIONS[kind], re.MULTILINE))
    fields = {name: field for name, field in TASKS[kind].model_fields.items() if name != "kind"}
    assert set(keys) == set(fields)
    for name, field in fields.items():
        if field.is_required():
            assert keys[name] in ("required", "number of coefficients")  # a delay may follow from them
        elif field.default is not None:  # else the words say from what it follows
            default = field.default
            written = "[" + ", ".join(f'"{x}"' for x in default) + "]" if isinstance(default, tuple) else default
            written = str(written).lower() if isinstance(written, bool) else str(written)  # as in TOML
            assert keys[name].strip("`").strip('"') == written
