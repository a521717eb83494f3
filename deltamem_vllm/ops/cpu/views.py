"""Arrays where the numbers of a layer, a step and a call say they are."""

from numba import carray

from deltamem_vllm.ops.cpu.compiler import compiled
from deltamem_vllm.ops.cpu.lanes import LANES, floats_at, ints_at
from deltamem_vllm.ops.cpu.numbers import (
    BLOCK_TABLE,
    GATE_BIAS,
    GATE_BIAS_DIM,
    HEADER,
    HEADER_STRIDE,
    HEADS,
    INPUT,
    INPUT_KIND,
    INPUT_STRIDE,
    NUM_BLOCKS,
    NUM_ROWS,
    NUM_TOKENS,
    PROJECTION_DIM,
    PROJECTIONS,
    QUERY_START_LOC,
    RANK,
    READS,
    SCRATCH,
    SEQ_LENS,
    STATES,
    STATES_STRIDE,
    TABLE_STRIDE,
    WIDTH,
    WORD_BYTES,
    Floats,
    Ints,
    Numbers,
)

QUERY, KEY, KEEP, ERASE, WRITTEN, ACTIVATIONS = range(6)
"""The five things that a token's projections become; in the scratch memory one after the other."""


@compiled
def groups(layer: Numbers) -> int:
    """Vectors that hold a token's projections."""
    return (layer[PROJECTION_DIM] + LANES - 1) // LANES  # type: ignore[no-any-return]  # numba


@compiled
def projections(layer: Numbers, call: Numbers) -> Floats:
    """[T, at least P]: what was given, or what is made of what was given."""
    if call[INPUT_KIND] == PROJECTIONS:
        return carray(floats_at(call[INPUT]), (call[NUM_TOKENS], call[INPUT_STRIDE]))  # type: ignore[no-any-return]  # numba
    return carray(floats_at(call[SCRATCH]), (call[NUM_TOKENS], groups(layer) * LANES))  # type: ignore[no-any-return]  # numba


@compiled
def activations(layer: Numbers, call: Numbers) -> Floats:
    """[ACTIVATIONS, T, H, width]."""
    tokens, at = call[NUM_TOKENS], call[SCRATCH]
    if call[INPUT_KIND] != PROJECTIONS:
        at += tokens * groups(layer) * LANES * WORD_BYTES
    return carray(floats_at(at), (ACTIVATIONS, tokens, layer[HEADS], layer[WIDTH]))  # type: ignore[no-any-return]  # numba


@compiled
def reads(layer: Numbers, call: Numbers) -> Floats:
    """[T, H * r]."""
    return carray(floats_at(call[READS]), (call[NUM_TOKENS], layer[HEADS] * layer[RANK]))  # type: ignore[no-any-return]  # numba


@compiled
def gate_bias(layer: Numbers) -> Floats:
    return carray(floats_at(layer[GATE_BIAS]), (layer[GATE_BIAS_DIM],))  # type: ignore[no-any-return]  # numba


@compiled
def headers(layer: Numbers) -> Ints:
    """[num_blocks, more than a header's words]."""
    return carray(ints_at(layer[HEADER]), (layer[NUM_BLOCKS], layer[HEADER_STRIDE]))  # type: ignore[no-any-return]  # numba


@compiled
def pages(layer: Numbers) -> Floats:
    """[num_blocks, more than ring * H * r * r]."""
    return carray(floats_at(layer[STATES]), (layer[NUM_BLOCKS], layer[STATES_STRIDE]))  # type: ignore[no-any-return]  # numba


@compiled
def block_table(step: Numbers) -> Ints:
    """[rows, at least the table's width]."""
    return carray(ints_at(step[BLOCK_TABLE]), (step[NUM_ROWS], step[TABLE_STRIDE]))  # type: ignore[no-any-return]  # numba


@compiled
def query_start_loc(step: Numbers) -> Ints:
    """[rows + 1]."""
    return carray(ints_at(step[QUERY_START_LOC]), (step[NUM_ROWS] + 1,))  # type: ignore[no-any-return]  # numba


@compiled
def seq_lens(step: Numbers) -> Ints:
    """[rows]."""
    return carray(ints_at(step[SEQ_LENS]), (step[NUM_ROWS],))  # type: ignore[no-any-return]  # numba
