"""Finds the C library, loads it, and picks the build of its kernels that suits this CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from .layout import LAYOUT

__all__ = ["BUILDS", "LEFT_OUT", "MISSING", "Build", "chosen"]

# Names one of `BUILDS`, for tests and for comparing.
_BUILD_VARIABLE = "EXPRESSIVE_ATTENTION_CPU"
# Another library file, as one built with sanitizers.
_FILE_VARIABLE = "EXPRESSIVE_ATTENTION_LIBRARY"


@dataclass(frozen=True)
class Build:
    """The kernels as compiled for one level of CPU features; each takes a packed ``ea_problem``, or ``ea_token``.

    Attributes:
        name: ``portable``, or on x86-64 also ``x86-64-v3`` (AVX2), ``x86-64-v4`` (AVX-512) and
            ``x86-64-v4-bf16`` (AVX512-BF16).
        forward: Returns 0, or 1 if there was not enough memory.
        backward: Likewise.
        linear: Likewise; the forward pass of the squared form in linear time.
        linear_backward: Likewise; its backward pass.
        step: Likewise; one token, for states of the squared form.
    """

    name: str
    forward: Callable[[bytes], int]
    backward: Callable[[bytes], int]
    linear: Callable[[bytes], int]
    linear_backward: Callable[[bytes], int]
    step: Callable[[bytes], int]


def _load() -> tuple[dict[str, Build], tuple[str, ...], str | None]:
    """The builds that run on this CPU, the best last, those that were not compiled, and why there are none."""
    path = os.environ.get(_FILE_VARIABLE) or _find()
    if path is None:
        return {}, (), "the C library was not built when the package was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return {}, (), f"the C library could not be loaded: {error}"
    if _layout(library) != LAYOUT:
        return {}, (), f"the C library {path} is of another version of the package, which has to be installed again"
    library.ea_left_out.restype = ctypes.c_char_p
    library.ea_build_name.restype = ctypes.c_char_p
    library.ea_set_openmp.argtypes = [ctypes.c_void_p]
    library.ea_set_openmp(_openmp())
    kernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)  # releases the GIL
    found = {}
    while name := library.ea_build_name(len(found)):
        entries = []
        for entry in ("ea_forward", "ea_backward", "ea_linear", "ea_linear_backward", "ea_step"):
            function = getattr(library, entry)
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_void_p
            entries.append(kernel(function(name)))
        found[name.decode()] = Build(name.decode(), *entries)
    return found, tuple(library.ea_left_out().decode().split()), None


def _layout(library: ctypes.CDLL) -> str | None:
    """The members of the struct for which the library was compiled; None: it does not say."""
    try:
        library.ea_layout.restype = ctypes.c_char_p
    except AttributeError:
        return None
    return library.ea_layout().decode()


def _find() -> Path | None:
    names = {"win32": "expressive_attention.dll", "darwin": "libexpressive_attention.dylib"}
    path = files("expressive_attention.backends.cpu") / "lib" / names.get(sys.platform, "libexpressive_attention.so")
    return Path(str(path)) if path.is_file() else None


def _openmp() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch uses: two runtimes would compete for the cores."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = ctypes.CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


def _choose() -> Build | None:
    name = os.environ.get(_BUILD_VARIABLE)
    if not name:
        return next(reversed(BUILDS.values()), None)
    if name not in BUILDS:
        raise ValueError(f"{_BUILD_VARIABLE} must be one of {tuple(BUILDS)} on this machine, got {name!r}")
    return BUILDS[name]


# Loaded with the package, so that a call has nothing to find out.
# The builds that run on this CPU, the best last; those that its compiler could not make; why there are none, or None.
BUILDS, LEFT_OUT, MISSING = _load()
_CHOSEN = _choose()


def chosen() -> Build:
    """The best build for this CPU, or the one that the environment named when the package was imported."""
    assert _CHOSEN is not None, MISSING
    return _CHOSEN
