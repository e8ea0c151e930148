"""Which architectures of Hugging Face transformers run expressive attention, and which do not and why.

    .venv/bin/python docs/architectures.py [--only PATTERN] [--results FILE] [--write]

Every architecture of `AutoModel` is built from a small configuration with random weights, converted, and verified by a
forward pass: nothing is downloaded. Models that read images need torchvision. Each has a process of its own, two at a
time. With a file of results, a run that was ended is resumed. `--write` puts the list into docs/architectures.md.

Sizes and inputs are made by rules, of `tiny_configs` and `tiny_inputs`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tiny_configs import Size, shrink, sizes
from tiny_inputs import Maker
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from expressive_attention.integrations import ConversionError, convert

SECONDS, PARAMETERS, PROCESSES = 75, 720_000_000, 2  # seconds of the processor: other work does not count
PATIENCE = 20  # times as many seconds on the clock, for a process that waits
MEMORY = 10 * 2**30  # bytes that a process may take


def outcomes(config_class: Any) -> Iterator[str]:
    """The best outcome so far: ``""`` if expressive attention ran in every layer; else what was not possible, first."""
    best = ""
    for layers in (2, 4, 8):  # some have attention in every fourth layer, or eighth
        partly = 0
        for found in attempts(config_class, layers):
            if not found or found.startswith(("refused", "failed", "besides")):
                yield found
                return
            best = max(found, best, key=rank)
            yield best
            partly += found.startswith("partly")
            if partly == 2:
                return
        if not best.startswith(("without attention", "not reached")):
            return


def rank(found: str) -> tuple[int, float]:
    """Return the order of an outcome: one that tells more ranks higher."""
    kinds = ("not tried", "without attention", "not reached", "partly")
    told = next((number for number, kind in enumerate(kinds, 1) if found.startswith(kind)), 0)
    reached, total = re.findall(r"\d+", found)[:2] if found.startswith("partly") else (0, 1)
    return told - found.endswith("parameters at least"), int(reached) / int(total)


def attempts(config_class: Any, layers: int) -> Iterator[str]:
    """The outcome with one configuration after the other."""
    for size in sizes(layers):
        found = attempt(config_class, size)
        yield found
        if found.startswith("not tried: ImportError"):
            return


def attempt(config_class: Any, size: Size) -> str:
    """The outcome with a configuration of one size."""
    try:
        return of_model(build(shrink(config_class(), size)))
    except Exception as error:
        return f"not tried: {first_line(error)}"


def build(config: Any) -> Any:
    """A model of a configuration."""
    torch.manual_seed(0)
    known: Any = MODEL_MAPPING[type(config)]
    config.architectures = [(known[0] if isinstance(known, tuple) else known).__name__]
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters at least")
    return AutoModel.from_config(config).eval()


def of_model(model: Any) -> str:
    """The outcome with a model that has been built."""
    try:
        convert(model).undo()
    except (ConversionError, NotImplementedError) as error:
        if "has no attention layer" in str(error) and "it computes softmax" not in str(error):
            return "without attention: "
        return f"refused: {first_line(error)}"
    problem = ""
    for inputs in Maker(model).inputs():
        if not (error := error_of(model, inputs)):
            return of_pass(model, inputs)
        problem = problem or error
    return f"not tried: {problem}"


@torch.no_grad()
def error_of(model: Any, inputs: dict[str, Any]) -> str:
    """Why a model, as it is, does not run with these inputs; empty if it does."""
    try:
        model(**inputs)
    except Exception as error:
        return first_line(error)
    return ""


def of_pass(model: Any, inputs: dict[str, Any]) -> str:
    """The outcome with a model and inputs with which it runs."""
    try:
        conversion = convert(model)
        conversion.strict = False  # a pass that reaches no layer is told below
        found = conversion.verify(**inputs)
    except (ConversionError, NotImplementedError) as error:
        return f"refused: {first_line(error)}"
    except Exception as error:
        return f"failed: {first_line(error)}"
    if found.failed:
        return f"failed: {found}"
    reached = len(found.calls) - len(found.idle)
    if not reached:
        return f"not reached: none of {len(found.calls)} attention layers ran"
    idle = ", ".join(found.idle)
    if found.softmax and not idle:
        return "besides: "
    return (
        f"partly: {reached} of {len(found.calls)}; not {textwrap.shorten(idle, 60, placeholder=' ...')}" if idle else ""
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error, in short and without the place of a file on this machine."""
    line = re.sub(r"[^\s'\"]*/site-packages/", "", (str(error).strip().splitlines() or [""])[0])
    kind = "" if isinstance(error, (ConversionError, NotImplementedError)) else f"{type(error).__name__}: "
    return f"{kind}{textwrap.shorten(line, 150, placeholder=' ...')}"


