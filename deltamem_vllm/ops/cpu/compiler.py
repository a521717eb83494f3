"""numba with our options, typed.

numba caches on disk what an entry point compiles to, and notices a change of the entry point's own
file only. Here a digest of all files that are compiled in is part of what an entry point is.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

OPTIONS: Final = {
    # Only the fusing of a multiply with its add, which rounds less. Sums keep their order, so that
    # results stay those of the definition.
    "fastmath": {"contract"},
    # Without it each division checks for zero, which ends vectorisation.
    "error_model": "numpy",
}


def compiled(function: Function) -> Function:
    """A function for entry points and for others of its kind; compiled as they call it.

    Inlined: a call hands over each array field by field, which costs more than short loops. And by
    numba, not by LLVM, which would compile each function by itself first.
    """
    return cast(Function, numba.njit(inline="always", **OPTIONS)(function))


def compiled_once(function: Function) -> Function:
    """The same, not inlined: for long functions that are called from several places."""
    return cast(Function, numba.njit(**OPTIONS)(function))


def entry_point(make: Callable[[int], Callable[[int], None]]) -> Any:
    """A C function of one int64 argument, compiled at once or taken from the cache on disk.

    Python reaches it in a third of a microsecond, without the interpreter's lock.

    Args:
        make: gives the function. What it is given must occur in the function as a free variable.

    Returns:
        A ctypes function.
    """
    function = make(digest_of_sources())
    signature = "void(int64)"
    try:
        entry = numba.cfunc(signature, cache=True, **OPTIONS)(function)
    except (RuntimeError, OSError) as error:
        # Neither the package's folder nor the user's cache folder can be written, or it is full.
        if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
            raise
        logger.warning("compiled code cannot be cached, so each start takes longer: %s", error)
        entry = numba.cfunc(signature, **OPTIONS)(function)
    _entries.append(entry)
    return entry.ctypes


_entries: list[Any] = []
"""What ctypes functions point into must stay."""


def digest_of_sources() -> int:
    """A digest of everything that may be compiled into an entry point."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent / "rule.py", here.parent / "reference.py"]
    files.append(here.parents[1] / "config.py")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()
    return int.from_bytes(digest[:6], "big")
