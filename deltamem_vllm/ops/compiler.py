"""What `cpu.py` needs of its compiler: a typed `njit`, and numbers and arrays out of raw bits.

numba's cache does not notice a change of this file: touch `cpu.py` after one.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import llvmlite.ir
import numba
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(signature: str | None = None) -> Callable[[Function], Function]:
    """`numba.njit` with our options, typed.

    - `fastmath`: only the fusing of a multiply with its add, which rounds less. Sums keep their
      order, so that results stay those of the definition.
    - `error_model`: without it each division checks for zero, which ends vectorisation.
    - `forceinline`: a call hands over each array field by field, which costs more than our loops.
    - `nogil`: the engine's other threads go on meanwhile.
    - no `parallel`: the engine binds one OpenMP thread to each core for its own kernels, and a
      second pool would fight them for the cores; a step's work is tens of microseconds anyhow.
    - `cache`: for the entry point alone, which holds the code of all that it calls.

    Args:
        signature: of the entry point, compiled at once; the others are compiled as it calls them.
    """
    options = {
        "error_model": "numpy",
        "fastmath": {"contract"},
        "forceinline": True,
        "nogil": True,
    }

    def compile_(function: Function) -> Function:
        try:
            cache = signature is not None
            return cast(Function, numba.njit(signature, cache=cache, **options)(function))
        except RuntimeError as error:
            # Neither the package's folder nor the user's cache folder can be written.
            if "cannot cache" not in str(error):
                raise
            return cast(Function, numba.njit(signature, **options)(function))

    return compile_


@intrinsic
def bits_as_float(_: Any, bits: Any) -> Any:
    """The fp32 number with the given int32 bit pattern."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], llvmlite.ir.FloatType())

    return numba.types.float32(numba.types.int32), generate


@intrinsic
def floats_at(_: Any, address: Any) -> Any:
    """A pointer to fp32 from an address."""
    return _pointer_cast(numba.types.float32)


@intrinsic
def longs_at(_: Any, address: Any) -> Any:
    """A pointer to int64 from an address."""
    return _pointer_cast(numba.types.int64)


@intrinsic
def ints_at(_: Any, address: Any) -> Any:
    """A pointer to int32 from an address."""
    return _pointer_cast(numba.types.int32)


def _pointer_cast(item: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(item)(numba.types.int64), generate
