"""Instructions that the guard of switched layers takes, counted by valgrind: per call, and as a share of small models.

    python benchmarks/guard.py

Valgrind has to be installed. Instructions do not depend on what else the machine does; times of a guard would.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder has a file named like a module of the standard library

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expressive_attention.integrations import convert
from expressive_attention.integrations.classes import give_class
from expressive_attention.integrations.guard import Guarded, guard
from expressive_attention.integrations.switching import Switched

# Calls of an empty layer, and passes of a model. Twice, so that all else cancels in their difference.
CALLS, PASSES = (400, 2400), (2, 12)


class Empty(nn.Module):
    """A layer that does nothing."""

    def forward(self, x: Any) -> Any:
        return x


def unguarded(model: nn.Module) -> nn.Module:
    """The same switched model, whose layers are called without the guard."""
    for module in model.modules():
        if isinstance(module, Guarded):
            own = type(module)
            object.__setattr__(module, "__class__", type(own.__name__, (own,), {"_call_impl": nn.Module._call_impl}))
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def cases() -> Iterator[tuple[str, Callable[..., Any], Any, tuple[int, int]]]:
    """Name, what is called, its argument, and how often."""
    for name, mixin in (("plain", None), ("by class", Switched)):
        layer = Empty()
        if mixin is not None:
            give_class(layer, mixin)
            guard(layer, "layer")
        yield f"empty layer, {name}", layer, None, CALLS
    x = torch.randn(1, 32, 64)
    for name, change in (("unguarded", unguarded), ("guarded", lambda model: model)):
        model = encoder()
        convert(model)
        yield f"torch encoder of 2 layers, {name}", change(model), x, PASSES
    from transformers import LlamaConfig, LlamaForCausalLM

    widths: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config, tokens = LlamaConfig(vocab_size=256, num_hidden_layers=2, **widths), torch.randint(256, (1, 32))
    for name, change in (("unguarded", unguarded), ("guarded", lambda model: model)):
        model = LlamaForCausalLM(config).eval()
        convert(model)
        yield f"Llama of 2 layers, {name}", change(model), tokens, PASSES


@torch.no_grad()
def run() -> None:
    """Run all cases, with a dump of callgrind around each."""
    torch.set_num_threads(1)
    made, process = list(cases()), str(os.getpid())
    for _, function, argument, _ in made:
        for _ in range(5):
            function(argument)
    subprocess.run(["callgrind_control", "-i", "on", process], check=True, stdout=subprocess.DEVNULL)
    for name, function, argument, counts in made:
        function(argument)
        for count in counts:
            dump("nothing", process)
            for _ in range(count):
                function(argument)
            dump(f"{name}@{count}", process)


def dump(name: str, process: str) -> None:
    """Write the instructions since the last dump under ``name``, which callgrind_control gives to a shell."""
    name = name.replace(" ", "_")
    subprocess.run(["callgrind_control", f"-d={name}", process], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    if "--run" in sys.argv:
        run()
        return
    with tempfile.TemporaryDirectory() as folder:
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"]
        tool.append(f"--callgrind-out-file={folder}/callgrind.out.%p")
        subprocess.run([*tool, sys.executable, "-W", "ignore", __file__, "--run"], check=True)
        totals: dict[str, dict[int, int]] = {}
        for file in Path(folder).glob("callgrind.out.*"):
            text = file.read_text()
            name, total = re.search(r"desc: Trigger: .* (\S+)@(\d+)", text), re.search(r"totals: (\d+)", text)
            if name and total:
                totals.setdefault(name[1].replace("_", " "), {})[int(name[2])] = int(total[1])
    for name in sorted(totals):
        (few, first), (many, last) = sorted(totals[name].items())
        print(f"{name:40} {(last - first) / (many - few):12,.0f} instructions")


if __name__ == "__main__":
    main()
