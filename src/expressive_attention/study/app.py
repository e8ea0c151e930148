"""The commands of ``ea``. Wrong use ends with one line and exit code 2; nothing finished is ever lost.

A command imports what it needs when it is run, so that help and completion start without torch, polars and scipy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from .. import __version__
from .errors import StudyError
from .presets import preset_names, preset_text

if TYPE_CHECKING:
    from .results import StudyResults

__all__ = ["app"]

app = typer.Typer(
    name="ea",
    help="Expressive attention (EA) against dot-product attention (DPA): run studies, read their reports.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
study = typer.Typer(
    help="Train EA against DPA on tasks of growing difficulty, and report which solved what.",
    no_args_is_help=True,
)
app.add_typer(study, name="study")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study, e.g. runs/quick.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the Python files in the folder, with your rights: its own tasks and mechanisms."),
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ea {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def info() -> None:
    """Print versions, the machine, and which backends can run here."""
    import torch

    from ..backends import AUTOMATIC, BACKENDS, cpu
    from ..call import Call, Visibility
    from .store import environment

    console = Console(highlight=False)
    table = Table("", "", show_header=False, box=None)
    for name, value in environment().items():
        table.add_row(name, value)
    console.print(table)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    backends = Table("backend", *devices, "chosen by itself", box=None)
    for name, module in BACKENDS.items():
        inputs = (torch.empty(1, 1, 1, 1, device=device) for device in devices)
        calls = [Call(x, x, x, None, Visibility(), 1.0, "expressive") for x in inputs]
        reasons = [module.declines(call) or "available" for call in calls]
        backends.add_row(name, *reasons, f"as number {AUTOMATIC.index(name) + 1}" if name in AUTOMATIC else "no")
    console.print(backends)
    console.print(_takers(devices))
    if cpu.library.LEFT_OUT:
        console.print(
            f"C kernels that the compiler could not build, which newer ones can: {', '.join(cpu.library.LEFT_OUT)}"
        )


def _takers(devices: list[str]) -> Table:
    """Which backend takes calls of some kinds by itself, and why those before it do not."""
    import torch

    from ..call import Call, Visibility
    from ..call_log import reasons
    from ..functional import choose

    table = Table("a call of", "on", "is taken by", "and not by", box=None)
    for device in devices:
        starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        packed = Visibility(query_starts=starts, key_starts=starts, longest_query=1, longest_key=1)
        kinds = {str(dtype).removeprefix("torch."): (dtype, 1, Visibility(), 0.0) for dtype in dtypes}
        kinds["head dimension 512"] = (torch.float32, 512, Visibility(), 0.0)
        kinds["dropout"] = (torch.float32, 1, Visibility(), 0.1)
        kinds["ALiBi"] = (torch.float32, 1, Visibility(slopes=torch.ones(1, 1, device=device)), 0.0)
        kinds["packed sequences"] = (torch.float32, 1, packed, 0.0)
        for kind, (dtype, width, visibility, dropout_p) in kinds.items():
            x = torch.empty(1, 1, 1, width, dtype=dtype, device=device)
            call = Call(x, x, x, None, visibility, 1.0, "expressive", dropout_p)
            chosen = choose(call, None)
            table.add_row(kind, device, chosen, "; ".join(f"{n}: {why}" for n, why in reasons(call, chosen).items()))
    return table


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time the operator against its rivals on this machine; `ea bench --help` shows the options."""
    script = _benchmarks() / "operator.py"
    try:
        done = subprocess.run([sys.executable, str(script), *context.args], check=False)
    except KeyboardInterrupt:  # the benchmark's, too, which has ended by itself
        raise typer.Exit(130) from None
    raise typer.Exit(done.returncode)


