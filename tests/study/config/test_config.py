from pathlib import Path

import pytest

from expressive_attention.study.config.condition import Setting
from expressive_attention.study.config.declared import PRIMARY_COMPARISONS
from expressive_attention.study.config.load import load_config, parse_config
from expressive_attention.study.config.presets import preset_names, preset_text
from expressive_attention.study.config.schema import ModelConfig, SeedsConfig, TrainingConfig
from expressive_attention.study.config.toml import tomllib
from expressive_attention.study.errors import ConfigError
from expressive_attention.study.tasks.contexts import facts_of_test
from tests.study.tiny import TINY, cell, tiny, tiny_config


def test_presets_can_be_read():
    assert {"quick", "ladder"} <= set(preset_names())
    for name in preset_names():
        config, text = load_config(name)
        assert (config.name, text) == (name, preset_text(name))


def test_the_quick_preset_compares_what_it_says():
    config, _ = load_config("quick")
    labels = [label for label, _, _ in config.expanded()]
    assert labels == [f"sum, basis {b}, delay 5, {p}" for b, p in ((8, "rope"), (16, "rope"), (16, "learned"))]
    assert (config.seeds.final, config.training.steps) == (8, 2000)
    assert (config.training.learning_rates, config.training.initial_gains) == ((5e-3, 1e-2, 2e-2), (0.0625,))


def test_the_ladder_preset_spells_out_the_defaults():
    text = preset_text("ladder")
    config, _ = load_config("ladder")
    training = TrainingConfig(initial_gains=(0.0625, 1.0))  # which it says
    assert (config.model, config.training, config.seeds) == (ModelConfig(), training, SeedsConfig())
    written = tomllib.loads(text)
    for name, model in {"model": ModelConfig, "training": TrainingConfig, "seeds": SeedsConfig}.items():
        assert all(key in written[name] or f"# {key} = " in text for key in model.model_fields)


@pytest.mark.parametrize("name", ["wins", "_base"])
def test_a_claim_is_one_that_has_a_file(name):
    with pytest.raises(ConfigError, match=rf"claims must be of \[.*'lead_grows'.*\], got '{name}'"):
        parse_config(f'claims = ["lead_grows", "{name}"]\n{TINY}', "here")
    assert parse_config(f'claims = ["lead_grows"]\n{TINY}', "here").claims == ("lead_grows",)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"steps": "0"}, ["training.steps", "greater than or equal to 1", "got 0"]),
        ({"steps": f"{10**30}"}, ["training.steps: must be less than or equal to 1000000000", f"got {10**30}"]),
        ({"warmup": f"{10**30}"}, ["training.warmup: must be less", f"got {10**30}"]),
        ({"embed_dim": f"{10**30}"}, ["model.embed_dim: must be less", f"got {10**30}"]),
        ({"learning_rates": "[0.1, 1e308]"}, ["training.learning_rates.1: must be less than or equal to 1000000000"]),
        ({"warmup": "5\ninitial_gains = [1e308]"}, ["training.initial_gains.0: must be less", "got 1e+308"]),
        ({"warmup": "5\nweight_decay = 1e308"}, ["training.weight_decay: must be less", "got 1e+308"]),
        ({"embed_dim": "8\nembedding_std = 1e308"}, ["model.embedding_std: must be less", "got 1e+308"]),
        ({"embed_dim": "8\nembedding_shift = -1e308"}, ["model.embedding_shift: must be greater", "got -1e+308"]),
        ({"embed_dim": "7"}, ["model", "rope needs an even", "7"]),
        ({"learning_rates": "[]"}, ["training.learning_rates"]),
        ({"learning_rates": "[0.1, 0.1]"}, ["training.learning_rates", "differ"]),
        (
            {"mechanisms": '["softmax"]'},
            ["mechanisms must be of", "'expressive'", "got 'softmax'; 'dot_product' is its name here"],
        ),
        ({"mechanisms": '["EA"]'}, ["mechanisms must be of", "got 'EA'; 'expressive' is its name here"]),
        ({"mechanisms": '["tanh"]'}, ["mechanisms must be of", "got 'tanh'"]),
        ({"tuning": "0"}, ["seeds.tuning", "at least 1"]),
        ({"task": "{ basis = 1, delay = 2 }"}, ["basis", "greater than or equal to 2"]),
        ({"task": '{ kind = "mt", basis = 4, delay = 2 }'}, ["grid.task.kind", "'mt'"]),
        ({"task": "{ basis = [4, 4], delay = 2 }"}, ["more than once", "basis 4"]),
        ({"name": '"../up"'}, ["name", "pattern"]),
        ({"steps": "x"}, ["not valid TOML"]),
        ({"mechanisms": "[]"}, ["mechanisms: must have at least 1 item, got []"]),
        ({"learning_rates": "[]"}, ["training.learning_rates: must have at least 1 item, got []"]),
        ({"tuning": "1.5"}, ["seeds.tuning: must be a valid integer, got 1.5"]),
        ({"task": "{ basis = '4', delay = 2 }"}, ["grid.task.basis: must be a valid integer, got '4'"]),
        (
            {"task": "{ basis = 4, width = 2 }"},
            ["grid.task.width: unknown key; known keys are kind, basis, delay, context, operation"],
        ),
        (
            {"task": "{ basis = 4, delay = 2 }\nmodel = { width = 2 }"},
            ["grid.model.width: unknown key; known keys are layers, embed_dim, heads, position"],
        ),
        (
            {"task": "{ basis = 4, delay = 2 }\nmodle = 3"},
            ["file.toml: grid.0.modle: unknown key; known keys are task, mo"],
        ),
        ({"name": '"tiny"\nprotocol = [3]'}, ["protocol: must be 2 or 3, got [3]"]),
        ({"name": '"tiny"\nprotocol = { a = 1 }'}, ["protocol: must be 2 or 3"]),
        (
            {"name": '"tiny"\ntask_files = ["a\\u0000.py"]'},
            [r"task_files: names must end with .py, without NUL, got 'a\x00"],
        ),
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
    with pytest.raises(ConfigError, match=r"no preset or file 'quik' \(did you mean 'quick'\?\); presets are: .*quick"):
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
    few, many = (tiny_config(final=n).arms()[0] for n in ("2", "6"))
    kept = {c.identity for c in few.final_cells(Setting(1e-2, 1.0))}
    assert kept < {c.identity for c in many.final_cells(Setting(1e-2, 1.0))}
    tuning, final = (
        {s for c in cells for s in c.seeds} for cells in (many.tuning_cells(), many.final_cells(Setting(1e-2, 1.0)))
    )
    assert not tuning & final


