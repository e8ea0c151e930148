"""Waiting for what other processes do. A test that waits in vain is ended by its own timeout, that of pytest."""

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object]) -> None:
    """Return when the condition holds."""
    while not condition():
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended may wait for its parent to be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
