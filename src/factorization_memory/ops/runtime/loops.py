"""Loops that Numba compiles for the CPU at their first call, and keeps on disk for later processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a loop; it releases the GIL, and may fuse multiplications with additions, but reorders nothing."""
    return _compile(function, {"contract"})


def reordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a sum, whose terms may be added in any order, so that vector instructions can be used."""
    return _compile(function, {"contract", "reassoc", "nsz"})


def _compile(function: Callable[..., Any], fastmath: set[str]) -> Callable[..., Any]:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep compiled code in: neither beside the source nor in the user's cache
        return numba.njit(**options)(function)
