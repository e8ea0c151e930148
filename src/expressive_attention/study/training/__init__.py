"""Training of the seeds of a cell, and the measures of what they have learned."""

from ..moved import moved

__getattr__ = moved(__name__, {"train_cell": "training.loop", "trained_model": "training.model"})
