"""The command ``ea``: starts the application, or says which extra to install for it."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from .app import app

        app(prog_name="ea")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # there is no room for what it prints, say
        sys.stderr.write(f"ea: {error}\n")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("expressive_attention"):
            raise
        sys.stderr.write(
            f"ea: the package {error.name!r} is missing; the extra 'study' installs it: "
            f"pip install 'expressive-attention[study]'\n"
        )
        sys.exit(2)
