"""The tables of the page, each described once."""

from __future__ import annotations

from .compared import cross_entropy_table, findings_table, opening_table
from .numbered import duration, numbered_tables

__all__ = ["cross_entropy_table", "duration", "findings_table", "numbered_tables", "opening_table"]