def _benchmarks() -> Path:
    """The folder of the benchmarks: inside the installed package, or beside `src` in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "benchmarks", package.parents[1] / "benchmarks") if folder.is_dir())


@app.command()
def geometry(
    directory: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder of a study with its trained models.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH_OR_CONFIG", help="In its place, a model of Hugging Face transformers."),
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="What that model reads.")] = None,
    condition: Annotated[
        str | None, typer.Option(help="Of the study; by default that on which the mechanisms differ most.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the study; by default the one that DPA does worst on.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to.  [default: RUN/geometry, or geometry]")
    ] = None,
    trust: Trust = False,
) -> None:
    """Show attention space: an interactive page, pictures, and a table of all heads."""
    from ..geometry.folder import write_folder

    if (directory is None) == (model is None):
        _fail("geometry takes either the folder of a study, or --model with --text")
    if (model is None) != (text is None):
        _fail("--model and --text belong together")
    if model is not None and (condition is not None or seed is not None):
        _fail("--condition and --seed are of a study, and do not go with --model")
    with _one_line_errors():
        if directory is not None:
            from .geometry import look_into

            look = look_into(directory, condition, seed, trust=trust)
            records, title, tokens, unseen = look.records, look.title, look.tokens, look.unseen
        else:
            assert model is not None
            assert text is not None
            from ..geometry.text import record_text

            content = text.read_text(encoding="utf-8", errors="replace")
            try:
                record, words = record_text(model, content)
            except (ValueError, ImportError) as error:
                _fail(str(error))
            records, title, tokens, unseen = {"model": record}, f"{model} reads {text.name}", [words], []
        written = write_folder(records, out or (directory or Path()) / "geometry", title=title, tokens=tokens)
        if directory is not None and out is None and (directory / "report.html").exists():
            from .store import Store, collect

            _write_report(collect(Store(directory)), directory, trust=trust)  # which links the page now
    if unseen:
        typer.echo(f"not shown, for nothing can watch their weights: {', '.join(unseen)}\n")
    for name, record in records.items():
        typer.echo(f"{name}\n{record}\n")
    typer.echo("\n".join(str(path) for path in written))


@study.command()
def run(
    config: Annotated[
        str,
        typer.Argument(
            metavar="PRESET_OR_FILE",
            help=f"A preset ({', '.join(preset_names())}) or a TOML file.",
            autocompletion=preset_names,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Folder of the study.  [default: runs/NAME]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-w", help="Worker processes, each one cell at a time; by default one per core, or per GPU."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="What runs the cells: processes on this machine, or Ray (extra 'ray').",
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="A running Ray cluster, or 'auto' on one of its nodes; by default Ray is started on this machine.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="cpu|cuda|cuda:N", help="On what cells are trained; 'cuda': on all GPUs, in turn."
        ),
    ] = "cpu",
    gpus_per_cell: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-cell",
            metavar="SHARE",
            help="With --engine ray --device cuda: share of a GPU per cell, 0.25 for four at a time.  [default: 1]",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    log: Annotated[
        list[str] | None,
        typer.Option("--log", metavar="tensorboard|wandb", help="Log to TensorBoard or Weights & Biases, or to both."),
    ] = None,
) -> None:
    """Run a study, or go on with one that was stopped, and write its report.

    Cells that are finished are never run again, and those at work go on from their last checkpoint, so stopping
    (Ctrl-C) loses a minute. Change the file (more seeds, tasks, learning rates) and run it again to extend a study.
    """
    from .config import load_config
    from .devices import CPU, available_cores, devices
    from .engines import LocalEngine, RayEngine
    from .progress import make_display
    from .sinks import Several, make_sinks
    from .store import Store, collect
    from .sweep import SweepError, run_study

    start = time.perf_counter()
    if workers is not None and workers < 1:
        _fail(f"--workers must be at least 1, got {workers}")
    if engine not in ("local", "ray"):
        _fail(f"--engine must be 'local' or 'ray', got {engine!r}")
    if address is not None and engine != "ray":
        _fail(f"--address is for --engine ray, got {address!r} with --engine {engine}")
    if address is not None and workers is not None:
        _fail(f"--workers does not apply to a cluster, which decides itself, got {workers} with --address {address}")
    if engine == "ray" and device not in ("cpu", "cuda"):
        _fail(f"--device must be 'cpu' or 'cuda' with --engine ray, which chooses the GPU itself, got {device!r}")
    if gpus_per_cell is not None and (engine != "ray" or device != "cuda"):
        _fail(f"--gpus-per-cell is for --engine ray --device cuda, got --engine {engine} --device {device}")
    if gpus_per_cell is not None and not 0 < gpus_per_cell <= 1:
        _fail(f"--gpus-per-cell must be above 0 and at most 1, got {gpus_per_cell:g}")
    cores = available_cores()
    with _one_line_errors():
        if engine == "ray":
            share = 0.0 if device == "cpu" else gpus_per_cell or 1.0
            runner = RayEngine(workers or cores, address, gpus_per_cell=share)
        else:
            places = devices(device)
            runner = LocalEngine(workers or (cores if places == [CPU] else len(places)), devices=places)
        parsed, text = load_config(config)
        store = Store(out or Path("runs") / parsed.name)
        sinks = make_sinks(log or [], store)
        lock = store.create(text, parsed.sources, parsed.record())
    try:
        run_study(parsed, store, runner, Several(make_display(quiet=quiet), sinks))
    except StudyError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo(f"stopped; finished cells are kept in {store.directory}: run the same command to go on", err=True)
        raise typer.Exit(130) from None
    except SweepError as error:
        typer.echo(f"{error}; finished cells are kept in {store.directory}", err=True)
        raise typer.Exit(1) from None
    finally:
        lock.release()
    with _one_line_errors():
        results = collect(store)
        page = _write_report(results, store.directory, trust=True)  # its files have just been run
    if not quiet:
        _print_findings(results)
        typer.echo(f"\n{page}  ({time.perf_counter() - start:.0f} s)")


@study.command()
def report(directory: Directory, trust: Trust = False) -> None:
    """Write the report of a study from its finished cells: DIR/report.html and DIR/figures."""
    from .store import Store, collect

    with _one_line_errors():
        results = collect(Store(directory))
        page = _write_report(results, directory, trust=trust)
    _print_findings(results)
    typer.echo(f"\n{page}")


@study.command()
def status(
    directory: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Print what a study has found so far, a row per condition and mechanism."""
    from .store import Store, collect

    with _one_line_errors():
        results = collect(Store(directory))
        config, _ = Store(directory).config()
    rows = _status_rows(results, config.seeds.final)
    if as_json:
        typer.echo(json.dumps({"cells": rows}, indent=2))
        return
    table = Table("condition", "mechanism", "learning rate", "seeds", "solved", "mean accuracy", box=None)
    for condition, row in zip(_conditions_by_mechanism(results), rows, strict=True):
        accuracy = "" if row["accuracy_mean"] is None else f"{row['accuracy_mean']:.4f}"
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        seeds = f"{row['seeds']} of {config.seeds.final}"
        table.add_row(condition, row["mechanism"], rate, seeds, str(row["solved"]), accuracy)
    Console(highlight=False).print(table)
    typer.echo(f"{len(results.unfinished)} cells are not finished" if results.unfinished else "all cells are finished")


