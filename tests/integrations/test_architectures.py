"""docs/architectures.md is what docs/architectures.py makes."""

import re
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "architectures.md").read_text(encoding="utf-8")
SAME = f"with transformers {transformers.__version__}:" in TEXT

pytestmark = [
    pytest.mark.skipif(not SAME, reason="the list is of another version of transformers"),
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation", "User")),
]


def listed():
    """The architectures of each group, by the start of its heading, and the number that the heading says."""
    groups = {}
    for found in re.finditer(r"^## ([^\n(]*) \((\d+)\)\n\n(.*?)(?=\n\n|\Z)", TEXT, re.M | re.S):
        lines = found[3].strip().splitlines()
        names = [row.split(" | ")[0].strip("| ") for row in lines[2:]] if len(lines) > 1 else lines[0].split(", ")
        groups[found[1]] = (int(found[2]), names)
    return groups


def test_every_architecture_is_listed_once_and_counted():
    groups = listed()
    assert len(groups) >= 6
    names = [name for _, names in groups.values() for name in names]
    assert sorted(names) == sorted(set(names))
    known = set(transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES)
    assert set(names) <= known
    assert len(names) > 0.95 * len(known)  # of a few, no model is in the mapping
    for said, names in groups.values():
        assert said == len(names)


@pytest.mark.parametrize(
    ("name", "outcome", "group"),
    [
        ("llama", "", "Expressive attention ran in every layer"),
        ("deepseek_v32", "", "Expressive attention ran in every layer"),
        ("clip", "", "Expressive attention ran in every layer"),
        ("bloom", "refused", "Refused by `convert` or by the model"),
        ("gpt_oss", "refused", "Refused by `convert` or by the model"),
    ],
)
def test_the_script_finds_what_the_list_says(name, outcome, group, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(DOCS)])
    import architectures

    config_class = transformers.CONFIG_MAPPING[name]
    assert [*architectures.outcomes(config_class)][-1].partition(":")[0] == outcome
    assert name in listed()[group][1]
