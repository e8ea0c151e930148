"""Python processes that start at once: forked from one that has imported torch and the package.

Where a test is about imports, or about variables of the environment that are read then, it needs a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing.context import BaseContext
from pathlib import Path
from subprocess import CompletedProcess

PRELOADED = ["expressive_attention.study.runs.engines.local", "expressive_attention.study.training.loop"]


def forking() -> BaseContext:
    """A context whose processes are forked; where there is none, each imports what it needs."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_script(path: Path | str, *arguments: object) -> CompletedProcess[str]:
    """Runs a script as ``python path arguments`` does, and returns its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "errors")]
        command = [str(path), *map(str, arguments)]
        process = forking().Process(target=_run, args=(command, *map(str, files)))
        process.start()
        process.join()
        return CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def run_code(code: str) -> CompletedProcess[str]:
    """As `run_script`, for a script with this text."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(code)
        return run_script(script)


def _run(command: list[str], out: str, errors: str) -> None:
    for descriptor, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
