"""Elementary functions that loops can be vectorised over.

numba's call libm for each element, 30 times slower. The polynomials are those of Cephes (expf.c,
tanhf.c); errors are below 2 units in the last place.
"""

import numpy as np

from deltamem_vllm.ops.cpu.compiler import compiled
from deltamem_vllm.ops.cpu.lanes import bits_as_float

# numba takes Python floats as fp64, and one of them would widen a whole expression.
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)

LOG2_E = np.float32(1.4426950408889634)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_LIMIT = np.float32(87)
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)

TANH_SMALL = np.float32(0.625)
T0, T1 = np.float32(-5.70498872745e-3), np.float32(2.06390887954e-2)
T2, T3 = np.float32(-5.37397155531e-2), np.float32(1.33314422036e-1)
T4 = np.float32(-3.33332819422e-1)


@compiled
def exp(x: np.float32) -> np.float32:
    """e^x for |x| up to `EXP_LIMIT`, e^(+-EXP_LIMIT) beyond."""
    x = min(max(x, -EXP_LIMIT), EXP_LIMIT)
    power = np.int32(x * LOG2_E + (HALF if x >= ZERO else -HALF))
    n = np.float32(power)
    x = x - n * LN_2_HIGH - n * LN_2_LOW
    y = ((((E0 * x + E1) * x + E2) * x + E3) * x + E4) * x + E5
    y = y * (x * x) + x + ONE
    return y * bits_as_float(np.int32((power + np.int32(127)) << np.int32(23)))  # type: ignore[no-any-return]  # numba


@compiled
def tanh(x: np.float32) -> np.float32:
    square = x * x
    small = ((((T0 * square + T1) * square + T2) * square + T3) * square + T4) * square * x + x
    large = ONE - TWO / (exp(TWO * abs(x)) + ONE)
    large = large if x >= ZERO else -large
    # Written so that NaN takes the polynomial, which keeps it.
    return large if abs(x) >= TANH_SMALL else small


@compiled
def sigmoid(x: np.float32) -> np.float32:
    # `exp` promises nothing about NaN.
    return ONE / (ONE + exp(-x)) if x == x else x
