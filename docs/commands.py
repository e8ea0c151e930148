"""Writes the site's page of the command line, from the help texts of the commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from expressive_attention.study.cli.app import app

_HEAD = """# Command line

The command `ea` comes with the extra `study`. `ea COMMAND --help` prints what this page says of a command.
Wrong use ends with one line and exit code 2; Ctrl-C ends with 130, and nothing finished is lost.
"""


def page() -> str:
    """The page as Markdown: a section for each command."""
    return "\n".join([_HEAD, *_sections(get_command(app), "ea")])


def _sections(command: Any, name: str) -> Iterator[str]:
    for word, inner in getattr(command, "commands", {}).items():
        yield from _sections(inner, f"{name} {word}")
    if not hasattr(command, "commands"):
        told, _, example = command.help.partition("Example: ")
        yield f"## {name}\n\n{told.strip()}\n\n```text\n{example.strip()}\n```\n"
        rows = [_row(parameter) for parameter in command.params if "--help" not in parameter.opts]
        if rows:
            yield "\n".join(["| argument | meaning | default |", "|---|---|---|", *rows, ""])


def _row(parameter: Any) -> str:
    metavar = parameter.metavar or ""
    is_option = parameter.opts[0].startswith("-")
    names = [f"{option} {metavar}".strip() if option.startswith("--") else option for option in parameter.opts]
    name = ", ".join(f"`{each}`" for each in names) if is_option else f"`{metavar or parameter.name.upper()}`"
    shown = parameter.show_default
    default = "required" if parameter.required else shown if isinstance(shown, str) else _default(parameter.default)
    return f"| {name} | {parameter.help or ''} | {default} |".replace("\n", " ")


def _default(value: Any) -> str:
    return "" if value is None or value is False or callable(value) else f"`{value}`"
