"""Functions compiled to machine code by numba, kept on disk between runs.

The cache is written aside and renamed, so processes that compile at the same time do no harm; where
neither the package's folder nor the user's cache is writable, each process compiles for itself.

    @compiled
    def total(values: Any) -> Any: ...
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Return the function, compiled at its first call; it releases the interpreter's lock."""
    try:
        return cast(_F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # no folder to keep it in
        return cast(_F, numba.njit(nogil=True)(function))
