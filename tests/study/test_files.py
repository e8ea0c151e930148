import errno
import os
import signal
from pathlib import Path

import polars as pl
import pytest

import expressive_attention.study
from expressive_attention.study.files import read_parquet, write_atomically


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_atomically(tmp_path / "file", b"new")
    assert raised.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_waits_for_a_table_and_then_interrupts(tmp_path, monkeypatch):
    """Polars makes a panic of an interrupt in its first read, which ended a run with a traceback."""
    path, read = tmp_path / "table.parquet", []
    pl.DataFrame({"x": [1, 2]}).write_parquet(path)
    read_by_polars = pl.read_parquet

    def interrupted(path, **options):
        os.kill(os.getpid(), signal.SIGINT)
        read.append(read_by_polars(path, **options))
        return read[0]

    monkeypatch.setattr(pl, "read_parquet", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        read_parquet(path)
    assert read[0]["x"].to_list() == [1, 2]
    assert signal.getsignal(signal.SIGINT) == before


def test_every_table_is_read_by_the_function_that_ctrl_c_waits_for():
    package = Path(expressive_attention.study.__path__[0])
    readers = [path.name for path in package.rglob("*.py") if "pl.read_parquet(" in path.read_text()]
    assert readers == ["files.py"]
