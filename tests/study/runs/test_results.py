"""The results of a study whose cells are not all alike."""

import pytest

from expressive_attention.study.config.load import parse_config
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.store import Store, StoreError
from expressive_attention.study.tasks.language import LanguageTask
from expressive_attention.study.training.loop import train_cell
from tests.study.tiny import cell, tiny, tiny_config


def test_the_circumstances_of_all_cells_are_told(tmp_path):
    store = Store(tmp_path / "study")
    store.create(tiny()).release()
    (arm, *_) = tiny_config().arms()
    for threads, made in zip("12", arm.tuning_cells(store), strict=True):
        store.save(made, train_cell(made), {"torch": "2.13.0", "threads": threads})
    assert collect(store).environment == {"torch": "2.13.0", "threads": "1, 2"}


def test_a_study_on_the_texts_of_another_python_says_so(tmp_path, monkeypatch):
    text = tiny(task='{ kind = "language", context = 16 }')
    store = Store(tmp_path / "study")
    store.create(text).release()
    (arm, *_) = parse_config(text, "tiny").arms()
    made = arm.tuning_cells(store)[0]
    store.save(made, train_cell(cell()))
    assert collect(store).seeds.height
    other = LanguageTask.model_dump

    def of_another_python(self, **options):
        return other(self, **options) | {"python": "3.99.0"}

    monkeypatch.setattr(LanguageTask, "model_dump", of_another_python)
    with pytest.raises(StoreError, match=r"none of the study as .*: python '3\.[0-9.]+', now '3\.99\.0'"):
        collect(store)
