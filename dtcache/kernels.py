"""Compiled kernels: numba functions that release the GIL, saved on disk if a folder allows it."""

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function with numba.

    numba saves the machine code beside the source or in the user's cache folder. If it can write to
    neither, as for a user without a home folder, each process compiles the function again.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba's "no locator available": there is no such folder
        return njit(nogil=True)(function)
