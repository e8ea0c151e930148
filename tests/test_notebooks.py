"""The notebooks of the documentation run, and show what they give."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.integrations.torchvision_stub import make_importable

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)
make_importable()

# The purpose of a notebook has to come true on every machine, also where its numbers vary.
OUTCOMES = {
    "convert": [r"EA ran in 2/2 layers", r"undone, the same: True", r"same logits: True"],
    "five_minutes": [
        *(r"rope +EA .* solved [34] of 4", r"rope +DPA .* solved [01] of 4"),
        *(r"learned +EA .* solved [012] of 4", r"learned +DPA .* solved [34] of 4"),
    ],
    "twins": [
        *(r"antiparallel", r"DPA: .*\n +attention on a target with z < 0: 0.00, with z > 0: 0.[789]"),
        *(r"EA: 1.93 bits per byte", r"DPA: 1.94 bits per byte", r"blocks.1.attention.head.0 +expressive +0.86"),
    ],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("path", notebooks.paths(), ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_gives(path):
    if path.stem == "convert":
        pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    notebook = notebooks.read(path)
    fresh = notebooks.run(notebook)
    assert list(notebooks.differences(notebook, fresh)) == []
    told = "".join(text for outputs in fresh for output in outputs for text in output.get("text", ()))
    for outcome in OUTCOMES[path.stem]:
        assert re.search(outcome, told), outcome


@pytest.mark.parametrize("path", notebooks.paths(), ids=lambda path: path.stem)
def test_a_notebook_is_light_and_can_be_read_by_everyone(path):
    assert path.stat().st_size < 200_000
    for cell in notebooks.code_cells(notebooks.read(path)):
        pictures = [output for output in cell["outputs"] if "image/svg+xml" in output.get("data", {})]
        assert not pictures or cell["metadata"]["alt"]
    page, pictures = notebooks.markdown(notebooks.read(path), path.stem)
    assert page.startswith("# ")
    assert f"[download it]({path.stem}.ipynb)" in page
    assert all(f"]({name})" in page for name in pictures)


def cell(text, *tags):
    return {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": ["x"], "outputs": [printed(text)]}


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": [text]}


@pytest.mark.parametrize(
    ("old", "new", "tags", "count"),
    [
        ("loss 1.00", "loss 1.01", (), 0),
        ("loss 1.00", "loss 1.30", (), 1),
        ("loss 1.00", "loss 1.30", ("varies",), 0),
        ("loss 1.00", "Loss 1.00", ("varies",), 1),
        ("50%", "51%", (), 0),
        ("50%", "60%", (), 1),
        ("a b", "a b 3", (), 1),
    ],
)
def test_what_has_changed_is_noticed(old, new, tags, count):
    assert len(list(notebooks.differences({"cells": [cell(old, *tags)]}, [[printed(new)]]))) == count


def test_outputs_are_those_that_jupyter_shows():
    class Table:
        def __repr__(self):
            return "table"

        def _repr_html_(self):
            return "<b>table</b>"

    source = "print('a')\nimport matplotlib.pyplot as plt\n_ = plt.plot([1, 2])\ntable"
    found = notebooks._outputs(source, {"table": Table()}, 1)
    assert [output["output_type"] for output in found] == ["stream", "display_data", "execute_result"]
    assert found[0]["text"] == ["a\n"]
    assert "<svg" in "".join(found[1]["data"]["image/svg+xml"])
    assert found[2]["data"] == {"text/plain": ["table"], "text/html": ["<b>table</b>"]}
