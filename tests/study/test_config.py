import pytest

from expressive_attention.study.config import (
    ConfigError,
    ModelConfig,
    SeedsConfig,
    TrainingConfig,
    load_config,
    parse_config,
    tomllib,
)
from expressive_attention.study.presets import preset_names, preset_text
from expressive_attention.study.results import Setting
from tests.study.tiny import TINY, cell, tiny, tiny_config


def test_presets_can_be_read():
    assert {"quick", "ladder"} <= set(preset_names())
    for name in preset_names():
        config, text = load_config(name)
        assert (config.name, text) == (name, preset_text(name))


def test_the_quick_preset_compares_what_it_says():
    config, _ = load_config("quick")
    labels = [label for label, _, _ in config.expanded()]
    assert labels == [f"sum, basis {b}, delay 5, {p}" for b, p in ((4, "rope"), (16, "rope"), (16, "learned"))]
    assert (config.seeds.final, config.training.steps) == (8, 2000)
    assert config.training.learning_rates == (5e-3, 1e-2, 2e-2)


def test_the_ladder_preset_spells_out_the_defaults():
    text = preset_text("ladder")
    config, _ = load_config("ladder")
    assert (config.model, config.training, config.seeds) == (ModelConfig(), TrainingConfig(), SeedsConfig())
    written = tomllib.loads(text)
    for name, model in {"model": ModelConfig, "training": TrainingConfig, "seeds": SeedsConfig}.items():
        assert all(key in written[name] or f"# {key} = " in text for key in model.model_fields)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"steps": "0"}, ["training.steps", "greater than or equal to 1", "got 0"]),
        ({"embed_dim": "7"}, ["model", "rope needs an even", "7"]),
        ({"learning_rates": "[]"}, ["training.learning_rates"]),
        ({"learning_rates": "[0.1, 0.1]"}, ["training.learning_rates", "differ"]),
        ({"mechanisms": '["softmax"]'}, ["mechanisms.0", "'expressive'", "got 'softmax'"]),
        ({"tuning": "0"}, ["seeds.tuning", "at least 1"]),
        ({"task": "{ basis = 1, delay = 2 }"}, ["basis", "greater than or equal to 2"]),
        ({"task": '{ kind = "mt", basis = 4, delay = 2 }'}, ["grid.task.kind", "'mt'"]),
        ({"task": "{ basis = [4, 4], delay = 2 }"}, ["more than once", "basis 4"]),
        ({"name": '"../up"'}, ["name", "pattern"]),
        ({"steps": "x"}, ["not valid TOML"]),
    ],
)
def test_wrong_values_give_one_line_that_names_the_key(replaced, words):
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny(**replaced), "file.toml")
    message = str(caught.value)
    assert message.startswith("file.toml: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("where", "key"), [("[model]", "model.width"), ("[training]", "training.width")])
def test_unknown_keys_are_errors(where, key):
    with pytest.raises(ConfigError, match=f"{key}: unknown key"):
        parse_config(TINY.replace(where, f"{where}\nwidth = 3"), "x")
    with pytest.raises(ConfigError, match=r"no preset or file 'quik'; presets are: .*quick"):
        load_config("quik")


def test_the_grid_is_the_product_of_its_lists():
    text = TINY.replace("basis = 4", "basis = [4, 6]") + 'model = { position = ["rope", "none"] }\n'
    found = [(task.model_dump()["basis"], model.position) for _, task, model in parse_config(text, "x").expanded()]
    assert found == [(4, "rope"), (4, "none"), (6, "rope"), (6, "none")]


def test_an_identity_changes_with_all_that_matters_and_nothing_else():
    changed = [
        cell(),
        cell("dot_product"),
        cell(seeds=(0,)),
        cell(rate=2e-2),
        cell(steps=31),
        cell(model={"position": "learned"}),
        cell(task=cell().task.model_copy(update={"basis": 5})),
        cell().model_copy(update={"role": "tuning"}),
    ]
    assert len({c.identity for c in changed}) == len(changed)
    assert cell().model_copy(update={"condition": "other words"}).identity == cell().identity
    assert cell(learning_rates=(1e-2,)).identity == cell().identity


def test_more_seeds_keep_the_cells_there_are():
    few, many = (tiny_config(final=n).comparisons()[0] for n in ("2", "6"))
    kept = {c.identity for c in few.final_cells(Setting(1e-2, 1.0))}
    assert kept < {c.identity for c in many.final_cells(Setting(1e-2, 1.0))}
    tuning, final = (
        {s for c in cells for s in c.seeds} for cells in (many.tuning_cells(), many.final_cells(Setting(1e-2, 1.0)))
    )
    assert not tuning & final
