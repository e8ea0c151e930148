"""The rooms of the package and who imports whom, read from the source.

`python tests/architecture.py` draws the picture of ARCHITECTURE.md anew.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "expressive_attention"
PAGE = ROOT / "ARCHITECTURE.md"

# A room imports rooms further up, and none further down.
ROOMS = {
    "call": ("call", "blocks", "forms", "masks"),
    "backends": ("backends",),
    "ops": ("ops", "schema", "flops", "sharding", "decomposition"),
    "functional": (
        "functional",
        "varlen",
        "nested",
        "recurrent",
        "near_far",
        "sparse",
        "checks",
        "overrides",
        "call_log",
    ),
    "nn": ("nn",),
    "distributed": ("distributed",),
    "integrations": ("integrations",),
    "geometry": ("geometry",),
    "study": ("study",),
}


def room_of(module: str) -> str | None:
    """The room of a module or folder of the package; None: it is in none."""
    return next((room for room, modules in ROOMS.items() if module in modules), None)


def imports(path: Path) -> Iterator[str]:
    """The modules and folders of the package that a file imports, at the top or when it needs them."""
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) + 1 - node.level]
            names = [node.module] if node.module else [x.name for x in node.names]
            yield from (".".join((*base, name)).split(".")[0] for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            rest = str(node.module).split(".")[1:]
            yield from rest[:1] or (x.name for x in node.names)


def edges() -> dict[tuple[str, str], list[str]]:
    """Pairs of rooms of which the first imports the second, with the files in which it does."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        own = room_of(name.parts[0].removesuffix(".py"))
        if own is None:
            continue
        for module in imports(path):
            other = room_of(module)
            if other not in (None, own):
                found.setdefault((own, str(other)), []).append(str(name))
    return found


def picture() -> str:
    """The imports between rooms as a diagram of Mermaid, without those that follow from others."""
    pairs = set(edges())

    def reaches(a: str, b: str, without: tuple[str, str]) -> bool:
        return any(x == a and (x, y) != without and (y == b or reaches(y, b, without)) for x, y in pairs)

    shown = sorted(pair for pair in pairs if not reaches(*pair, pair))
    return "\n".join(["```mermaid", "graph TD", *(f"    {a} --> {b}" for a, b in shown), "```"])


def with_picture(page: str) -> str:
    """The page with the diagram of today."""
    before, _, rest = page.partition("```mermaid")
    return before + picture() + rest.partition("```")[2]


if __name__ == "__main__":
    PAGE.write_text(with_picture(PAGE.read_text()))
