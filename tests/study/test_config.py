from typing import Any

import pytest
import tomllib
from pydantic import BaseModel

from expressive_attention.study import config as config_module
from expressive_attention.study.config import (
    Cell,
    ConfigError,
    ModelConfig,
    SeedsConfig,
    StudyConfig,
    TrainingConfig,
    load_config,
    parse_config,
    preset_names,
    preset_text,
)
from expressive_attention.study.tasks import NTTask
from tests.study.cells import STUDY, make_cell, make_study, study_text

GRID = "[[grid]]\ntask = { basis = 4, delay = 3 }\n"


def message_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "my.toml")
    return str(caught.value)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[training]\nstep = 5\n" + GRID, "training.step: unknown key"),
        ("colour = 1\n" + GRID, "colour: unknown key"),
        ("[model]\nwidth = 5\n" + GRID, "model.width: unknown key"),
        ("[seeds]\nall = 5\n" + GRID, "seeds.all: unknown key"),
        ("[[grid]]\ntask = { basis = 4, delay = 3 }\nmodels = {}\n", "grid.0.models: unknown key"),
        ("[[grid]]\ntask = { basis = 4, delay = 3, tau = 1 }\n", "tau: unknown key"),
        ("[[grid]]\ntask = { basis = 4, delay = 3 }\nmodel = { width = 3 }\n", "width: unknown key"),
        ("[training]\nsteps = 0\n" + GRID, "training.steps"),
        ("[training]\nsteps = 'many'\n" + GRID, "training.steps"),
        ("[training]\nlearning_rates = 0.1\n" + GRID, "training.learning_rates"),
        ("[training]\nlearning_rates = []\n" + GRID, "training.learning_rates"),
        ("[training]\nlearning_rates = [0.1, 0.0]\n" + GRID, "training.learning_rates.1"),
        ("[training]\nlearning_rates = [0.1, 0.1]\n" + GRID, "training.learning_rates: values must differ"),
        ("[training]\nbetas = [0.9]\n" + GRID, "training.betas"),
        ("[training]\nbetas = [0.9, 1.0]\n" + GRID, "training.betas.1"),
        ("[training]\nschedule = 'linear'\n" + GRID, "training.schedule"),
        ("[training]\nsolved_accuracy = 1.5\n" + GRID, "training.solved_accuracy"),
        ("[training]\ngradient_clip = 0\n" + GRID, "training.gradient_clip"),
        ("[model]\nposition = 'sinusoidal'\n" + GRID, "model.position"),
        ("[model]\nembed_dim = 9\nheads = 2\n" + GRID, "embed_dim must be a multiple of heads"),
        ("[model]\nembed_dim = 6\nheads = 2\n" + GRID, "rope needs an even"),
        ("mechanisms = ['softmax']\n" + GRID, "mechanisms.0"),
        ("mechanisms = ['expressive', 'expressive']\n" + GRID, "mechanisms: values must differ"),
        ("mechanisms = []\n" + GRID, "mechanisms"),
        ("[seeds]\nfinal = 0\n" + GRID, "seeds.final"),
        ("[seeds]\ntuning = 0\n" + GRID, "seeds.tuning must be at least 1"),
        ("", "grid: Field required"),
        ("grid = []\n", "grid"),
        ("[[grid]]\nmodel = {}\n", "grid.0.task"),
        ("[[grid]]\ntask = { basis = 1, delay = 3 }\n", "basis"),
        ("[[grid]]\ntask = { basis = 4, delay = [3, 0] }\n", "delay"),
        ("[[grid]]\ntask = { basis = 4, delay = 3, context = 2 }\n", "context must be at least delay"),
        ("[[grid]]\ntask = { kind = 'copy', length = 3 }\n", "kind must be one of ['nt'], got 'copy'"),
        ("[[grid]]\ntask = { basis = [4, 4], delay = 3 }\n", "'sum, basis 4, delay 3, rope' more than once"),
        (GRID + GRID, "'sum, basis 4, delay 3, rope' more than once"),
    ],
)
def test_one_line_says_which_file_key_and_why(text, named):
    message = message_of('name = "x"\n' + text)
    assert message.startswith("my.toml: ")
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ['"a b"', '"../elsewhere"', '""', '".hidden"', "3"])
def test_a_name_that_is_no_folder_is_refused(name):
    assert "name" in message_of(f"name = {name}\n" + GRID)


def test_what_is_not_toml_is_refused():
    assert message_of('name = "x\n').startswith("my.toml: not valid TOML")


def test_all_mistakes_are_named_at_once():
    message = message_of('name = "x"\n[training]\nsteps = 0\nbatch = 1\n' + GRID)
    assert "training.steps" in message
    assert "training.batch: unknown key" in message


@pytest.mark.parametrize("values", ["basis = [], delay = 3", "basis = 4, delay = []"])
def test_a_grid_without_conditions_is_refused(values):
    assert "grid" in message_of(f'name = "x"\n[[grid]]\ntask = {{ {values} }}\n')


