"""Trained twins go to files, and come back as the same models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from expressive_attention.geometry import capture
from expressive_attention.study.analysis.trained import cells_by_seed
from expressive_attention.study.cli.app import app
from expressive_attention.study.config.load import parse_config
from expressive_attention.study.report.twins import TwinsError, load_twins, write_twins
from expressive_attention.study.runs.store import Store, StoreError
from expressive_attention.study.training.model import trained_model

from ..report_data import diverged, trained
from ..tiny import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return trained(directory), directory


def own_model(results, directory, mechanism, condition, seed):
    store = Store(directory)
    config, _ = store.config()
    comparison = next(c for c in config.arms() if (c.condition, c.mechanism) == (condition, mechanism))
    cell = cells_by_seed(results, store, comparison)[seed]
    return trained_model(cell, store.load(cell, weights=True).weights, cell.seeds.index(seed)).eval(), cell


def test_the_models_are_those_of_the_study(run, tmp_path):
    results, directory = run
    label = results.conditions[0].label
    seed = results.seeds.filter(role="final", condition=label)["seed"].max()
    files = write_twins(str(directory), str(tmp_path / "twins"), label, seed)
    assert sorted(path.name for path in files) == sorted(path.name for path in (tmp_path / "twins").iterdir())
    twins = load_twins(tmp_path / "twins")
    assert sorted(twins.models) == sorted(results.mechanisms)
    for mechanism, model in twins.models.items():
        own, cell = own_model(results, directory, mechanism, label, seed)
        assert not model.training
        with torch.no_grad():
            assert torch.equal(model(twins.inputs), own(twins.inputs))
        row = results.seeds.filter(role="final", condition=label, mechanism=mechanism, seed=seed).row(0, named=True)
        about = twins.about[mechanism]
        assert (about["study"], about["condition"], about["seed"]) == (results.name, label, seed)
        assert about["accuracy"] == row["accuracy"]
        assert about["cross_entropy"] == row["cross_entropy"]
        assert about["task"]["kind"] == "nt"
        held_out = cell.task.held_out_examples(64, "validation")
        assert torch.equal(twins.inputs, torch.from_numpy(held_out.inputs))
        assert torch.equal(twins.targets, torch.from_numpy(held_out.targets))


def test_seeds_that_diverged_have_no_twins(run, tmp_path):
    """A seed on which one mechanism diverged is no pair, whatever the others did."""
    shutil.copytree(run[1], tmp_path / "run")
    store = Store(tmp_path / "run")
    chosen = []
    for lost in (0, 1):
        diverged(store, "expressive", [lost])
        write_twins(tmp_path / "run", tmp_path / "twins")
        chosen.append({about["seed"] for about in load_twins(tmp_path / "twins").about.values()})
        with pytest.raises(StoreError, match=f"no usable models of .*, seed {lost}: their training diverged"):
            write_twins(tmp_path / "run", tmp_path / "twins", None, lost)
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(run[1], tmp_path / "run")
    assert chosen == [{1}, {0}]
    diverged(store, "expressive", [0])
    diverged(store, "dot_product", [1])
    with pytest.raises(StoreError, match=r"no usable models of [^:]*: their training diverged"):
        write_twins(tmp_path / "run", tmp_path / "twins")


def test_twins_can_be_watched(run, tmp_path):
    write_twins(run[1], tmp_path)
    twins = load_twins(str(tmp_path))
    forms = {}
    for mechanism, model in twins.models.items():
        with torch.no_grad(), capture(model) as record:
            model(twins.inputs)
        forms[mechanism] = {layer.form for layer in record.layers.values()}
    assert forms == {"expressive": {"expressive"}, "dot_product": {"softmax"}}


def test_half_the_size_is_almost_the_same_model(run, tmp_path):
    whole, half = write_twins(run[1], tmp_path / "whole"), write_twins(run[1], tmp_path / "half", half=True)
    sizes = [
        sum(path.stat().st_size for path in files if path.name != "examples.safetensors") for files in (whole, half)
    ]
    assert sizes[1] < 0.8 * sizes[0]
    exact, rounded = load_twins(tmp_path / "whole"), load_twins(tmp_path / "half")
    for mechanism, model in exact.models.items():
        for name, parameter in rounded.models[mechanism].state_dict().items():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, model.state_dict()[name].half().float())


def test_the_seed_is_the_middle_one_of_dpa(run, tmp_path):
    results, directory = run
    write_twins(directory, tmp_path)
    about = load_twins(tmp_path).about["dot_product"]
    ranked = results.seeds.filter(role="final", condition=about["condition"], mechanism="dot_product").sort(
        "accuracy", "seed"
    )
    assert about["seed"] == ranked["seed"][len(ranked) // 2]


def test_the_command_names_its_files(run):
    done = CliRunner().invoke(app, ["study", "twins", str(run[1])])
    assert done.exit_code == 0, done.output
    assert "expressive.safetensors  (" in done.output
    assert set(load_twins(run[1] / "twins").models) == {"expressive", "dot_product"}


def test_what_is_not_there_is_named(run, tmp_path):
    results, directory = run
    with pytest.raises(StoreError, match="condition must be one of"):
        write_twins(directory, tmp_path, "basis 5")
    with pytest.raises(StoreError, match=r"no trained models of .*, seed 77 that all of its mechanisms share"):
        write_twins(directory, tmp_path, results.conditions[0].label, 77)
    empty = Store(tmp_path / "empty")
    empty.create(tiny()).release()
    with pytest.raises(StoreError, match="has no trained models of"):
        write_twins(empty.directory, tmp_path, parse_config(tiny(), "x").expanded()[0][0])


def test_files_that_are_no_twins_are_named(run, tmp_path):
    with pytest.raises(TwinsError, match=r"examples.safetensors is missing"):
        load_twins(tmp_path)
    write_twins(run[1], tmp_path)
    examples, expressive = tmp_path / "examples.safetensors", tmp_path / "expressive.safetensors"
    content = expressive.read_bytes()
    expressive.write_bytes(content[: len(content) // 2])
    with pytest.raises(TwinsError, match=r"expressive.safetensors cannot be read"):
        load_twins(tmp_path)
    expressive.write_bytes(examples.read_bytes())
    with pytest.raises(TwinsError, match=r"expressive.safetensors is not the file of a trained twin"):
        load_twins(tmp_path)
    for path in tmp_path.glob("*_product.safetensors"):
        path.unlink()
    expressive.unlink()
    with pytest.raises(TwinsError, match="has no trained models"):
        load_twins(tmp_path)


def with_mechanisms(run, directory, *mechanisms):
    """The same study with these mechanisms, as far as they are trained."""
    shutil.copytree(run[1], directory, dirs_exist_ok=True)
    Store(directory).create(tiny(learning_rates="[1e-2]", mechanisms=json.dumps(mechanisms))).release()
    return directory


@pytest.mark.parametrize(
    ("others", "missing"),
    [(["squared"], "squared has none, and `ea study run` trains it"), ([], "the study has no other mechanism")],
)
def test_a_model_without_its_twin_is_named(run, others, missing, tmp_path):
    directory = with_mechanisms(run, tmp_path / "run", "expressive", *others)
    with pytest.raises(StoreError, match=f"of expressive alone, which have no twins: {missing}"):
        write_twins(directory, tmp_path / "twins")
    assert not (tmp_path / "twins").exists()


def test_the_command_names_mechanisms_that_are_not_there(run, tmp_path):
    directory = with_mechanisms(run, tmp_path / "run", "expressive", "dot_product", "squared")
    done = CliRunner().invoke(app, ["study", "twins", str(directory)])
    assert (done.exit_code, done.stderr) == (0, "not written: squared, not trained yet, or defined in a Python file\n")
    assert sorted(load_twins(directory / "twins").models) == ["dot_product", "expressive"]


def test_models_that_are_no_twins_are_not_read_as_twins(run, tmp_path):
    results, directory = run
    label = results.conditions[0].label
    for seed in (0, 1):
        write_twins(directory, tmp_path / str(seed), label, seed)
    mixed = tmp_path / "0"
    for name in ("expressive", "examples"):
        own = (mixed / f"{name}.safetensors").read_bytes()
        (mixed / f"{name}.safetensors").write_bytes((tmp_path / "1" / f"{name}.safetensors").read_bytes())
        with pytest.raises(
            TwinsError, match=r"mixes models that are no twins: seed is \d in .* and \d in .*safetensors"
        ):
            load_twins(mixed)
        (mixed / f"{name}.safetensors").write_bytes(own)
    (mixed / "copy.safetensors").write_bytes((mixed / "expressive.safetensors").read_bytes())
    with pytest.raises(TwinsError, match=r"two models of expressive, one of them in expressive\.safetensors"):
        load_twins(mixed)


def test_files_of_an_earlier_call_go_and_others_stay(run, tmp_path):
    write_twins(run[1], tmp_path)
    (tmp_path / "expressive.safetensors").rename(tmp_path / "squared.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "mine.safetensors")
    write_twins(run[1], tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["dot_product", "examples", "expressive", "mine"]
