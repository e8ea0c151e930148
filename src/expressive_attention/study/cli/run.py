"""Commands that run a study and show a preset."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config.presets import preset_names, preset_question, preset_text, preset_time
from ..errors import StudyError
from .common import fail, of_the_system, one_line_errors, write_page

if TYPE_CHECKING:
    from ..runs.results import StudyResults

__all__ = ["list_presets", "print_findings", "run", "show"]


def run(
    config: Annotated[
        str,
        typer.Argument(
            metavar="PRESET_OR_FILE",
            help=f"A preset ({', '.join(preset_names())}) or a TOML file; `ea study list` says what they ask.",
            autocompletion=preset_names,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Folder of the study.", show_default="runs/NAME"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-w",
            metavar="N",
            help="Worker processes, each one cell at a time.",
            show_default="one per core, or per GPU",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="Engine that runs the cells: processes on this machine, or Ray (extra 'ray').",
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="A running Ray cluster, or 'auto' on one of its nodes.",
            show_default="Ray is started on this machine",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", metavar="cpu|cuda|cuda:N", help="Device to train on; 'cuda': all GPUs, in turn."),
    ] = "cpu",
    gpus_per_cell: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-cell",
            metavar="SHARE",
            help="With --engine ray --device cuda: share of a GPU per cell, 0.25 for four at a time.",
            show_default="1",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    log: Annotated[
        list[str] | None,
        typer.Option(
            "--log",
            metavar="tensorboard|wandb",
            help="Log to TensorBoard or Weights & Biases, or to both.",
            show_default="to neither",
        ),
    ] = None,
) -> None:
    """Run a study, or resume one that was stopped, and write its report.

    Finished cells are never run again, and a cell in progress resumes from its last checkpoint, so stopping (Ctrl-C)
    loses about a minute. Change the file (more seeds, tasks, learning rates) and run it again to extend a study.

    Example: ea study run quick --workers 2
    """
    from ..config.load import load_config
    from ..runs.engines import LocalEngine, RayEngine
    from ..runs.loggers import Several, make_loggers
    from ..runs.progress import make_display
    from ..runs.results import collect
    from ..runs.scheduler import SweepError, run_study
    from ..runs.store import Store
    from ..training.devices import CPU, available_cores, devices

    start = time.perf_counter()
    if workers is not None and workers < 1:
        fail(f"--workers must be at least 1, got {workers}")
    if engine not in ("local", "ray"):
        fail(f"--engine must be 'local' or 'ray', got {engine!r}")
    if address is not None and engine != "ray":
        fail(f"--address is for --engine ray, got {address!r} with --engine {engine}")
    if address is not None and workers is not None:
        fail(f"--workers does not apply to a cluster, which decides itself, got {workers} with --address {address}")
    if engine == "ray" and device not in ("cpu", "cuda"):
        fail(f"--device must be 'cpu' or 'cuda' with --engine ray, which chooses the GPU itself, got {device!r}")
    if gpus_per_cell is not None and (engine != "ray" or device != "cuda"):
        fail(f"--gpus-per-cell is for --engine ray --device cuda, got --engine {engine} --device {device}")
    if gpus_per_cell is not None and not 0 < gpus_per_cell <= 1:
        fail(f"--gpus-per-cell must be above 0 and at most 1, got {gpus_per_cell:g}")
    cores = available_cores()
    with one_line_errors():
        if engine == "ray":
            share = 0.0 if device == "cpu" else gpus_per_cell or 1.0
            runner = RayEngine(workers or cores, address, gpus_per_cell=share)
        else:
            places = devices(device)
            runner = LocalEngine(workers or (cores if places == [CPU] else len(places)), devices=places)
        parsed, text = load_config(config)
        store = Store(out or Path("runs") / parsed.name)
        loggers = make_loggers(log or [], store)
        lock = store.create(text, parsed.sources, parsed.record())
    try:
        run_study(parsed, store, runner, Several(make_display(quiet=quiet), loggers))
    except StudyError as error:
        fail(str(error))
    except OSError as error:
        fail(of_the_system(error))
    except KeyboardInterrupt:
        typer.echo(f"stopped; finished cells are kept in {store.directory}: run the same command to resume", err=True)
        raise typer.Exit(130) from None
    except SweepError as error:
        typer.echo(f"{error}; finished cells are kept in {store.directory}", err=True)
        raise typer.Exit(1) from None
    finally:
        lock.release()
    with one_line_errors():
        results = collect(store)
        page = write_page(results, store.directory, trust=True)  # its files have just been run
    if not quiet:
        print_findings(results)
        typer.echo(f"\n{page}  ({time.perf_counter() - start:.0f} s)")


def list_presets() -> None:
    """Print the presets: the question that each asks, and the time that it takes.

    Example: ea study list
    """
    for name in preset_names():
        typer.echo(f"{name:18}{preset_question(name)}\n{'':18}{preset_time(name)}")
    typer.echo("\n`ea study run NAME` runs one, and `ea study show NAME` prints it.")


def show(
    preset: Annotated[
        str,
        typer.Argument(metavar="PRESET", help=f"One of {', '.join(preset_names())}.", autocompletion=preset_names),
    ],
) -> None:
    """Print the TOML of a preset, to copy and edit.

    Example: ea study show quick > my-study.toml
    """
    with one_line_errors():
        typer.echo(preset_text(preset), nl=False)


def print_findings(results: StudyResults) -> None:
    """Print the findings, one sentence a line."""
    from ..analysis.findings import findings

    for sentence in findings(results):
        typer.echo(sentence)
