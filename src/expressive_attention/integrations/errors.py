"""The error of a model whose attention is not what was asked for."""

__all__ = ["ConversionError"]


class ConversionError(ValueError):
    """A model that is not, or not wholly, switched; the message names the layers and says why."""
