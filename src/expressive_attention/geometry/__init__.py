"""See attention space: which keys a query matches, at which angle, with which sign. It needs the extra `geometry`."""

from .capture import capture
from .record import MEASURES, LayerRecord, Record

__all__ = ["MEASURES", "LayerRecord", "Record", "capture"]