# ---- protocol 3 ----


def test_the_primary_family_is_what_the_presets_declare():
    """Each comparison of EA with DPA once, in however many presets it stands."""
    declared = set()
    for name in preset_names():
        config, _ = load_config(name)
        if config.family == "primary":
            training = config.training.model_dump_json()
            declared |= {
                (task.model_dump_json(), model.model_dump_json(), training, config.seeds.start)
                for _, task, model in config.expanded()
            }
    assert len(declared) == PRIMARY_COMPARISONS
    page = Path(__file__).parents[3] / "docs" / "protocol.md"
    assert f"{PRIMARY_COMPARISONS} comparisons" in page.read_text(encoding="utf-8")


# Where a step is expensive; the presets say what they depart from, and docs/protocol.md lists them.
ON_TEXT = {"text", "text_codes", "text_mechanisms", "text_wide"}


@pytest.mark.parametrize("name", sorted(set(preset_names()) - {"quick", "vision"} - ON_TEXT))
def test_presets_have_the_seeds_that_the_protocol_asks_for(name):
    config, _ = load_config(name)
    assert config.protocol == 3
    assert config.seeds.tuning >= 8
    assert config.seeds.final >= 16
    for _, task, _ in config.expanded():
        facts = facts_of_test(task, config.training.test_sequences)
        assert facts["predictions"] >= 512, task.label
        assert facts["contexts"] >= 256, task.label


def test_presets_on_text_give_all_mechanisms_the_same_and_decide_nothing():
    page = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")
    trainings, models = set(), set()
    for name in ON_TEXT:
        config, _ = load_config(name)
        assert (config.family, config.claims) == ("own", ())
        assert config.seeds.final >= 4
        assert config.training.initial_gains == (0.25, 1.0)
        assert f"`{name}`" in page
        if name != "text":
            trainings.add(config.training.model_dump_json())
        if name in ("text_codes", "text_mechanisms"):
            models.add((config.seeds.model_dump_json(), config.model))
    assert len(trainings) == 1
    assert len(models) == 1  # together they are one table


def test_tuning_may_be_shorter():
    def cells(**replaced):
        first = tiny_config(**replaced).arms()[0]
        return first.tuning_cells() + first.final_cells(Setting(1e-2, 1.0))

    whole, shorter = cells(), cells(steps="30\ntuning_steps = 10")
    assert [c.training.steps for c in shorter] == [10] * 2 + [30]
    assert [c.training.steps for c in whole] == [30] * 3
    assert shorter[-1].identity == whole[-1].identity
    alone = cells(steps="10")
    assert [c.identity for c in shorter[:2]] == [c.identity for c in alone[:2]]
    with pytest.raises(ConfigError, match="tuning_steps must be at most steps, got 31 and 30"):
        cells(steps="30\ntuning_steps = 31")


