"""A mistake in a task of a user's own costs no training: it is found before any work, and said in one line."""

import pytest

from expressive_attention.study.config.load import load_config
from expressive_attention.study.errors import ConfigError
from tests.study.own_files import ECHO, no_tasks_are_left, no_tasks_are_there, written  # noqa: F401 two fixtures

FACTS = "super().facts() | "
EXAMPLES = "Examples(inputs, targets)"


def with_method(member, result, arguments="self, examples"):
    return f"{ECHO}\n    def {member}({arguments}):\n        return {result}\n"


def with_facts(result):
    return with_method("facts", result, "self")


def with_property(member, result):
    return f"{ECHO}\n    @property\n    def {member}(self):\n        return {result}\n"


def contexts(result):
    return with_method("contexts", result)


def continued(result):
    return with_method("continued", result, "self, examples, tokens")


SHAPE = "(8, 16)"  # of the first examples that are looked at
GIVEN = "give None or identifiers, uint64, of shape (8, k) with k from 1 to 16, got"
MISTAKES = [
    # properties
    (ECHO.replace('return f"echo, basis {self.basis}, delay {self.delay}"', "return 3"),
     "label must be a text of one line, got 3"),
    (ECHO.replace('f"echo, ', 'f"a\\necho, '), r"label must be a text of one line, got 'a\necho, basis"),
    (with_property("formula", "3"), "formula must be a text of one line, got 3"),
    (with_property("is_causal", "'no'"), "is_causal must be True or False, got 'no'"),
    (with_property("fixed_data", "np.True_"), "fixed_data must be True or False, got np.True_"),
    (with_property("input_dim", "0"), "input_dim must be None or an integer of at least 1, got 0"),
    (ECHO.replace("return self.basis\n", "return True\n"), "vocab_size must be an integer of at least 1, got True"),
    (ECHO.replace("self.delay * math.log2(self.basis)", "10**400"), "complexity must be a finite number, got 1000"),
    (ECHO.replace("self.delay * math.log2(self.basis)", "10**9999"), "finite number, got a value of type int"),
    (ECHO.replace("1 / self.basis", "np.float32(0.5)"), "chance must be a finite number, got"),
    (ECHO.replace("1 / self.basis", "2.0"), "chance must be from 0 to 1, got 2.0"),
    (ECHO.replace("    context: int", "    more: tuple = (1, None)\n    context: int"),
     "its fields must be values that TOML has: TypeError"),
    (ECHO.replace("    context", "    _x: object = PrivateAttr(default_factory=lambda: (x for x in ()))\n    context")
         .replace("import Field", "import Field, PrivateAttr"),
     "its fields must be values that pickle takes to other processes: TypeError"),
    (with_facts("{}"), "facts() must have 'complexity', as those of Task do, got []"),
    (with_facts("None"), "facts() must give a dictionary, got None"),
    (with_facts(FACTS + "{3: 1}"), "facts() must have texts as keys, got 3"),
    (with_facts(FACTS + "{'odd': np.float32(1)}"), "facts() must give a number, a text or a truth value for 'odd'"),
    (with_facts(FACTS + "{'ceiling': float('nan')}"), "a number, a text or a truth value for 'ceiling'"),
    (with_facts(FACTS + "{'ceiling': None}"), "facts() must give a finite number for 'ceiling', got None"),
    # examples
    (ECHO.replace(EXAMPLES, "Examples(inputs.tolist(), targets)"), "training_examples must give inputs, an array"),
    (ECHO.replace(EXAMPLES, "Examples(inputs, None)"), "training_examples must give targets, an array, got None"),
    (ECHO.replace(EXAMPLES, "(inputs, targets)"), "training_examples must give Examples, got (array"),
    (ECHO.replace('return self.examples(stream(0, f"echo {purpose}"), count)', "return None"),
     "held_out_examples must give Examples, got None"),
    (ECHO.replace('f"echo {purpose}"), count)', 'f"echo {purpose}"), min(count, 15) + (count > 15) * 2)'),
     "held_out_examples(16, 'validation') must give 1 to 16 examples, got 17"),
    (ECHO.replace(EXAMPLES, "Examples(inputs, targets, [1])"), "groups as None or integers of shape (8,), got [1]"),
    (with_method("scored", "np.ones(3, bool)"), f"scored(examples) must give truth values of shape {SHAPE}, got (3,)"),
    (with_method("scored", "np.ones(examples.targets.shape, int)"), f"shape {SHAPE}, got {SHAPE}, int64"),
    (with_method("scored", "[True]"), f"scored(examples) must give truth values of shape {SHAPE}, got [True]"),
    (with_method("scored", "np.ones(examples.targets.shape, bool)"), "leave out positions whose target is IGNORED"),
    # measures, which are asked after a training alone
    (with_method("solve", "[1]", "self, inputs").replace("self.solve(inputs)", "np.roll(inputs, self.delay, axis=1)"),
     f"solve(inputs) must give None or an array of the shape {SHAPE}, got [1]"),
    (with_method("ceiling", "None"), f"ceiling(examples) must give numbers of shape {SHAPE}, got None"),
    (with_method("ceiling", "np.ones(3)"), f"ceiling(examples) must give numbers of shape {SHAPE}, got (3,), float64"),
    (with_method("ceiling", "np.full(examples.targets.shape, 2.0)"), "numbers from 0 to 1, got 2 to 2"),
    (with_method("splits", "None"), "splits(examples) must give a dictionary, got None"),
    (with_method("splits", "{3: examples.targets}"), "splits(examples) must have texts as keys, got 3"),
    (with_method("splits", "{'x': [1]}"), f"splits(examples) must give integers of shape {SHAPE} for 'x', got [1]"),
    (with_method("splits", "{'x': np.ones(3, int)}"), f"integers of shape {SHAPE} for 'x', got (3,), int64"),
    (with_method("splits", "{'x': np.ones(examples.targets.shape)}"), f"for 'x', got {SHAPE}, float64"),
    (with_method("splits", "1 / 0"), "ZeroDivisionError: division by zero"),
    (with_method("group_name", "3", "self, split, group"), "group_name('position', 2) must be a text, got 3"),
    (with_method("group_name", "['a'][group - 2]", "self, split, group"), "IndexError: list index out of range"),
    (contexts("[3]"), f"contexts(examples) must {GIVEN} [3]"),
    (contexts("np.ones((len(examples), 2))"), f"contexts(examples) must {GIVEN} (8, 2), float64"),
    (contexts("np.ones((len(examples), 99), np.uint64)"), f"contexts(examples) must {GIVEN} (8, 99), uint64"),
    (contexts("np.ones((len(examples), 0), np.uint64)"), f"contexts(examples) must {GIVEN} (8, 0), uint64"),
    (contexts("np.ones(len(examples), np.uint64)"), f"contexts(examples) must {GIVEN} (8,), uint64"),
    (contexts("None if len(examples) == 1 else np.ones((len(examples), 2), np.uint64)"),
     "contexts(examples) must give identifiers of the same positions for all examples, got"),
    (contexts("np.ones((len(examples), 3), np.uint64)").replace(
        "targets[:, : self.delay]", "targets[:, -3:] = IGNORED\n        targets[:, : self.delay]"
    ), "contexts(examples) must reach a scored position, got the last 3"),
    (continued("[1]"), "continued(examples, tokens) must give None or two arrays, prompts and continuations, got [1]"),
    (continued("(examples.inputs * 1.0, examples.inputs[:, :tokens])"), "prompts (n, p), int64, got (8, 16), float64"),
    (continued("(examples.inputs, examples.inputs)"), "continuations of shape (8, 4), int64, got (8, 16), int64"),
    (continued("(examples.inputs + 99, examples.inputs[:, :tokens])"), "prompts from 0 to vocab_size - 1 = 3, got 99"),
    (continued("1 / 0"), "ZeroDivisionError: division by zero"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "words"), MISTAKES, ids=[words[:50] for _, words in MISTAKES])
