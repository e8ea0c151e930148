"""Questions about the folder of a study."""

import polars as pl
from polars.testing import assert_frame_equal


def finished(store):
    """The finished cells by name, each with what tells its folder from one written again."""
    return {path.name: path.stat().st_ino for path in store.cells.glob("[!.]*")}


def same_results(one, other):
    """The finished cells of two stores are the same to the bit."""
    assert finished(one).keys() == finished(other).keys()
    for name in finished(one):
        for table in ("seeds", "curves", "splits"):
            frames = [pl.read_parquet(store.cells / name / f"{table}.parquet") for store in (one, other)]
            assert_frame_equal(*frames, check_exact=True)
        weights = [(store.cells / name / "weights.safetensors").read_bytes() for store in (one, other)]
        assert weights[0] == weights[1]
