"""Errors that a user can correct; they end a command with one line, without a traceback."""

__all__ = ["ConfigError", "StudyError"]


class StudyError(ValueError):
    """Something that cannot be used; the message says what and why, in one line."""


class ConfigError(StudyError):
    """A configuration that cannot be used; the message says which key and why."""
