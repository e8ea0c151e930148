import dataclasses
import errno
import hashlib
import os
from contextlib import ExitStack
from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from expressive_attention.study.errors import StudyError
from expressive_attention.study.runs import cell_files
from expressive_attention.study.runs import store as store_module
from expressive_attention.study.runs.cell_files import sealed
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.selection import choose_setting
from expressive_attention.study.runs.store import CorruptCellError, Store, StoreError
from expressive_attention.study.training.loop import train_cell
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
    assert store.path(cell()).stat().st_mode & 0o777 == 0o755  # others may read it


def test_the_machine_and_its_threads_are_kept_and_need_not_be(store, trained):
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        store.save(cell(), trained)
        torch.set_num_threads(before)
        assert store.about(cell())["environment"]["threads"] == str(threads)
    assert store.about(cell())["environment"]["torch"] == torch.__version__
    path = store.path(cell()) / "cell.toml"
    lines = [line for line in path.read_text().splitlines(True) if not line.startswith(("threads", "# sha256"))]
    path.write_bytes(sealed("".join(lines).encode()))
    assert "threads" not in store.about(cell())["environment"]
    assert_frame_equal(store.load(cell()).seeds, trained.seeds)


@pytest.mark.parametrize("name", ["cell.toml", "seeds.parquet", "weights.safetensors"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_cell_that_cannot_be_read_now_is_not_called_corrupt(store, trained, monkeypatch, name, number):
    """A run removes corrupt cells and trains them again."""
    store.save(cell(), trained)
    read = Path.read_bytes

    def fails(path):
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(StoreError, match=f"{name} cannot be read, and is kept: {os.strerror(number)}") as raised:
        store.load(cell(), weights=True)
    assert not isinstance(raised.value, CorruptCellError)
    monkeypatch.undo()
    assert_frame_equal(store.load(cell(), weights=True).seeds, trained.seeds)


def test_a_failure_in_the_middle_leaves_nothing_to_read(store, trained, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cell_files, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        store.save(cell(), trained)
    assert not store.has(cell())
    assert list(store.cells.iterdir())
    store.clean()
    assert not list(store.cells.iterdir())


def test_a_disk_without_room_is_an_error_of_the_system_and_keeps_nothing_of_a_cell(store, trained):
    """The remains took the room of the cells after it, and polars had an error of its own."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        with pytest.raises(OSError, match="File too large"):
            store.save(cell(), trained)
    assert not list(store.cells.iterdir())


def test_a_folder_without_room_for_cells_is_refused_before_the_training(store, monkeypatch):
    def fails(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(store_module.tempfile, "TemporaryFile", fails)
    with pytest.raises(StoreError, match="study cannot be written: Read-only file system"):
        store.create(TINY)


@pytest.mark.parametrize(
    "name", ["seeds.parquet", "curves.parquet", "examples.parquet", "weights.safetensors", "cell.toml"]
)
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
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for path, lack in (
        (tmp_path / "nothing", "the path does not exist"),
        (tmp_path / "full" / "thesis.txt", "it is a file"),
        (tmp_path / "full", r"it has no config\.toml"),
    ):
        with pytest.raises(StoreError, match=f"{path.name} is not a study: {lack}; pass the run folder, e.g. "):
            Store(path).config()
    with pytest.raises(StoreError, match="not empty and not a study"):
        Store(tmp_path / "full").create(TINY)
    with pytest.raises(StoreError, match="is not a directory"):
        Store(tmp_path / "full" / "thesis.txt").create(TINY)
    lock = store.lock()
    with pytest.raises(StoreError, match="another run is writing"):
        Store(store.directory).lock()
    lock.release()
    Store(store.directory).lock().release()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[grid", r"config\.toml is damaged: not valid TOML"),
        (b"name = '\xff'", r"config\.toml is damaged: byte 8 is no UTF-8"),
        (b"", r"config\.toml is damaged: it has no grid"),
    ],
)
def test_a_damaged_configuration_is_named(store, content, said):
    """It was called a study of protocol 2."""
    (store.directory / "config.toml").write_bytes(content)
    with pytest.raises(StoreError, match=said):
        store.create(TINY)
    with pytest.raises(StudyError, match=r"config\.toml"):
        store.config()
    assert (store.directory / "config.toml").read_bytes() == content


def test_a_number_of_the_protocol_that_is_none_is_named(store):
    for protocol in ("[2]", "{}", "nan", '"2"'):
        (store.directory / "config.toml").write_text(f"protocol = {protocol}\n{TINY}")
        with pytest.raises(StudyError, match="protocol"):
            store.config()


def test_the_learning_rate_is_the_most_accurate_then_the_fastest(trained):
    def result(rate, accuracy, steps):
        # The test sequences say the opposite, which does not count.
        seeds = trained.seeds.with_columns(
            validation=pl.lit(accuracy), accuracy=pl.lit(1 - accuracy), steps_to_solve=pl.lit(steps, dtype=pl.Int64)
        )
        return cell(rate=rate), dataclasses.replace(trained, seeds=seeds)

    assert choose_setting([result(0.1, 0.9, 5), result(0.2, 0.95, 50)]).learning_rate == 0.2
    assert choose_setting([result(0.1, 0.9, 50), result(0.2, 0.9, 5)]).learning_rate == 0.2
    assert choose_setting([result(0.2, 0.9, 5), result(0.1, 0.9, 5)]).learning_rate == 0.1
    # an unsolved seed counts with all steps
    assert choose_setting([result(0.1, 0.9, None), result(0.2, 0.9, 9)]).learning_rate == 0.2


def test_equally_accurate_learning_rates_are_equal_in_whatever_order_their_seeds_come(trained):
    def result(rate, accuracies):
        rows = [{**trained.seeds.row(0, named=True), "validation": x} for x in accuracies]
        return cell(rate=rate), dataclasses.replace(trained, seeds=pl.DataFrame(rows, schema=trained.seeds.schema))

    numbers = [0.1, 0.7, 0.3]
    assert sum(numbers) != sum(numbers[::-1])
    assert choose_setting([result(0.2, numbers), result(0.1, numbers[::-1])]).learning_rate == 0.1
    assert choose_setting([result(0.2, numbers[::-1]), result(0.1, numbers)]).learning_rate == 0.1


def test_any_change_of_a_cell_toml_is_found(store, trained):
    store.save(cell(), trained)
    path = store.path(cell()) / "cell.toml"
    whole = path.read_text()
    for text in (
        whole.replace("seconds = ", "seconds = 1"),
        whole.replace("system = ", "systems = "),
        whole + "\n",
        "".join(whole.splitlines(True)[:-1]),
    ):
        path.write_text(text)
        with pytest.raises(CorruptCellError, match=r"cell\.toml is corrupt: its checksum"):
            store.load(cell())
    path.write_text(whole)
    store.load(cell())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seconds = ", 'seconds = "long" #'),
        ("seconds = ", "seconds = nan #"),
        ("seconds = ", "seconds = -1 #"),
        ("seconds = ", "seconds = true #"),
        ("[sha256]", "[[sha256]]"),
        ("system = ", "system = 3 #"),
        ("threads = ", 'threads = "abc" #'),
        ("threads = ", 'threads = "0" #'),
        ("threads = ", 'threads = "99999999999" #'),
    ],
)
def test_wrong_types_in_a_cell_toml_are_named(store, trained, old, new):
    store.save(cell(), trained)
    path = store.path(cell()) / "cell.toml"
    lines = path.read_text().replace(old, new).splitlines(True)[:-1]
    path.write_bytes(sealed("".join(lines).encode()))
    with pytest.raises(CorruptCellError, match=r"cell\.toml does not describe this cell"):
        store.load(cell())


def test_a_link_to_nothing_in_place_of_a_cell_is_replaced(store, trained, tmp_path):
    store.path(cell()).symlink_to(tmp_path / "nowhere")
    assert not store.has(cell())
    store.save(cell(), trained)
    assert_frame_equal(store.load(cell()).seeds, trained.seeds)
    assert not store.path(cell()).is_symlink()


# ---- protocols ----


def old(directory, text=TINY):
    """A study of protocol 2, with a cell of it: as this version would have written it then."""
    directory.mkdir()
    (directory / "config.toml").write_text(text)
    store = Store(directory)
    store.cells.mkdir()
    return store


def test_the_protocol_is_part_of_what_is_kept(store):
    assert store.config()[1] == f"protocol = 3\n{TINY}"
    assert store.config()[0].protocol == 3
    Store(store.directory).create(TINY).release()
    assert store.config()[1] == f"protocol = 3\n{TINY}"


def test_a_study_of_protocol_2_is_read_and_not_gone_on_with(tmp_path, trained):
    store = old(tmp_path / "old")
    config, text = store.config()
    assert (config.protocol, config.training.early_stop, config.seeds.confirmation, text) == (2, True, 0, TINY)
    (mine, *_) = config.arms()[0].tuning_cells()
    result = dataclasses.replace(trained, seeds=trained.seeds.head(len(mine.seeds)))
    store.save(mine, result)
    folder = store.path(mine)
    (folder / "examples.parquet").unlink()  # which there were not
    later = ["validation", "validation_cross_entropy", "unseen_predictions", "unseen_contexts"]
    pl.read_parquet(folder / "seeds.parquet").drop(later).write_parquet(folder / "seeds.parquet")
    lines = (folder / "cell.toml").read_text().splitlines(True)[:-1]
    checksum = hashlib.sha256((folder / "seeds.parquet").read_bytes()).hexdigest()
    lines = [f'"seeds.parquet" = "{checksum}"\n' if line.startswith('"seeds') else line for line in lines]
    (folder / "cell.toml").write_text("".join(lines))
    loaded = store.load(mine)
    assert loaded.seeds["validation"].to_list() == [None] * len(result.seeds)
    assert_frame_equal(loaded.seeds.drop(later), result.seeds.drop(later))
    assert loaded.examples.is_empty()
    assert collect(store).protocol == 2
    with pytest.raises(StoreError, match="holds a study of protocol 2, which can be read, and not be gone on with"):
        store.create(TINY)
    with pytest.raises(StoreError, match="a study of protocol 2 can be read, and not be run"):
        Store(tmp_path / "new").create(f"protocol = 2\n{TINY}")
    assert not (tmp_path / "new").exists()


def test_identities_of_protocol_2_are_what_they_were():
    before = cell(early_stop=True).model_copy(update={"protocol": 2})
    assert before.identity == "61c91d97420874c2"
    assert before.identity != cell(early_stop=True).identity


def test_protocol_2_chose_by_test_sequences(trained):
    def result(rate, accuracy):
        seeds = trained.seeds.with_columns(accuracy=pl.lit(accuracy), validation=pl.lit(1 - accuracy))
        return cell(rate=rate).model_copy(update={"protocol": 2}), dataclasses.replace(trained, seeds=seeds)

    assert choose_setting([result(0.1, 0.8), result(0.2, 0.9)]).learning_rate == 0.2
