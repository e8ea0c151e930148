"""Processes that run many cases, started once: four, which are also two meshes of two."""

from __future__ import annotations

import datetime
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import forking

# Seconds that a rank waits for another in a case that is not about waiting.
PATIENCE = 60.0

# Seconds that all cases of a test take together at most.
LIMIT = 300.0


class Death(Exception):  # noqa: N818
    """Raised by a case in a rank that is to die at once."""


Cases = Callable[[], Iterable[tuple[str, Callable[..., None]]]]


def run(cases: Cases, ranks: int, folder: Path) -> dict[str, str]:
    """Run the cases, in order, on so many processes; the errors of those that failed, by name.

    A case is called with the meshes by number of ranks: ``meshes[4]``, ``meshes[2]``. After an error all ranks stop.
    """
    started = [forking().Process(target=_worker, args=(cases, rank, ranks, folder)) for rank in range(ranks)]
    for process in started:
        process.start()
    end = time.monotonic() + LIMIT
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
    found: dict[str, str] = {}
    for rank in range(ranks):
        path = folder / f"errors-{rank}"
        own = pickle.loads(path.read_bytes()) if path.exists() else {"start": "nothing was written: it hung or died"}
        found |= {f"{name} on rank {rank}": text for name, text in own.items()}
    return found


def _worker(cases: Cases, rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    from torch.distributed.device_mesh import init_device_mesh

    meshes: dict[Any, Any] = {ranks: init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))}
    meshes["grid"] = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "cp"))
    meshes[2] = meshes["grid"]["cp"]
    errors: dict[str, str] = {}
    for name, case in cases():
        torch.manual_seed(0)
        try:
            case(meshes)
        except Death:
            break
        except AssertionError:  # of a result: all ranks go on
            errors[name] = traceback.format_exc()
        except Exception:
            errors[name] = traceback.format_exc()
            break
    (folder / f"errors-{rank}").write_bytes(pickle.dumps(errors))
    os._exit(0)  # groups are not torn down: ranks may have died