def test_codes_of_position_have_one_spelling():
    def model(position):
        return parse_config(f"{TINY}model = {{ position = {position} }}\n", "x").expanded()

    assert model('"relative+rope"')[0][2] == model('"rope+relative"')[0][2]
    assert [label for label, _, _ in model('["rope", "learned_alibi+rope"]')] == [
        "sum, basis 4, delay 2, rope",
        "sum, basis 4, delay 2, rope+learned_alibi",
    ]
    with pytest.raises(ConfigError, match=r"the condition '.*rope\+relative' more than once"):
        model('["rope+relative", "relative+rope"]')
    with pytest.raises(ConfigError, match=r"position must be one of .*'rope\+rotary'"):
        model('"rope+rotary"')
    with pytest.raises(ConfigError, match=r"rope needs an even embed_dim / heads, got 9 / 3"):
        parse_config(f'{TINY}model = {{ position = "rope+relative", embed_dim = 9, heads = 3 }}\n', "x")


def test_seeds_can_start_anywhere():
    first, other = (parse_config(tiny() + "", "x"), parse_config(TINY.replace("[seeds]", "[seeds]\nstart = 9000"), "x"))
    for one, moved in zip(first.arms(), other.arms(), strict=True):
        for cells in (lambda c: c.tuning_cells(), lambda c: c.final_cells(Setting(1e-2, 1.0))):
            seeds = [[seed for cell in cells(c) for seed in cell.seeds] for c in (one, moved)]
            assert seeds[1] == [seed + 9000 for seed in seeds[0]]
    confirming = [s for c in other.arms()[0].confirmation_cells(Setting(1e-2, 1.0)) for s in c.seeds]
    assert confirming == list(range(2_009_000, 2_009_032))
    with pytest.raises(ConfigError, match=r"seeds: start \+ final must be at most 1000000"):
        parse_config(TINY.replace("[seeds]", "[seeds]\nstart = 999_999"), "x")


def test_early_stopping_is_of_protocol_2():
    stopping = TINY.replace("[training]", "[training]\nearly_stop = true")
    with pytest.raises(
        ConfigError, match=r"training\.early_stop is of protocol 2: protocol 3 trains every seed to the end"
    ):
        parse_config(stopping, "x")
    assert parse_config(stopping, "x", protocol=2).training.early_stop
    assert not parse_config(f"protocol = 3\n{TINY}", "x", protocol=2).training.early_stop
    with pytest.raises(ConfigError, match=r"training\.early: unknown key; known keys are steps, (?!.*early_stop)"):
        parse_config(TINY.replace("[training]", "[training]\nearly = true"), "x")


class OnDisk:
    """Cells that are finished."""

    def __init__(self, *cells):
        self.cells = cells

    def has(self, cell):
        return cell.identity in [c.identity for c in self.cells]

    def lengths(self):
        found = {}
        for c in self.cells:
            found.setdefault(c.seeds[0], []).append(len(c.seeds))
        return {first: sorted(lengths, reverse=True) for first, lengths in found.items()}


def final_cells(final, finished=(), together=16, start=0):
    text = tiny(final=str(final), together=str(together)).replace("[seeds]", f"[seeds]\nstart = {start}")
    return parse_config(text, "x").arms()[0].final_cells(Setting(1e-2, 1.0), OnDisk(*finished))


@pytest.mark.parametrize(
    ("before", "now", "seeds"),
    [  # final, together, start: as the study ran, and as it is now
        ((20, 16, 0), (18, 16, 0), [(0, 16, 16), (16, 20, 18)]),
        ((16, 16, 0), (8, 16, 0), [(0, 16, 8)]),
        ((16, 16, 0), (16, 6, 0), [(0, 16, 16)]),
        ((16, 16, 0), (20, 6, 0), [(0, 16, 16), (16, 18, 18), (18, 20, 20)]),
        ((16, 4, 0), (10, 16, 0), [(0, 4, 4), (4, 8, 8), (8, 12, 10)]),
        ((8, 16, 4), (16, 16, 0), [(0, 4, 4), (4, 12, 12), (12, 16, 16)]),
        ((8, 16, 20), (8, 16, 0), [(0, 8, 8)]),
    ],
)
def test_no_finished_seed_is_trained_again(before, now, seeds):
    finished = final_cells(before[0], (), *before[1:])
    found = final_cells(now[0], finished, *now[1:])
    assert [c.seeds for c in found] == [tuple(range(first, stop)) for first, stop, _ in seeds]
    assert [c.counted for c in found] == [tuple(range(first, counted)) for first, _, counted in seeds]
    old = {c.seeds: c.identity for c in finished}
    assert all(old[c.seeds] == c.identity for c in found if c.seeds in old)
    trained_twice = {s for c in finished for s in c.seeds} & {s for c in found if c.seeds not in old for s in c.seeds}
    assert not trained_twice


def test_seeds_of_a_finished_cell_are_not_trained_again():
    cells = final_cells
    (eight,) = cells(8)
    grown = cells(20, [eight])
    assert [c.seeds for c in grown] == [tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 20))]
    assert grown[0].identity == eight.identity
    assert [c.seeds for c in cells(20)] == [tuple(range(16)), tuple(range(16, 20))]
    more = cells(20, grown[:2])
    assert [c.identity for c in more] == [c.identity for c in grown]