def test_a_kind_that_is_no_name_is_refused():
    assert "kind" in message_of('name = "x"\n[[grid]]\ntask = { kind = { a = 1 }, basis = 4, delay = 3 }\n')


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("training", 'steps = "100"'),
        ("training", "steps = true"),
        ("training", 'learning_rates = ["0.1"]'),
        ("model", 'gain = "yes"'),
        ("model", "gain = 1"),
        ("model", "layers = true"),
    ],
)
def test_values_of_another_type_are_not_cast(table, line):
    assert f"{table}.{line.split(' ')[0]}" in message_of(f'name = "x"\n[{table}]\n{line}\n{GRID}')


@pytest.mark.parametrize("value", ["basis = '4', delay = 3", "basis = true, delay = 3", "basis = 4.0, delay = 3"])
def test_values_of_a_task_are_not_cast(value):
    message_of(f'name = "x"\n[[grid]]\ntask = {{ {value} }}\n')


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_that_are_not_finite_are_refused(value):
    assert "training.learning_rates" in message_of(f'name = "x"\n[training]\nlearning_rates = [{value}]\n{GRID}')
    assert "model.embedding_std" in message_of(f'name = "x"\n[model]\nembedding_std = {value}\n{GRID}')


def test_whole_numbers_serve_where_any_number_does():
    config = parse_config('name = "x"\n[training]\nlearning_rates = [1]\ngradient_clip = 1\n' + GRID, "")
    assert config.training.learning_rates == (1.0,)
    assert config.training.gradient_clip == 1.0


# ---- presets and files ----


def test_presets_are_listed():
    assert preset_names() == ["ladder-1", "quick"]


@pytest.mark.parametrize("name", ["ladder-1", "quick"])
def test_every_preset_is_a_study_of_its_name(name):
    config, text = load_config(name)
    assert config.name == name
    assert text == preset_text(name)
    assert config == parse_config(text, name)


def test_quick_preset_is_what_the_protocol_says():
    config, _ = load_config("quick")
    assert [(task.model_dump()["basis"], task.model_dump()["delay"], model.position)
            for _, task, model in config.expanded()] == [(4, 5, "rope"), (16, 5, "rope"), (16, 5, "learned")]  # fmt: skip
    assert config.seeds.final == 8
    assert config.training.steps == 2000
    assert config.training.learning_rates == (5e-3, 1e-2, 2e-2)


def test_ladder_preset_sets_every_key_to_its_default():
    content = tomllib.loads(preset_text("ladder-1"))
    for name, kind in {"model": ModelConfig, "training": TrainingConfig, "seeds": SeedsConfig}.items():
        defaults = as_toml(kind())
        assert content[name] == {key: value for key, value in defaults.items() if value is not None}
        for key in (key for key, value in defaults.items() if value is None):
            assert f"# {key} = " in preset_text("ladder-1")
    assert content["mechanisms"] == list(StudyConfig.model_fields["mechanisms"].default)
    tops = {"name", "description", "mechanisms", "model", "training", "seeds", "grid"}
    assert content.keys() == set(StudyConfig.model_fields) == tops


def as_toml(values: BaseModel) -> dict[str, Any]:
    return {key: list(x) if isinstance(x, tuple) else x for key, x in values.model_dump().items()}


def test_unknown_presets_and_files_are_refused():
    for load in (load_config, preset_text):
        with pytest.raises(ConfigError, match="'quik'; presets are: ladder-1, quick"):
            load("quik")


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(STUDY, encoding="utf-8")
    config, text = load_config(str(path))
    assert config == make_study()
    assert text == STUDY


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"mine\.toml: cannot be read") as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


# ---- expansion ----


def test_the_grid_is_every_combination_in_order():
    config = parse_config(
        'name = "x"\n[[grid]]\ntask = { basis = [2, 3], delay = [1, 2] }\n'
        'model = { position = ["rope", "none"], layers = 2 }\n'
        '[[grid]]\ntask = { operation = "difference", basis = 5, delay = 4 }\n',
        "",
    )
    found = [(task, model.position, model.layers) for _, task, model in config.expanded()]
    assert found == [
        *((NTTask(basis=b, delay=d), position, 2) for b in (2, 3) for d in (1, 2) for position in ("rope", "none")),
        (NTTask(operation="difference", basis=5, delay=4), "rope", 1),
    ]
    labels = [label for label, _, _ in config.expanded()]
    assert labels[1] == "sum, basis 2, delay 1, none, layers 2"
    assert labels[-1] == "difference, basis 5, delay 4, rope, layers 1"
    assert [condition.label for condition in config.conditions()] == labels


def test_a_grid_changes_the_model_of_the_study():
    text = 'name = "x"\n[model]\nembed_dim = 8\ngain = false\n' + GRID + "model = { layers = 2 }\n"
    _, _, model = parse_config(text, "").expanded()[0]
    assert model == ModelConfig(embed_dim=8, gain=False, layers=2)


