"""Runs the notebooks in docs/notebooks/ and keeps what they print and draw; the site shows them as pages.

    .venv/bin/python docs/notebooks.py [--write] [NAME...]

A notebook is committed with its outputs, so that it can be read without running. Without `--write`, the exit status
says whether they are still what its code gives. Needs the extras that a notebook names, and no Jupyter.

Outputs are those that Jupyter would show: what is printed, the value of a last expression, and the figures of pyplot,
as SVG. Two entries in the metadata of a cell are ours: `alt`, the words for its figure, and the tag `varies`, which
says that its numbers depend on the machine, as after training.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("notebooks")
VARIES = "varies"

Cell = dict[str, Any]
_FORMULA = re.compile(r"\$([^$`\n]+)\$")  # as Jupyter reads them; hooks.py has GitHub's way
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?%?")


def paths() -> list[Path]:
    """The notebooks."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    """A notebook as nbformat 4 describes it."""
    return json.loads(path.read_text(encoding="utf-8"))


def written(notebook: dict[str, Any]) -> str:
    """The text of its file, as Jupyter would save it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def run(notebook: dict[str, Any]) -> list[list[Cell]]:
    """Execute the code in the notebooks' folder.

    Returns:
        The outputs of each cell of code.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")  # figures that others left open are not the notebook's
    with _directory(FOLDER):
        return [_outputs(source(cell), namespace, number) for number, cell in enumerate(code_cells(notebook), 1)]


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    """Its cells of code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: Cell) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def differences(notebook: dict[str, Any], fresh: list[list[Cell]]) -> Iterator[str]:
    """Cells that show other outputs than the `fresh` ones, a sentence for each.

    Words have to be the same. So have numbers, to within .02 or 2%, but for cells that say that theirs vary. A figure
    has to be there.
    """
    for number, (cell, outputs) in enumerate(zip(code_cells(notebook), fresh, strict=True), 1):
        old, new = (_told(each) for each in (cell["outputs"], outputs))
        same = _NUMBER.sub("#", old) == _NUMBER.sub("#", new)
        if same and VARIES not in cell["metadata"].get("tags", ()):
            pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
            same = all(math.isclose(_value(a), _value(b), rel_tol=0.02, abs_tol=0.02) for a, b in pairs)
        if not same:
            yield f"cell {number} shows\n{old}\nand gives\n{new}"


def markdown(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, str]]:
    """The notebook as a page of the site.

    Returns:
        The text of the page, and the pictures that it shows, by the names of their files.
    """
    parts: list[str] = []
    pictures: dict[str, str] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(_FORMULA.sub(r"$`\1`$", source(cell)))
            continue
        parts.append(f"```python\n{source(cell)}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/svg+xml" in data:
                file = f"{name}-{len(pictures) + 1}.svg"
                pictures[file] = "".join(data["image/svg+xml"])
                parts.append(f"![{cell['metadata']['alt']}]({file})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]).strip())
            else:
                parts.append(f"```text\n{_text(output).rstrip()}\n```")
    parts.insert(1, f"*This page is a notebook: [download it]({name}.ipynb) and run it yourself.*")
    return "\n\n".join(parts) + "\n", pictures


def _outputs(code: str, namespace: dict[str, Any], number: int) -> list[Cell]:
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, f"<cell {number}>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), namespace)
    found: list[Cell] = []
    if text := printed.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    found += [_shown({"image/svg+xml": picture.splitlines(keepends=True)}) for picture in _drawn()]
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if html := getattr(value, "_repr_html_", None):
            data["text/html"] = html().splitlines(keepends=True)
        found.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data})
    return found


def _shown(data: dict[str, list[str]]) -> Cell:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def _drawn() -> Iterator[str]:
    """The figures that pyplot has open, which are closed."""
    if "matplotlib.pyplot" not in sys.modules:
        return
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    # The same file from the same numbers, with text that can be read and searched.
    with mpl.rc_context({"svg.hashsalt": "expressive-attention", "svg.fonttype": "none"}):
        for each in plt.get_fignums():
            file = io.StringIO()
            plt.figure(each).savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
            yield file.getvalue()
    plt.close("all")


def _text(output: Cell) -> str:
    return "".join(output["text"] if output["output_type"] == "stream" else output["data"].get("text/plain", "figure"))


def _told(outputs: list[Cell]) -> str:
    return "\n".join(_text(output).rstrip() for output in outputs)


def _value(number: str) -> float:
    text = number.replace(",", "")
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


@contextlib.contextmanager
def _directory(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    """The exit status."""
    names = [name for name in sys.argv[1:] if name != "--write"]
    stale = 0
    for path in paths():
        if names and path.stem not in names:
            continue
        notebook = read(path)
        fresh = run(notebook)
        if "--write" in sys.argv[1:]:
            for number, (cell, outputs) in enumerate(zip(code_cells(notebook), fresh, strict=True), 1):
                cell.update(outputs=outputs, execution_count=number)
            path.write_text(written(notebook), encoding="utf-8")
        else:
            for difference in differences(notebook, fresh):
                print(f"{path.name}: {difference}")
                stale = 1
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
