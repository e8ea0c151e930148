import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_all_pictures_of_a_small_study(run_example, tmp_path):
    """With a fifth of the steps of its training."""
    text = (EXAMPLES / "geometry.py").read_text()
    assert text.count("1500") == 3
    (tmp_path / "geometry.py").write_text(text.replace("200, 500", "100, 200").replace("1500", "300"))
    said = run_example(tmp_path / "geometry.py", "--out", tmp_path / "out")
    assert "blocks.0.attention.head.0  expressive" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"geometry.html", "heads.csv", "landscape.png", "angles_by_step_EA.png", "angles_by_step_DPA.png"} <= names


def test_the_signs_of_targets(run_example):
    said = run_example("signs.py", "--seeds", 2, "--steps", 100).splitlines()
    assert said[0].startswith("EA: ")
    shares = [[float(word) for word in line.split()[2:]] for line in said if "solved  " in line]
    assert len(shares) == 4  # each mechanism at the start and at the end, both seeds unsolved
    assert all(0 < share < 1 and 0 < attention < 1 for share, attention, _ in shares)
    assert [line.split(",")[1].split(":")[0].strip() for line in said if "accuracy" in line] == [
        "whole",
        "without antiparallel",
        "without parallel",
    ]
