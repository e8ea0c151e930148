"""An object that shows as its text, wherever it is shown."""

from __future__ import annotations

from html import escape

__all__ = ["Table"]


class Table:
    """An object whose text is a table: at the prompt and in notebooks it is shown as that."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self), quote=False)}</pre>"
