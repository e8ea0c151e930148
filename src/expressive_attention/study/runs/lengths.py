"""Numbers of seeds of the finished cells in a folder: a study finds seeds that it ran with other numbers of them."""

from __future__ import annotations

import time
from pathlib import Path

from ..config.toml import tomllib

__all__ = ["Lengths"]

_COARSEST_CLOCK = 2_000_000_000  # of file systems, in nanoseconds


class Lengths:
    """The numbers of seeds, each read once.

    Args:
        cells: The folder of the cells; it need not exist yet.
    """

    def __init__(self, cells: Path) -> None:
        self.cells = cells
        self.seeds: dict[str, range] = {}  # by the name of the cell
        self.lengths: dict[int, list[int]] = {}
        self.read = 0  # when the folder had last been changed, as these were read

    def known(self) -> dict[int, list[int]]:
        """Numbers of seeds that cells have, the largest first, by the first of the seeds."""
        changed = self.cells.stat().st_mtime_ns if self.cells.is_dir() else 0
        if changed != self.read:
            names = [path.name for path in self.cells.iterdir() if not path.name.startswith(".")] if changed else []
            self.seeds = {name: self.seeds.get(name) or _seeds_of(self.cells / name) for name in names}
            found: dict[int, set[int]] = {}
            for seeds in filter(None, self.seeds.values()):
                found.setdefault(seeds.start, set()).add(len(seeds))
            self.lengths = {first: sorted(lengths, reverse=True) for first, lengths in found.items()}
            # A second change may bear the time of the first one, where clocks are coarse.
            self.read = changed if time.time_ns() - changed > _COARSEST_CLOCK else 0
        return self.lengths


def _seeds_of(folder: Path) -> range:
    """The seeds of the cell in a folder; none where it does not say, or has gaps."""
    try:
        seeds = tomllib.loads((folder / "cell.toml").read_text(encoding="utf-8"))["cell"]["seeds"]
        found = range(seeds[0], seeds[-1] + 1)
        return found if list(found) == seeds else range(0)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return range(0)
