"""``python -m expressive_attention`` is the command ``ea``."""

from .study.cli import main

if __name__ == "__main__":
    main()
