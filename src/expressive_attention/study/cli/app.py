"""The commands of ``ea``. Wrong use ends with one line and exit code 2; nothing finished is ever lost.

A command imports what it needs when it is run, so that help and completion start without torch, polars and scipy.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ... import __version__
from .common import print_table
from .models import geometry, limit, twins, verify
from .results import compare, export, report, status
from .run import list_presets, run, show

__all__ = ["app"]


app = typer.Typer(
    name="ea",
    help="Expressive attention (EA) against dot-product attention (DPA): run studies, read their reports.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs are filled, and brackets are no markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
study = typer.Typer(
    help="Train EA against DPA on tasks of growing difficulty, and report which solved what.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


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
    """Print versions, the machine, and which backends can run here.

    Example: ea info
    """
    import torch

    from ...backends import AUTOMATIC, BACKENDS, cpu
    from ...call import Call, Visibility
    from ..runs.environment import environment

    table = Table("", "", show_header=False, box=None)
    for name, value in environment().items():
        table.add_row(name, value)
    print_table(table)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    backends = Table("backend", *devices, "chosen by itself", box=None)
    for name, module in BACKENDS.items():
        inputs = (torch.empty(1, 1, 1, 1, device=device) for device in devices)
        calls = [Call(x, x, x, None, Visibility(), 1.0, "expressive") for x in inputs]
        reasons = [module.declines(call) or "available" for call in calls]
        order = f"as number {AUTOMATIC.index(name) + 1}" if name in AUTOMATIC else "before them, where it is faster"
        backends.add_row(name, *reasons, order)
    print_table(backends)
    print_table(_takers(devices))
    if cpu.library.LEFT_OUT:
        typer.echo(
            f"C kernels that the compiler could not build, which newer ones can: {', '.join(cpu.library.LEFT_OUT)}"
        )


def _takers(devices: list[str]) -> Table:
    """Which backend takes calls of some kinds by itself, and why those before it do not."""
    import torch

    from ...call import Call, Visibility
    from ...call_log import reasons
    from ...functional import choose

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


@app.command()
def bench(
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Device to run on.")] = "cpu",
    threads: Annotated[
        list[int] | None,
        typer.Option(
            "--threads", metavar="N", help="Number of threads; may be given several times.", show_default="1, 2"
        ),
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", metavar="N", help="Pairs of runs from which a ratio is taken.")] = 7,
    only: Annotated[
        str, typer.Option("--only", metavar="TEXT", help="Only problems whose name contains this.", show_default="all")
    ] = "",
    backend: Annotated[
        str | None,
        typer.Option("--backend", metavar="NAME", help="Backend to time.", show_default="the one chosen by itself"),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the table to this file.", show_default="none"),
    ] = None,
) -> None:
    """Time the operator against its rivals on this machine.

    The error of each problem is checked first, against float64; a red check gives no speed-up. Goals are printed as met
    or missed, and nothing is left out.

    Example: ea bench --only tiny --threads 1
    """
    options = {
        "--device": [device], "--threads": threads or [], "--pairs": [pairs], "--only": [only] if only else [],
        "--backend": [backend] if backend else [], "--json": [file] if file else [],
    }  # fmt: skip
    given = [text for name, values in options.items() if values for text in (name, *map(str, values))]
    script = _benchmarks() / "operator.py"
    try:
        done = subprocess.run([sys.executable, str(script), *given], check=False)
    except KeyboardInterrupt:  # the benchmark's, too, which has ended by itself
        raise typer.Exit(130) from None
    raise typer.Exit(done.returncode)


def _benchmarks() -> Path:
    """The folder of the benchmarks: inside the installed package, or beside `src` in a checkout."""
    package = Path(__file__).parents[2]
    return next(folder for folder in (package / "benchmarks", package.parents[1] / "benchmarks") if folder.is_dir())


study.command("list")(list_presets)
for _command in (run, report, status, compare, export, verify, limit, twins, show):
    study.command()(_command)
app.command()(geometry)
app.add_typer(study, name="study")
