"""Files: written atomically, and tables as the bytes of one, and read without an interrupt half way."""

from __future__ import annotations

import os
import tempfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from .interrupts import delayed_interrupts

if TYPE_CHECKING:
    import polars as pl

__all__ = ["parquet", "read_parquet", "to_disk", "write_atomically"]


def read_parquet(path: Path) -> pl.DataFrame:
    """Read a table; Ctrl-C waits for it, because polars makes a panic of an interrupt in its first read."""
    import polars as pl

    with delayed_interrupts():
        return pl.read_parquet(path, glob=False)  # a name with brackets or stars is no pattern


def parquet(table: pl.DataFrame, *, dense: bool = False) -> bytes:
    """The content of a table's file. Written by polars itself, a full disk would not be an `OSError`.

    Args:
        table: The table.
        dense: Compress it as far as possible: a fifth smaller than otherwise, and seconds for a large one.
    """
    content = BytesIO()
    if dense:
        table.write_parquet(content, compression="brotli", compression_level=11)
    else:
        table.write_parquet(content)
    return content.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: it is whole, old or new, whenever the process is killed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):  # that of a full disk names no file, others that of a moment
            error.filename, error.filename2 = str(path), None
        raise


def to_disk(path: Path) -> None:
    """Flush a file or folder to disk before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
