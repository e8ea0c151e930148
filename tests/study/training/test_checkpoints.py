import math
import os

import pytest
import torch

from expressive_attention.study.training import checkpoints
from expressive_attention.study.training.checkpoints import Checkpoint, CheckpointFile

TENSORS = {
    "kept/a.weight": torch.arange(12, dtype=torch.float32).view(3, 4) / 7,
    "step/a.weight": torch.tensor(17.0),
    "other": torch.tensor([[1 << 60, -1]]),
}
STATE = {"steps": 30, "numbers": [0.1, 1e-300, -math.inf], "bits": [2**64 - 1, 2**53 + 1], "none": None}


@pytest.fixture
def notes():
    return []


@pytest.fixture
def file(tmp_path, notes):
    made = CheckpointFile(tmp_path / ".checkpoint-abc", "abc", notes.append)
    made.write(Checkpoint(TENSORS, STATE))
    assert notes == []
    return made


def test_what_is_written_is_read(file, notes):
    tensors, state = file.read()
    assert tensors.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (x.dtype, x.shape)
        assert torch.equal(tensors[name], x)
    assert STATE.items() <= state.items()
    assert notes == []


def test_the_next_one_takes_the_place_of_the_last(file):
    file.write(Checkpoint({"other": torch.ones(2)}, {"steps": 40}))
    assert list(file.path.parent.iterdir()) == [file.path]
    tensors, state = file.read()
    assert (list(tensors), state["steps"]) == (["other"], 40)


def test_nothing_is_read_where_nothing_was_written(tmp_path, notes):
    assert CheckpointFile(tmp_path / "nothing", "abc", notes.append).read() is None
    assert notes == []


def damaged(content, how):
    middle = content.index(b"__metadata__")
    changed = {"metadata": content.index(b"numbers") + 15, "tensor": len(content) - 3, "header": middle + 2}
    if how in changed:
        place = changed[how]
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    return {"empty": b"", "short": content[:-20], "half": content[: middle + 60], "text": b"not a checkpoint" * 20}[how]


@pytest.mark.parametrize("how", ["empty", "short", "half", "text", "metadata", "tensor", "header"])
def test_a_damaged_file_is_named_removed_and_never_read(file, notes, how):
    file.path.write_bytes(damaged(file.path.read_bytes(), how))
    assert file.read() is None
    assert len(notes) == 1
    assert notes[0].startswith(f"{file.path} is corrupt (")
    assert notes[0].endswith("; the cell is trained from its start")
    assert "\n" not in notes[0]
    assert not file.path.exists()


@pytest.mark.parametrize(
    ("key", "value"), [("identity", "xyz"), ("format", 0), ("torch", "1.0"), ("processor", "Z80"), ("threads", 99)]
)
def test_a_file_of_other_circumstances_is_named_and_not_gone_on_from(file, notes, key, value):
    other = CheckpointFile(file.path, "abc", notes.append)
    here, other.about[key] = other.about[key], value
    other.write(Checkpoint(TENSORS, STATE))
    assert file.read() is None
    assert notes == [f"{file.path} is of {key} {value}, not {here}; the cell is trained from its start"]
    assert not file.path.exists()


def test_a_file_that_cannot_be_written_is_named_and_the_one_before_stays(file, notes, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        file.write(Checkpoint({}, {"steps": 40}))
    assert notes == [f"{file.path} cannot be written: No space left on device; the training goes on without it"]
    assert list(file.path.parent.iterdir()) == [file.path]
    assert file.read().state["steps"] == 30


def test_it_is_due_when_its_time_has_passed_since_the_last(tmp_path, notes, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    file = CheckpointFile(tmp_path / "file", "abc", notes.append, seconds=60)
    seen = []
    for now[0] in (1000.0, 1059.9, 1060.0):
        seen.append(file.is_due)
    file.write(Checkpoint(TENSORS, STATE))
    for now[0] in (1119.9, 1120.0):
        seen.append(file.is_due)
    assert seen == [False, False, True, False, True]
