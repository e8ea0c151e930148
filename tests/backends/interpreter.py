"""Triton's interpreter in less time: two fifths of it go into work that changes no result of these tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from triton.runtime import interpreter


@contextmanager
def quick(checks_overflow: bool) -> Iterator[None]:
    """Replace Triton's language once per launch, and check integers for overflow where asked, inside of the block.

    The interpreter replaces the functions of the language again for each device function that a kernel calls. Before
    each sum and product of integers it computes the same in 64 bits. Versions that work otherwise are left as they are.
    """
    with _once_per_launch(), _overflow_checked(checks_overflow):
        yield


@contextmanager
def _once_per_launch() -> Iterator[None]:
    replace_language = getattr(interpreter, "_patch_lang", None)
    if replace_language is None or not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    launches = []

    def once(function):
        if launches:
            return interpreter._LangPatchScope()  # nothing to restore
        scope = replace_language(function)
        restore = scope.restore
        launches.append(scope)

        def end():
            launches.clear()
            restore()

        scope.restore = end
        return scope

    interpreter._patch_lang = once
    try:
        yield
    finally:
        interpreter._patch_lang = replace_language


@contextmanager
def _overflow_checked(checked: bool) -> Iterator[None]:
    builder = interpreter.interpreter_builder
    options = builder.options
    builder.options = replace(options, sanitize_overflow=checked)
    try:
        yield
    finally:
        builder.options = options