@study.command()
def export(
    directory: Directory,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Where to.  [default: DIR/export]")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", metavar="csv|parquet|latex", help="May be given several times.  [default: csv]"),
    ] = None,
) -> None:
    """Write a study's results as files: tables of seeds, curves, splits and a summary; LaTeX has the summary alone."""
    from .export import export_study
    from .limit import limit_tables
    from .store import Store, collect

    with _one_line_errors():
        store = Store(directory)
        results = collect(store)
        try:
            tables = limit_tables(results, store)
            files = export_study(results, out or directory / "export", formats or ["csv"], tables)
        except ValueError as error:
            _fail(str(error))
    for file in files:
        typer.echo(file)
    if results.unfinished:
        typer.echo(f"{len(results.unfinished)} cells are not finished, and not in it", err=True)


@study.command()
def verify(
    directory: Directory,
    sample: Annotated[int, typer.Option("--sample", "-n", metavar="N", help="Number of cells.")] = 3,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Of the choice of cells.")] = 0,
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda|cuda:N", help="On what they are trained.")
    ] = "cpu",
    trust: Trust = False,
) -> None:
    """Train some finished cells again, here and with this code, and compare all tables and weights to the bit.

    Exit code 0: all are the same. 1: some differ, as may be expected with other versions, another processor or
    another number of threads or device, which are named.
    """
    from .devices import devices
    from .store import Store
    from .verify import sample_cells, verify_cell

    if sample < 1:
        _fail(f"--sample must be at least 1, got {sample}")
    store, differ = Store(directory), 0
    with _one_line_errors():
        place = devices(device)[0]
        cells = sample_cells(store, sample, seed, trust=trust)
        for cell in cells:
            found = verify_cell(cell, store, place)
            outcome = "; ".join(found.differences) or "same bits"
            typer.echo(f"{cell.identity}  {cell}: {outcome}  ({found.seconds:.0f} s)")
            if found.circumstances:
                typer.echo(f"  not as it was: {'; '.join(found.circumstances)}")
            differ += bool(found.differences)
    typer.echo(f"{len(cells) - differ} of {len(cells)} cells have the same bits")
    if differ:
        raise typer.Exit(1)


