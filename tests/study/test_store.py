import pytest
import torch
from polars.testing import assert_frame_equal

from expressive_attention.study import store as store_module
from expressive_attention.study.store import CorruptCellError, Store, StoreError, choose_setting
from expressive_attention.study.training import train_cell
from tests.study.tiny import TINY, cell


@pytest.fixture(scope="module")
def trained():
    return train_cell(cell(steps=10))


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "study")
    made.create(TINY).release()
    return made


def test_what_is_saved_is_loaded(store, trained):
    assert not store.has(cell())
    store.save(cell(), trained)
    loaded = store.load(cell(), weights=True)
    assert_frame_equal(loaded.seeds, trained.seeds)
    assert_frame_equal(loaded.curves, trained.curves)
    assert all(torch.equal(x, loaded.weights[name]) for name, x in trained.weights.items())


def test_the_machine_and_its_threads_are_kept_and_need_not_be(store, trained):
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        store.save(cell(), trained)
        torch.set_num_threads(before)
        assert store.about(cell())["environment"]["threads"] == str(threads)
    assert store.about(cell())["environment"]["torch"] == torch.__version__
    path = store.path(cell()) / "cell.toml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("threads")))
    assert "threads" not in store.about(cell())["environment"]
    assert_frame_equal(store.load(cell()).seeds, trained.seeds)


def test_a_failure_in_the_middle_leaves_nothing_to_read(store, trained, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        store.save(cell(), trained)
    assert not store.has(cell())
    assert list(store.cells.iterdir())
    store.clean()
    assert not list(store.cells.iterdir())


@pytest.mark.parametrize("name", ["seeds.parquet", "curves.parquet", "weights.safetensors", "cell.toml"])
@pytest.mark.parametrize("how", ["missing", "short", "changed"])
def test_a_damaged_file_is_named_and_never_read(store, trained, name, how):
    store.save(cell(), trained)
    path = store.path(cell()) / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(content[: len(content) // 3])
    elif name == "cell.toml":
        path.write_bytes(content.replace(cell().identity.encode(), b"0" * 16))
    else:
        path.write_bytes(content[:-30] + bytes([content[-30] ^ 1]) + content[-29:])
    with pytest.raises(CorruptCellError, match=name):
        store.load(cell(), weights=True)


def test_folders_that_are_no_study_are_refused(tmp_path, store):
    with pytest.raises(StoreError, match=r"nothing is not a study: it has no config\.toml"):
        Store(tmp_path / "nothing").config()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty and not a study"):
        Store(tmp_path / "full").create(TINY)
    with pytest.raises(StoreError, match="is not a directory"):
        Store(tmp_path / "full" / "thesis.txt").create(TINY)
    lock = store.lock()
    with pytest.raises(StoreError, match="another run is writing"):
        Store(store.directory).lock()
    lock.release()
    Store(store.directory).lock().release()


def test_the_learning_rate_is_the_most_accurate_then_the_fastest(trained):
    import dataclasses

    import polars as pl

    def result(rate, accuracy, steps):
        seeds = trained.seeds.with_columns(accuracy=pl.lit(accuracy), steps=pl.lit(steps, dtype=pl.Int64))
        return cell(rate=rate), dataclasses.replace(trained, seeds=seeds)

    assert choose_setting([result(0.1, 0.9, 5), result(0.2, 0.95, 50)]).learning_rate == 0.2
    assert choose_setting([result(0.1, 0.9, 50), result(0.2, 0.9, 5)]).learning_rate == 0.2
    assert choose_setting([result(0.2, 0.9, 5), result(0.1, 0.9, 5)]).learning_rate == 0.1


def test_equally_accurate_learning_rates_are_equal_in_whatever_order_their_seeds_come(trained):
    import dataclasses

    import polars as pl

    def result(rate, accuracies):
        rows = [{**trained.seeds.row(0, named=True), "accuracy": x} for x in accuracies]
        return cell(rate=rate), dataclasses.replace(trained, seeds=pl.DataFrame(rows, schema=trained.seeds.schema))

    numbers = [0.1, 0.7, 0.3]
    assert sum(numbers) != sum(numbers[::-1])
    assert choose_setting([result(0.2, numbers), result(0.1, numbers[::-1])]).learning_rate == 0.1
    assert choose_setting([result(0.2, numbers[::-1]), result(0.1, numbers)]).learning_rate == 0.1
