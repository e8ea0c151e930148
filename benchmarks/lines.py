"""Results as lines of JSON, each of them in the file at once: a run that ends early loses none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_line(file: Path, row: dict[str, Any]) -> None:
    """Append a result to a file, and print it."""
    line = json.dumps(row)
    print(line, flush=True)
    with file.open("a") as opened:
        opened.write(line + "\n")
        opened.flush()
        os.fsync(opened.fileno())