@study.command()
def limit(
    directory: Directory,
    share: Annotated[
        float,
        typer.Option("--share", metavar="SHARE", help="Length of the training after it, as a share of the first one."),
    ] = 0.05,
    trust: Trust = False,
) -> None:
    """Put z^2, which runs in linear time, in the place of EA's function in all trained models, and tell what it costs.

    Measured on validation sequences, with and without a short training after it; what EA gains by the same training is
    told as well. Kept in DIR/limit; `export` writes it with the other tables.
    """
    from .limit import limit_cells, limit_sentences, limit_tables, write_limit
    from .store import Store, collect

    if not 0 < share <= 1:
        _fail(f"--share must be above 0 and at most 1, got {share:g}")
    with _one_line_errors():
        store = Store(directory)
        results = collect(store)
        cells = limit_cells(results, store, trust=trust)
        for index, cell in enumerate(cells):
            typer.echo(f"cell {index + 1} of {len(cells)}: {cell.condition}", err=True)
            write_limit(cell, store, share)
        tables = limit_tables(results, store)
    for sentence in limit_sentences(results, tables):
        typer.echo(sentence)


@study.command()
def twins(
    directory: Directory,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Where to.  [default: DIR/twins]")
    ] = None,
    condition: Annotated[
        str | None, typer.Option(help="Of the study; by default that on which the mechanisms differ most.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="A final seed; by default the middle one by accuracy.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Parameters in float16: files of half the size.")] = False,
    trust: Trust = False,
) -> None:
    """Write trained models that differ in the mechanism alone, one file each, for `load_twins` to read."""
    from .twins import write_twins

    with _one_line_errors():
        files = write_twins(directory, out or directory / "twins", condition, seed, half=half, trust=trust)
    for file in files:
        typer.echo(f"{file}  ({file.stat().st_size / 1000:.0f} kB)")


@study.command()
def show(
    preset: Annotated[
        str,
        typer.Argument(metavar="PRESET", help=f"One of {', '.join(preset_names())}.", autocompletion=preset_names),
    ],
) -> None:
    """Print the TOML of a preset, to copy and edit."""
    with _one_line_errors():
        typer.echo(preset_text(preset), nl=False)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except StudyError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (Exception, SystemExit) as error:
        from .user_tasks import blame

        if (where := blame(error)) is None:
            raise
        _fail(where)  # in a file of tasks


def _fail(message: str) -> NoReturn:
    typer.echo(f"ea: {message}", err=True)
    sys.exit(2)


def _write_report(results: StudyResults, directory: Path, *, trust: bool = False) -> Path:
    from .report import write_report

    return write_report(results, directory, trust=trust)


def _print_findings(results: StudyResults) -> None:
    from .statistics import findings

    for sentence in findings(results):
        typer.echo(sentence)


def _conditions_by_mechanism(results: StudyResults) -> list[str]:
    return [condition.label for condition in results.conditions for _ in results.mechanisms]


def _status_rows(results: StudyResults, wanted: int) -> list[dict[str, Any]]:
    import polars as pl

    rows = []
    for condition in results.conditions:
        for mechanism in results.mechanisms:
            final = results.seeds.filter(
                (pl.col("condition") == condition.label)
                & (pl.col("mechanism") == mechanism)
                & (pl.col("role") == "final")
            )
            rows.append({
                "task": condition.task,
                "mechanism": mechanism,
                "position": condition.model["position"],
                "model": condition.model,
                "learning_rate": final["learning_rate"][0] if len(final) else None,
                "seeds": len(final),
                "solved": int(final["solved"].sum()),
                "accuracy_mean": final["accuracy"].mean(),
                "done": len(final) == wanted,
            })  # fmt: skip
    return rows
