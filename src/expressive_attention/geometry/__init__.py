"""Views of attention space: which keys a query matches, at which angle, with which sign. Needs the extra `geometry`."""

from .capture import capture
from .record import MEASURES, LayerRecord, Record

__all__ = ["MEASURES", "LayerRecord", "Record", "capture"]
