"""The command ``ea``: starts the application, or says which extra to install for it."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("expressive_attention"):
            raise
        sys.exit(
            f"ea needs the package {error.name!r}, which the extra 'study' installs: "
            f"pip install 'expressive-attention[study]'"
        )
    app()
