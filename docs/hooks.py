"""The site's own steps beside those of mkdocs: notebooks and help texts become pages, and formulas MathML.

Formulas are written as GitHub reads them: a block of code in the language `math`, or $`...`$ in a line. Browsers draw
MathML themselves, so a page needs no script and asks no other site.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs imports this file by its path
import commands
import notebooks

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOTEBOOK = re.compile(r"(?<!\[download it)\]\(([\w/.]+)\.ipynb\)")
# A prime is no letter: as one it stands too low.
_PRIME = ("<mi>&#x02032;</mi>", "<mo>&#x02032;</mo>")
# In a line: code of a block begins with a tag.
_NAME = re.compile(r"(?<=<code>)[^<\n]{12,}(?=</code>)")
_INLINE = re.compile(r"\$`([^`]+)`\$")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show a menu of versions where mike builds the site; elsewhere there are none, and the menu would ask for them."""
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike"}
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, with its pictures, and the page of the command line."""
    files.append(File.generated(config, "commands.md", content=commands.page()))
    for path in notebooks.paths():
        page, pictures = notebooks.markdown(notebooks.read(path), path.stem)
        for name, content in {f"{path.stem}.md": page, **pictures}.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Draw the formulas of a page, and lead links to notebooks to their pages."""
    markdown = _NOTEBOOK.sub(r"](\1.md)", markdown)
    markdown = _BLOCK.sub(lambda found: f'<div class="formula">{_formula(found[1], "block")}</div>', markdown)
    # In a span, since a line that starts with <math> would be a paragraph of its own.
    return _INLINE.sub(lambda found: f"<span>{_formula(found[1], 'inline')}</span>", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Let long names in code break after their dots and underscores, where a phone has no room for them."""
    return _NAME.sub(lambda name: re.sub(r"(?<=[._(=])(?=\w)", "<wbr>", name[0]), html)


def _formula(latex: str, display: str) -> str:
    return convert(latex.strip(), display=display).replace(*_PRIME)
