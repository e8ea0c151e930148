"""Names that the documentation once taught are the names of today, at their old paths."""

import importlib
import subprocess
import sys

import pytest

from expressive_attention.study.config.condition import Condition, Setting
from expressive_attention.study.config.load import load_config, parse_config
from expressive_attention.study.report.twins import load_twins
from expressive_attention.study.runs.results import collect
from expressive_attention.study.tasks.recall.mqar import MQARTask
from expressive_attention.study.tasks.rng import stream
from expressive_attention.study.training.loop import train_cell
from expressive_attention.study.training.model import trained_model


@pytest.mark.parametrize(
    ("module", "name", "thing"),
    [
        ("streams", "stream", stream),
        ("results", "Setting", Setting),
        ("results", "Condition", Condition),
        ("results", "collect", collect),
        ("twins", "load_twins", load_twins),
        ("tasks.mqar", "MQARTask", MQARTask),
        ("config", "parse_config", parse_config),
        ("config", "load_config", load_config),
        ("training", "train_cell", train_cell),
        ("training", "trained_model", trained_model),
    ],
)
def test_a_name_can_be_imported_from_its_old_path(module, name, thing):
    old = importlib.import_module(f"expressive_attention.study.{module}")
    with pytest.warns(FutureWarning, match=rf"study\.{module}\.{name} has moved to expressive_attention\.study\.\w+"):
        assert getattr(old, name) is thing
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        old.nothing  # noqa: B018


def test_the_warning_names_the_file_that_imports(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("from expressive_attention.study.streams import stream\nprint(stream.__name__)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "stream\n"
    assert f"{script}:1: FutureWarning: expressive_attention.study.streams.stream has moved to" in done.stderr
