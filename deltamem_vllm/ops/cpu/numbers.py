"""How Python hands tensors to compiled code: as arrays of int64, one for each lifetime.

Addresses are in bytes, strides in elements of what is there. The names are the places in an array.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

# A layer's: its weights, its pages and what its rule is.
(
    GATE_BIAS,
    GATE_BIAS_DIM,
    WEIGHTS,  # packed as `products.pack` does it; 0 if steps are given projections
    WEIGHTS_ARE_BF16,
    HIDDEN_SIZE,
    PROJECTION_DIM,
    HEADER,
    HEADER_WORDS,
    HEADER_STRIDE,
    STATES,
    STATES_STRIDE,
    NUM_BLOCKS,
    RING,
    FROZEN_AT,  # where these begin in a row of the states; -1 for pages without spans
    SUMS_AT,
    MARKS_AT,  # and this in a row of the headers
    HEADS,
    RANK,
    WIDTH,  # the rank, padded to whole vectors
    BLOCK_SIZE,
    PAGES_ARE_INITIALISED,
    NORMALIZE_QK,
    COUPLE_LAMBDA,
    MODE,
    LAYER_NUMBERS,
) = range(25)

# A step's, the same for all layers.
BLOCK_TABLE, TABLE_WIDTH, TABLE_STRIDE, QUERY_START_LOC, SEQ_LENS, NUM_ROWS, STEP_NUMBERS = range(7)

# A call's: one layer in one step. The first ones change with each call.
(
    STEP,
    INPUT,
    INPUT_STRIDE,
    INPUT_KIND,
    NUM_TOKENS,
    READS,
    SCRATCH,
    CORRECTED,  # what is corrected, or 0
    CORRECTED_STRIDE,
    PHASE,
    TILE,  # tokens that are projected and activated together
    NEXT,  # the next piece of the phase's work that nobody has taken
    LAYER,
    CORRECTION,  # the numbers of a correction, or 0
    BAD_ROW,  # the first malformed row, or -1
    LATE_ROWS,
    CALL_NUMBERS,
) = range(17)
CHANGING_CALL_NUMBERS: Final = LAYER

# Kinds of input.
PROJECTIONS, HIDDEN_FP32, HIDDEN_BF16 = range(3)

# Phases. A team of threads runs the middle two, each in pieces; one thread runs all in one call.
CHECK, TOKENS, ROWS, LAST_ROWS, ALL = range(5)

# A correction's. The first ones change with each call.
(
    BASE,
    BASE_STRIDE,
    BASE_TOKENS,
    BASE_READS,
    BASE_NEXT,
    BASE_IS_BF16,
    BASE_COLUMNS,
    READ_DIM,
    DELTA,  # packed like the weights
    DELTA_IS_BF16,
    GRAM,  # [H * r, H * r] fp32, delta^T delta
    NORMS,  # two fp32 sums
    CORRECTION_NUMBERS,
) = range(13)
CHANGING_CORRECTION_NUMBERS: Final = BASE_IS_BF16

WORD_BYTES: Final = 4
