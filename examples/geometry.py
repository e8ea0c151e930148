"""Look into attention space: a small study, and all pictures of its models.

    pip install '.[study]'
    python examples/geometry.py [--out DIR]

The script trains EA and DPA on x_t = x_{t-1} + x_{t-3} mod 8 for a few seconds. It writes an interactive page, a table
of all heads, and PNGs, which also show how a head's angles move during training.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from expressive_attention.geometry import Record, capture, figures
from expressive_attention.geometry.folder import write_folder
from expressive_attention.study.config.cells import Cell
from expressive_attention.study.config.condition import Setting
from expressive_attention.study.config.load import parse_config
from expressive_attention.study.training.ensemble import member_state
from expressive_attention.study.training.loop import train_cell
from expressive_attention.study.training.model import build_model

STUDY = """
name = "geometry"
[training]
steps = 1500
[seeds]
final = 2
[[grid]]
task = { kind = "nt", basis = 8, delay = 3 }
"""


def records_by_step(cell: Cell, steps: set[int]) -> dict[int, Record]:
    """Records of the first seed's attention on test examples, at some steps of its training."""
    inputs = torch.from_numpy(cell.task.held_out_examples(32, "test").inputs)
    found: dict[int, Record] = {}

    def watch(step: int, active: list[int], ensemble: nn.Module) -> None:
        if step in steps:
            model = build_model(cell.task, cell.model, cell.mechanism, cell.seeds[0]).eval()
            model.load_state_dict(member_state(ensemble, 0))
            with torch.no_grad(), capture(model, max_tokens=inputs.numel()) as found[step]:
                model(inputs)

    train_cell(cell, watch=watch)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("geometry"), help="folder for pages and pictures")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # enough for small models
    config = parse_config(STUDY, "the study of this example")
    last: dict[str, Record] = {}
    for comparison in config.arms():
        (cell,) = comparison.final_cells(Setting(2e-2, 1.0))
        records = records_by_step(cell, {0, 200, 500, 1500})
        name = {"expressive": "EA", "dot_product": "DPA"}[comparison.mechanism]
        last[name] = records[1500]
        out.mkdir(parents=True, exist_ok=True)
        figures.angles_by_step(records, "blocks.0.attention", 0).savefig(out / f"angles_by_step_{name}.png", dpi=150)
        print(f"{name}\n{last[name]}\n")
    for path in write_folder(last, out, title=f"{comparison.condition}, seed 0"):
        print(path)


if __name__ == "__main__":
    main()
