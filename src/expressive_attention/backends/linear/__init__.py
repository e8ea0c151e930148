"""The squared form in linear time."""
