"""Does expressive attention use the sign? Matches of EA and DPA on one task, from the start of training to its end.

    pip install '.[study]'
    python examples/signs.py [--seeds N] [--steps N]

The task is one of the ladder: x_t = x_{t-1} + x_{t-5} mod 16, one layer, one head, RoPE. The digit that a query needs
besides its own is at a fixed distance, the *target*. The script uses the seeds of `ea study run ladder`, with gains
that start at 1 and a learning rate of 2e-2. At the end it sets the antiparallel half of the weights of trained EA
models to zero, or the parallel half, and measures their accuracy.
"""

import argparse
from collections import defaultdict

import torch
from torch import Tensor, nn

from expressive_attention.geometry import capture
from expressive_attention.nn import Transformer
from expressive_attention.study.config.cells import Cell
from expressive_attention.study.config.condition import Setting
from expressive_attention.study.config.load import load_config
from expressive_attention.study.tasks import IGNORED
from expressive_attention.study.training.ensemble import member_state
from expressive_attention.study.training.loop import train_cell
from expressive_attention.study.training.model import build_model

CONDITION, RATE, DELAY = "sum, basis 16, delay 5, rope, embed_dim 16, heads 1", 2e-2, 5


def cell_of(mechanism: str, seeds: int, steps: int) -> Cell:
    """Return the ladder's cell with the final seeds."""
    comparisons = load_config("ladder")[0].arms()
    chosen = next(c for c in comparisons if c.condition == CONDITION and c.mechanism == mechanism)
    cell = chosen.final_cells(Setting(RATE, 1.0))[0]
    training = cell.training.model_copy(update={"steps": steps})
    return cell.model_copy(update={"training": training, "seeds": cell.seeds[:seeds]})


def model_of(cell: Cell, state: dict[str, Tensor], mechanism: str) -> Transformer:
    """Return a model with these weights and this mechanism."""
    model = build_model(cell.task, cell.model, mechanism, 0)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def matches(model: nn.Module, inputs: Tensor) -> tuple[float, float, float]:
    """Share of targets with z < 0, attention to targets, and the antiparallel share of those that get most of it."""
    with capture(model, max_tokens=inputs.numel()) as record:
        model(inputs)
    (layer,) = record.layers.values()
    queries = torch.arange(DELAY - 1, inputs.shape[1])
    z, a = (
        torch.stack([of(example)[0, queries, queries - (DELAY - 1)] for example in range(len(inputs))])
        for of in (layer.scores, layer.attention)
    )
    decisive = a > 0.5
    antiparallel = (z[decisive] < 0).double().mean().item() if decisive.any() else float("nan")
    return (z < 0).double().mean().item(), a.mean().item(), antiparallel


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Share of correct digits."""
    right = model(inputs).argmax(-1) == targets
    return right[targets != IGNORED].double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # enough for small models
    for mechanism, name in (("expressive", "EA"), ("dot_product", "DPA")):
        cell = cell_of(mechanism, arguments.seeds, arguments.steps)
        examples = cell.task.held_out_examples(64, "test")
        inputs, targets = torch.from_numpy(examples.inputs), torch.from_numpy(examples.targets)
        watched = {0, *(arguments.steps // part // 100 * 100 for part in (10, 3, 1))}
        seen: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
        last: list[dict[str, Tensor]] = []

        def watch(step: int, active: list[int], model: nn.Module) -> None:
            if step in watched:  # noqa: B023 called only in this iteration
                last[:] = [member_state(model, place) for place in range(len(active))]  # noqa: B023
                seen[step] += [matches(model_of(cell, state, mechanism), inputs) for state in last]  # noqa: B023

        result = train_cell(cell, watch=watch)
        solved = torch.tensor(result.seeds["solved"].to_list())
        print(f"{name}: {int(solved.sum())} of {len(solved)} seeds solved")
        print("  step  seeds     targets with z < 0   attention to targets   antiparallel among a > 1/2")
        for step, found in seen.items():
            table = torch.tensor(found)
            for which, rows in (("solved", table[solved]), ("unsolved", table[~solved])):
                if len(rows):
                    share, attention, decisive = rows.nanmean(0).tolist()
                    print(f"  {step:4}  {which:8}  {share:18.2f}   {attention:20.2f}   {decisive:26.2f}")
        if mechanism == "expressive":
            halves = defaultdict(list)
            for state in last:
                halves["whole"].append(accuracy(model_of(cell, state, "expressive"), inputs, targets))
                halves["without antiparallel"].append(accuracy(model_of(cell, state, "one_sided"), inputs, targets))
                turned = {key: -x if key.endswith("gain.weight") else x for key, x in state.items()}
                halves["without parallel"].append(accuracy(model_of(cell, turned, "one_sided"), inputs, targets))
            for what, values in halves.items():
                print(f"  accuracy, {what}: {sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