def test_every_condition_is_run_with_every_mechanism():
    found = [(c.condition, c.mechanism) for c in make_study(task="{ basis = [4, 5], delay = 3 }").comparisons()]
    labels = [f"sum, basis {basis}, delay 3, rope" for basis in (4, 5)]
    assert found == [(label, mechanism) for label in labels for mechanism in ("expressive", "dot_product")]


def test_cells_hold_all_seeds_in_groups():
    comparison = make_study(tuning="3", final="5", together="2").comparisons()[0]
    tuning = [(cell.learning_rate, cell.role, len(cell.seeds)) for cell in comparison.tuning_cells()]
    assert tuning == [(rate, "tuning", n) for rate in (0.003, 0.01) for n in (2, 1)]
    final = comparison.final_cells(0.01)
    assert [cell.seeds for cell in final] == [(0, 1), (2, 3), (4,)]
    assert {(cell.role, cell.learning_rate) for cell in final} == {("final", 0.01)}
    reported = {seed for cell in final for seed in cell.seeds}
    assert not reported & {seed for cell in comparison.tuning_cells() for seed in cell.seeds}


def test_nothing_is_tuned_where_there_is_one_learning_rate():
    assert make_study(learning_rates="[0.01]", tuning="0").comparisons()[0].tuning_cells() == []


# ---- identity ----


@pytest.mark.parametrize(
    "changed",
    [
        make_cell(task=NTTask(basis=3, delay=4)),
        make_cell(task=NTTask(basis=3, delay=3, context=5)),
        make_cell(task=NTTask(operation="difference", basis=3, delay=3)),
        make_cell(model={"layers": 2}),
        make_cell(model={"gain": False}),
        make_cell(model={"rope_base": 3.0}),
        make_cell(mechanism="dot_product"),
        make_cell(learning_rate=0.02),
        make_cell(role="tuning"),
        make_cell(seeds=(0, 1)),
        make_cell(seeds=(0, 1, 3)),
        make_cell(training={"steps": 13}),
        make_cell(training={"test_sequences": 17}),
        make_cell(training={"gradient_clip": 1.0}),
        make_cell(training={"early_stop": False}),
    ],
)
def test_identity_changes_with_what_a_result_depends_on(changed):
    assert changed.identity != make_cell().identity


def test_identity_changes_with_every_key_of_model_and_training():
    other: dict[str, Any] = {
        "layers": 2, "embed_dim": 4, "heads": 2, "position": "none", "rope_base": 7.0, "norm": "post",
        "norm_affine": True, "mlp_ratio": 2, "activation": "gelu", "gain": False, "qkv_bias": True, "bias": False,
        "embedding_std": 0.1, "steps": 99, "batch_size": 99, "betas": (0.5, 0.6), "warmup": 99,
        "schedule": "constant", "gradient_clip": 2.0, "evaluate_every": 99, "validation_sequences": 99,
        "test_sequences": 99, "rollouts": 99, "rollout_digits": 99, "solved_accuracy": 0.9,
        "solved_evaluations": 9, "early_stop": False,
    }  # fmt: skip
    keys = [*ModelConfig.model_fields, *TrainingConfig.model_fields]
    assert set(keys) - {"learning_rates"} == other.keys()
    cells = [make_cell(model={key: other[key]}) for key in ModelConfig.model_fields]
    cells += [make_cell(training={key: other[key]}) for key in TrainingConfig.model_fields if key in other]
    assert len({make_cell().identity, *(cell.identity for cell in cells)}) == len(cells) + 1


def test_identity_changes_with_the_protocol(monkeypatch):
    before = make_cell().identity
    monkeypatch.setattr(config_module, "PROTOCOL", "ladder-2")
    assert make_cell().identity != before


def test_identity_is_that_of_other_sessions():
    assert make_cell().identity == make_cell().identity
    assert make_cell().identity == Cell.model_validate(make_cell().model_dump() | {"task": make_cell().task}).identity
    assert make_cell().identity == IDENTITY


IDENTITY = "?"


def test_identity_does_not_change_with_labels_or_with_other_rates_tried():
    assert make_cell(condition="another label").identity == make_cell().identity
    assert make_cell(training={"learning_rates": (0.01, 0.5)}).identity == make_cell().identity


def identities(text: str) -> set[str]:
    return {
        cell.identity
        for comparison in parse_config(text, "").comparisons()
        for cell in [*comparison.tuning_cells(), *comparison.final_cells(0.01)]
    }


@pytest.mark.parametrize(
    ("extended", "new"),
    [
        ({"final": "5"}, 2 * 3),
        ({"tuning": "2"}, 2 * 2),
        ({"learning_rates": "[0.003, 0.01, 0.03]"}, 2),
        ({"task": "{ basis = [3, 4], delay = 3 }"}, 2 * 4),
        ({"name": '"other"'}, 0),
    ],
)
def test_extending_a_study_keeps_its_cells(extended, new):
    before, after = identities(STUDY), identities(study_text(**extended))
    assert before <= after
    assert len(after - before) == new