def test_a_mistake_is_named_before_any_work(tmp_path, source, words):
    assert source != ECHO
    with pytest.raises(ConfigError) as caught:
        load_config(str(written(tmp_path, source)))
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert words in said
    assert "echo.py: EchoTask: " in said or "echo.py, line " in said


def test_members_are_asked_as_a_study_asks_them(tmp_path):
    """A group, or an example, may be wrong that is none of the first ones."""
    source = with_method(
        "splits", "{'odd': np.broadcast_to(np.arange(len(examples))[:, None], examples.targets.shape)}"
    )
    source += "\n    def group_name(self, split, group):\n        return 'few' if group < 15 else group\n"
    with pytest.raises(ConfigError, match=r"group_name\('odd', 15\) must be a text, got 15"):
        load_config(str(written(tmp_path, source)))


def test_a_task_that_overrides_everything_rightly_is_taken(tmp_path):
    source = (
        with_method("ceiling", "np.ones(examples.targets.shape, int)")
        + "\n    def contexts(self, examples):\n        return examples.inputs[:, :3].astype(np.uint64)\n"
        + "\n    def continued(self, examples, tokens):\n        return examples.inputs, examples.inputs[:, :tokens]\n"
        + "\n    def facts(self):\n        return super().facts() | {'note': None, 'share': np.float64(1)}\n"
        + "\n    formula = property(lambda self: '')\n"
    )
    assert load_config(str(written(tmp_path, source)))[0].record().tasks
