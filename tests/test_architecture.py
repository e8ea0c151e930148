"""Imports point one way, as ARCHITECTURE.md draws them, and functions have few parameters."""

import ast
import re

from tests.architecture import PACKAGE, PAGE, ROOMS, ROOT, edges, room_of, with_picture

# Functions that users or other libraries call; their parameters are not ours to choose.
PUBLIC = {
    "functional.expressive_attention",
    "varlen.expressive_attention_varlen",
    "nested.nested_attention",
    "near_far.near_far_attention",
    "sparse.select",
    "distributed.context.context_parallel",
    "nn.attention.__init__",
    "nn.multihead.__init__",
    "nn.near_far.__init__",
    "nn.multihead.forward",
    "nn.multihead.multi_head_attention_forward",  # as in torch
    "nn.transformer.__init__",
    "integrations.huggingface._attention",  # called by transformers
    "integrations.marks._load",  # called by torch
    "integrations.x_transformers.forward",
}


def test_imports_point_one_way():
    order = list(ROOMS)
    wrong = {pair: files for pair, files in edges().items() if order.index(pair[0]) < order.index(pair[1])}
    assert wrong == {}


def test_every_module_has_a_room():
    names = [path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()]
    names = [name for name in names if not name.startswith("__") and name != "py.typed"]
    assert [name for name in names if room_of(name) is None] == []


def test_the_picture_is_that_of_the_imports():
    """`python tests/architecture.py` draws it anew."""
    page = PAGE.read_text()
    assert page == with_picture(page)


def test_the_rooms_of_the_study_import_those_above_them():
    rooms = re.findall(r"^\| `(\w+)/` \|", PAGE.read_text(), re.MULTILINE)
    study = PACKAGE / "study"
    assert set(rooms) == {path.parent.name for path in study.glob("*/__init__.py")}
    wrong = []
    for path in study.rglob("*.py"):
        folder = path.relative_to(study).parent.parts
        if not folder:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(folder) + 1:
                names = [node.module] if node.module else [x.name for x in node.names]
                imported = {str(name).partition(".")[0] for name in names}
                wrong += [(path.name, name) for name in imported & set(rooms[rooms.index(folder[0]) + 1 :])]
    assert wrong == []


def test_a_room_of_the_study_can_be_seen_at_a_glance():
    """At most 350 lines a file, 12 modules a package, and 7 parameters a function outside the command line."""
    study = PACKAGE / "study"
    files = list(study.rglob("*.py"))
    assert [path.name for path in files if len(path.read_text().splitlines()) > 350] == []
    packages = [path.parent for path in files if path.name == "__init__.py" and path.parent != study]
    assert [package.name for package in packages if len(list(package.glob("*.py"))) > 12] == []


def test_functions_have_at_most_seven_parameters():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    found = {}
    for path in files:
        name = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("")
        if name.parts[:2] == ("study", "cli") or "triton" in name.parts:  # one parameter for each option
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([x for x in own if x not in ("self", "cls")])
                whole = ".".join((*name.parts, node.name))
                if count > 7:
                    found[whole] = count
    assert {name: count for name, count in found.items() if name not in PUBLIC} == {}
    assert set(found) == PUBLIC


def test_the_page_names_files_and_attributes_that_exist():
    text = PAGE.read_text()
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("src/**/*.*")} | {"tests/architecture.py"}
    files |= {"tests/test_architecture.py"}
    for named in re.findall(r"`([\w/]+\.(?:py|c|h))`", text):
        assert any(file.endswith(f"/{named}") or file == named for file in files), named
    (adapters,) = re.findall(r"`_ADAPTERS` of `(.*?)`", text)
    assert "\n_ADAPTERS = (" in (PACKAGE / adapters).read_text()