# ---- all of them ----


def in_process(config_class: Any) -> str:
    """The best outcome, from a process of its own, which may take too long or end in any way."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=send_outcomes, args=(config_class, there))
    process.start()
    there.close()
    told = late = f"not tried: more than {SECONDS} seconds"
    end = time.monotonic() + PATIENCE * SECONDS
    try:
        while here.poll(max(0, end - time.monotonic())):
            told = here.recv()
    except EOFError:  # it has ended
        process.join(1)
        if told is late and process.exitcode != -signal.SIGXCPU:
            told = f"not tried: its process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return told


def send_outcomes(config_class: Any, there: Any) -> None:
    """Send the outcomes of a configuration; this runs in the process of its own."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    with contextlib.redirect_stdout(io.StringIO()):
        for found in outcomes(config_class):
            there.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="only architectures whose name matches")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep results here; those in it are not made again"
    )
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    kept = arguments.results
    results: dict[str, str] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    configs = {each.model_type: each for each in MODEL_MAPPING if re.search(arguments.only, each.model_type)}
    names = sorted(name for name in configs if name not in results)
    with ThreadPoolExecutor(PROCESSES) as pool:
        for name, found in zip(names, pool.map(lambda name: in_process(configs[name]), names), strict=True):
            results[name] = found
            print(f"{name}: {found or 'verified'}", flush=True)
            if kept:
                kept.write_text(json.dumps(results, indent=0))
    if arguments.write:
        Path(__file__).with_suffix(".md").write_text(page(dict(sorted(results.items()))), encoding="utf-8")


def page(results: dict[str, str]) -> str:
    """The list as Markdown."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, found in results.items():
        groups[found.partition(":")[0] or "verified"].append(name)
    lines = [
        "# Architectures of Hugging Face transformers",
        "",
        f"Made by `docs/architectures.py` with transformers {transformers.__version__}: each architecture of",
        "`AutoModel`, built tiny with random weights, converted, and verified by a forward pass.",
        "",
        '<div id="find-architecture" hidden></div>',
    ]
    for group, title in {
        "verified": "Expressive attention ran in every layer",
        "besides": "The same, with softmax of three dimensions or more elsewhere, as in samplers, or unseen",
        "without attention": "Without attention that calls torch or the attention interface",
    }.items():
        lines += ["", f"## {title} ({len(groups[group])})", "", f"{', '.join(groups[group])}"]
    for group, title in {
        "partly": "Expressive attention ran in every layer that the pass reached, of those that there are",
        "refused": "Refused by `convert` or by the model",
        "failed": "Not verified: an error with expressive attention, or softmax ran in the same layers",
        "not reached": "Not verified: no attention layer was reached",
        "not tried": "Not tried: no tiny model of it could be built and run",
    }.items():
        if groups[group]:
            lines += ["", f"## {title} ({len(groups[group])})", "", "| architecture | why |", "|---|---|"]
            reasons = {name: results[name].partition(": ")[2].replace("|", "/") for name in groups[group]}
            lines += [f"| {name} | {reason} |" for name, reason in reasons.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
