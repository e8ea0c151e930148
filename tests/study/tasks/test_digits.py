import itertools
import math
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from expressive_attention.study.config.load import load_config
from expressive_attention.study.errors import ConfigError
from expressive_attention.study.tasks import IGNORED, digits
from expressive_attention.study.tasks.digits import DigitsTask, part
from expressive_attention.study.tasks.rng import stream
from expressive_attention.study.training.loop import train_cell
from tests.budget import threads_of_torch
from tests.study.tiny import cell

PARTS = ("training", "validation", "test")


def read(image, patch):
    """What the model reads of an image: patches row by row, the pixels of each row by row, and the class token."""
    corners = [(top, left) for top in range(0, 8, patch) for left in range(0, 8, patch)]
    rows = [
        [*((image[top + i][left + j] - 4.88) / 6.02 for i in range(patch) for j in range(patch)), 0.0]
        for top, left in corners
    ]
    return np.array([*rows, [*[0.0] * patch**2, 1.0]])


def moved(image, down, right):
    """The image moved by this many pixels, with 0 where nothing came from."""
    return [
        [image[y - down][x - right] if 0 <= y - down < 8 and 0 <= x - right < 8 else 0 for x in range(8)]
        for y in range(8)
    ]


def test_the_parts_are_disjoint_and_cover_everything():
    parts = {purpose: part(purpose).tolist() for purpose in PARTS}
    assert {purpose: len(found) for purpose, found in parts.items()} == {
        "training": 898,
        "validation": 359,
        "test": 540,
    }
    assert sorted(itertools.chain(*parts.values())) == list(range(1797))
    assert [found[:3] for found in parts.values()] == GOLDEN  # on every machine


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("purpose", ["validation", "test"])
def test_held_out_images_are_read_patch_by_patch(purpose, patch):
    task, data = DigitsTask(patch=patch), load_digits()
    examples = task.held_out_examples(50, purpose)
    assert examples.inputs.dtype == np.float32
    for index, inputs, targets in zip(part(purpose), examples.inputs, examples.targets, strict=False):
        assert inputs == pytest.approx(read(data.images[index].tolist(), patch), abs=1e-6)
        assert targets.tolist() == [IGNORED] * (64 // patch**2) + [data.target[index]]
    assert len(task.held_out_examples(10_000, purpose)) == len(part(purpose))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_training_images_are_drawn_and_moved_by_the_stream(shift):
    task, data, count = DigitsTask(shift=shift), load_digits(), 60
    examples = task.training_examples(stream(2, "training"), count)
    raw = [int(x) for x in stream(2, "training").random_raw(3 * count)]
    own, span = part("training"), 2 * shift + 1
    moves = set()
    for i in range(count):
        index, down, right = own[raw[i] % 898], raw[count + i] % span - shift, raw[2 * count + i] % span - shift
        expected = read(moved(data.images[index].tolist(), down, right), 2)
        assert examples.inputs[i] == pytest.approx(expected, abs=1e-6)
        assert examples.targets[i, -1] == data.target[index]
        moves.add((down, right))
    assert len(moves) == span**2 if shift < 2 else len(moves) > span


def test_inputs_are_centred():
    every = np.concatenate([DigitsTask(shift=0).held_out_examples(1000, p).inputs[:, :-1, :-1] for p in PARTS[1:]])
    assert (every.mean(), every.std()) == pytest.approx((0, 1), abs=0.02)


def test_the_facts_against_scikit_learn():
    data, facts = load_digits(), DigitsTask().facts()
    training, test = part("training"), part("test")
    known = KNeighborsClassifier(n_neighbors=1).fit(data.data[training], data.target[training])
    assert facts["nearest_neighbour"] == known.score(data.data[test], data.target[test])
    assert facts["majority"] == max(Counter(data.target[test].tolist()).values()) / 540
    assert (facts["training_images"], facts["complexity"]) == (898, math.log2(898))
    assert (facts["chance"], facts["test_sequences"]) == (0.1, 540)
    assert "copy_last" not in facts
    assert "ceiling" not in facts


def test_accuracy_is_split_by_class():
    task = DigitsTask()
    test = task.held_out_examples(540, "test")
    groups = task.splits(test)["digit"]
    assert (groups[:, :-1] < 0).all()
    assert groups[:, -1].tolist() == load_digits().target[part("test")].tolist()
    assert task.group_name("digit", 7) == "digit 7"


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs scikit-learn: pip install 'expressive-attention\[vision\]'$"):
        load_config("vision")


@pytest.mark.parametrize("wrong", [{"patch": 3}, {"shift": -1}, {"shift": 5}, {"colour": 1}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DigitsTask(**wrong)


def test_a_model_learns_more_than_the_most_frequent_class():
    task = DigitsTask()
    training = {"steps": 150, "batch_size": 32, "evaluate_every": 150, "test_sequences": 540}
    model = {"layers": 2, "embed_dim": 32, "heads": 4, "position": "learned", "norm_affine": True}
    with threads_of_torch(1):
        found = train_cell(cell(seeds=(0,), task=task, model=model, rate=5e-3, **training))
    assert (found.seeds["accuracy"] > 0.25).all(), found.seeds["accuracy"]
    assert found.splits["split"].unique().to_list() == ["digit"]
    assert found.splits["count"].sum() == 540


GOLDEN = [[558, 1048, 1486], [989, 287, 820], [545, 898, 827]]
