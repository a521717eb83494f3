"""Several threads: those of the OpenMP runtime that torch itself has loaded.

The engine binds these to cores; a second pool would fight them. `GOMP_parallel` is what compilers
make of `#pragma omp parallel`: GNU's runtime has it, and so have LLVM's and Intel's.
"""

import ctypes
from typing import Any

import torch


def _find() -> Any:
    # torch loads its runtime for all to see.
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


_parallel = _find()


def team_size() -> int:
    """Threads that work together, this one included."""
    return torch.get_num_threads() if _parallel is not None else 1


def run_by_team(function: Any, address: int, threads: int) -> None:
    """Call a C function with one argument on each of `threads` threads; return when all have."""
    _parallel(function, address, threads, 0)
