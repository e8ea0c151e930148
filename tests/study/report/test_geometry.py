import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from expressive_attention.study.cli.app import app
from expressive_attention.study.report.attention_space import look_into
from expressive_attention.study.report.page import write_report
from expressive_attention.study.runs.results import collect
from expressive_attention.study.runs.store import Store, StoreError
from tests.integrations.torchvision_stub import make_importable

from ..report_data import diverged, trained


def ea_geometry(*arguments):
    return CliRunner().invoke(app, ["geometry", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return trained(directory), directory


def test_both_mechanisms_are_seen_on_the_same_seed(run):
    results, directory = run
    look = look_into(directory)
    assert look.title.startswith(results.conditions[0].label)
    assert list(look.records) == ["DPA", "EA"]
    assert [layer.form for record in look.records.values() for layer in record.layers.values()] == [
        "softmax",
        "expressive",
    ]
    assert len(look.tokens[0]) == look.records["EA"].layer("blocks.0.attention").query.shape[2]
    finals = results.seeds.filter(mechanism="dot_product").sort("accuracy", "seed")["seed"]
    assert look.title.endswith(f"seed {finals[0]}")
    other = look_into(directory, results.conditions[0].label, finals[1])
    kept = [each.records["EA"].layer("blocks.0.attention").query for each in (look, other)]
    assert not torch.equal(*kept)
    for arguments, words in (
        (("basis 5",), "condition must be one of"),
        ((None, 77), "no trained model of .*, seed 77"),
    ):
        with pytest.raises(StoreError, match=words):
            look_into(directory, *arguments)


def test_seeds_that_diverged_are_not_looked_at(run, tmp_path):
    """Their queries are not finite, and their accuracy is the lowest."""
    shutil.copytree(run[1], tmp_path, dirs_exist_ok=True)
    store = Store(tmp_path)
    diverged(store, "dot_product", [0])
    look = look_into(tmp_path)
    assert (look.title[-6:], list(look.records), look.diverged) == ("seed 1", ["DPA", "EA"], [])
    done = ea_geometry(tmp_path, "--seed", 0)
    assert done.stdout.startswith("not shown, since their training diverged: DPA\n\nEA\n")
    diverged(store, "expressive", [0, 1])
    look = look_into(tmp_path)
    assert (look.title[-6:], list(look.records), look.diverged) == ("seed 1", ["DPA"], ["EA"])
    done = ea_geometry(tmp_path, "--seed", 0)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "seed 0: the training of DPA, EA diverged" in done.stderr


def test_mechanisms_that_cannot_be_watched_are_named(run, monkeypatch):
    _, directory = run
    assert look_into(directory).unseen == []
    monkeypatch.setattr("expressive_attention.study.report.attention_space._SEEN", ("expressive",))
    look = look_into(directory)
    assert (list(look.records), look.unseen) == (["EA"], ["DPA"])
    monkeypatch.setattr("expressive_attention.study.report.attention_space._SEEN", ())
    with pytest.raises(StoreError, match="of a mechanism that can be watched, which DPA, EA cannot"):
        look_into(directory)


def test_the_command_writes_a_folder_and_the_report_links_it(run):
    results, directory = run
    assert "Attention space" not in write_report(results, directory).read_text()
    done = ea_geometry(directory)
    assert done.exit_code == 0, done.stderr
    assert "blocks.0.attention.head.0  expressive" in done.stdout
    assert (directory / "geometry" / "geometry.html").exists()
    link = '<a href="geometry/geometry.html">Attention space</a>'
    assert link in (directory / "report.html").read_text()  # written once more
    assert link in write_report(collect(Store(directory)), directory).read_text()


SMALL = {
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 300, "n_positions": 32},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 300},
    "vit": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16},
}


def read_by(kind, folder):
    """The command, with a model of this kind and random weights."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **SMALL[kind]}))
    (folder / "text.txt").write_text("What is seen of attention when a model reads this?")
    make_importable()
    paths = [str(folder / name) for name in ("config.json", "text.txt", "out")]
    return CliRunner().invoke(app, ["geometry", "--model", paths[0], "--text", paths[1], "--out", paths[2]])


@pytest.mark.parametrize(
    ("kind", "head"), [("gpt2", "h.1.attn.head.1"), ("t5", "decoder.block.0.layer.1.EncDecAttention.head.0")]
)
def test_a_model_of_transformers_reads_a_text(kind, head, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    done = read_by(kind, tmp_path)
    assert done.exit_code == 0, done.output
    assert f"{head}  softmax" in done.output
    assert (tmp_path / "out" / "geometry.html").exists()


def test_a_model_that_reads_no_text_is_named(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    done = read_by("vit", tmp_path)
    assert done.exit_code == 2
    assert "model must be one that reads text, got ViTModel, which has no vocabulary" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "geometry takes either the run folder of a study, e.g. runs/quick, or --model with --text"),
        (("run", "--model", "m"), "geometry takes either"),
        (("--model", "m"), "--model and --text belong together"),
        (("nowhere",), "nowhere"),
        (("--model", "m", "--text", "t", "--seed", "1"), "--condition and --seed are of a study"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ea_geometry(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("ea: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
