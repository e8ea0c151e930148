"""No sentence of comments, docstrings and pages starts with That, Those, What or Of."""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
START = re.compile(r"(?:^|[.!?:][*_`\"')]*\s|\n\s*\n)[#>*\-_|`\"(\s]*(?=((?:That|Those|What|Of)\b[^\n]*))")
COMMENT = {".c": r"/\*(.*?)\*/|//([^\n]*)", ".h": r"/\*(.*?)\*/|//([^\n]*)", ".html": r"<p\b[^>]*>(.*?)</p>|//([^\n]*)"}
COMMENT[".j2"] = COMMENT[".html"]


def files():
    """All files with words, by their path from the root."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder, endings in (
        ("src", ("py", "c", "h", "html", "j2")),
        ("docs", ("md", "py", "ipynb")),
        ("benchmarks", ("py", "c")),
        ("examples", ("py",)),
        ("tests", ("py",)),
    ):
        found += [path for ending in endings for path in sorted((ROOT / folder).rglob(f"*.{ending}"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def texts(path, source):
    """Docstrings and comments of code, one text for each run of comment lines; the paragraphs of a page."""
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(source)["cells"]]
        kinds = {"markdown": Path("cell.md"), "code": Path("cell.py")}
        return [text for kind, cell in cells for text in texts(kinds[kind], cell)]
    if path.suffix == ".md":
        prose = re.sub(r"^```.*?^```", "", source, flags=re.MULTILINE | re.DOTALL)
        return re.split(r"\n\s*\n|\n(?=#|[-*] |\d+\. |\|)|(?<=\S) \| ", prose)
    if path.suffix == ".py":
        return docstrings(source) + comments(source)
    groups = re.findall(COMMENT[path.suffix], re.sub(r"\n\s*//", "\n//", source), re.DOTALL)
    return re.split(r"\n\s*\n", "\n\n".join("".join(group) for group in groups))


def docstrings(source):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for text in found if text]


def comments(source):
    found, last = [], -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("#: ")
            alone = not token.line[: token.start[1]].strip()
            if alone and last == token.start[0] - 1:
                found[-1] += f"\n{words}"
            else:
                found.append(words)
            last = token.start[0] if alone else -2
    return found


def wrong(path, source):
    """The sentences that start with one of these words."""
    return [found[1].strip() for text in texts(path, source) for found in START.finditer(text)]


@pytest.mark.parametrize("name", files())
def test_sentences_start_with_their_subject(name):
    path = ROOT / name
    assert wrong(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("a.py", '"""What it does."""\n', 1),
        ("a.py", 'def f():\n    """Short.\n\n    Of which none.\n    """\n', 1),
        ("a.py", "# It is so. That\n# is all.\nx = 1  # Those are many\n", 2),
        ("a.py", '"""It is what\nThat one is."""\nx = "What"\n', 0),
        ("a.md", "A line.\nThose two. **What it does.** Of which\n\n## What\n\n- That\n\n| a | That |\n", 6),
        ("a.md", "It is that\nwhat is.\n\n```python\nx = 1  # That\n```\n", 0),
        ("a.c", "// That\nint x; /* It is. What */\n", 2),
        ("a.ipynb", '{"cells": [{"cell_type": "markdown", "source": ["So. What\\n", "is"]}]}', 1),
        ("a.html", "<p>That is</p>", 1),
        ("a.j2", '<p class="x">{{ a }} is. What is</p>', 1),
    ],
)
def test_such_sentences_are_found(name, source, count):
    assert len(wrong(Path(name), source)) == count
