"""Engines, which run cells: one takes those that can run and gives them back finished."""

from .base import Engine, EngineError, Outcome
from .local import LocalEngine
from .ray import RayEngine

__all__ = ["Engine", "EngineError", "LocalEngine", "Outcome", "RayEngine"]
