import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "needs", "lines"),
    [
        (
            "swap_sdpa",
            "torch",
            ["EA ran in 2/2 layers", "the same outputs: True", "undone, outputs are as they were: True"],
        ),
        ("convert_huggingface", "transformers", ["EA ran in 4/4 layers", "saved and loaded, the same logits: True"]),
        ("convert_timm", "timm", ["12 of 12 attention layers switched, form 'expressive'", "EA ran in 12/12 layers"]),
    ],
)
def test_an_example_prints_the_table_and_the_proof(name, needs, lines, capsys):
    pytest.importorskip(needs)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert set(lines) <= set(said)
    assert any(line.startswith("layer ") for line in said)
