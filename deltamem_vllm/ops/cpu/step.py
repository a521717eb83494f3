"""One layer's memory in one step of the engine, in phases: what compiled code is called for.

1. Rows that point outside of a tensor are looked for; there are no bounds checks later.
2. Tokens are projected and activated, many at once.
3. Requests run, one after the other or on several threads. vLLM lets a request hit, in the prefix
   cache, a block that another request fills in the same step. Hits are whole blocks, so only rows
   whose context ends at a block boundary can do that: the late rows, but for those that start from
   a page of their own.
4. Late rows run, in the order of their contexts: whoever fills a block began earlier in its
   sequence.
5. Reads correct what they are for.
"""

from typing import Final

import numpy as np
from numba import carray

from deltamem_vllm.ops.cpu import views
from deltamem_vllm.ops.cpu.activations import coefficients, normalise, unpack
from deltamem_vllm.ops.cpu.compiler import compiled, compiled_once, entry_point
from deltamem_vllm.ops.cpu.functions import ZERO
from deltamem_vllm.ops.cpu.lanes import longs_at, prefetch, take
from deltamem_vllm.ops.cpu.numbers import (
    ALL,
    BAD_ROW,
    BASE,
    BASE_NEXT,
    BASE_READS,
    BASE_STRIDE,
    BASE_TOKENS,
    BLOCK_SIZE,
    CALL_NUMBERS,
    CHECK,
    CORRECTED,
    CORRECTED_STRIDE,
    CORRECTION,
    CORRECTION_NUMBERS,
    COUPLE_LAMBDA,
    HEADER,
    HEADER_STRIDE,
    HEADER_WORDS,
    HEADS,
    HIDDEN_SIZE,
    INPUT,
    INPUT_KIND,
    INPUT_STRIDE,
    LAST_ROWS,
    LATE_ROWS,
    LAYER,
    LAYER_NUMBERS,
    MODE,
    NEXT,
    NORMALIZE_QK,
    NUM_BLOCKS,
    NUM_ROWS,
    NUM_TOKENS,
    PHASE,
    PROJECTIONS,
    RANK,
    READS,
    RING,
    ROWS,
    STATES,
    STATES_STRIDE,
    STEP,
    STEP_NUMBERS,
    TABLE_WIDTH,
    TILE,
    TOKENS,
    WEIGHTS,
    WEIGHTS_ARE_BF16,
    WIDTH,
    WORD_BYTES,
    Numbers,
)
from deltamem_vllm.ops.cpu.products import add_norms, correct, project
from deltamem_vllm.ops.cpu.rows import run_row
from deltamem_vllm.ops.cpu.states import start_page, starts_alone
from deltamem_vllm.ops.cpu.views import ERASE, KEEP, KEY, QUERY, WRITTEN

PREFETCHED: Final = 1024
"""Bytes of a state that are asked for in advance; more would not fit beside all else."""

CORRECTION_TILE: Final = 16
"""Tokens that one thread corrects at a time."""


@compiled
def _has_tokens(step: Numbers, row: int) -> bool:
    starts = views.query_start_loc(step)
    return views.seq_lens(step)[row] > 0 and starts[row + 1] != starts[row]  # type: ignore[no-any-return]  # numba


@compiled
def _context(step: Numbers, row: int) -> int:
    starts = views.query_start_loc(step)
    return views.seq_lens(step)[row] - (starts[row + 1] - starts[row])  # type: ignore[no-any-return]  # numba


@compiled
def _is_late(layer: Numbers, step: Numbers, row: int) -> bool:
    before = _context(step, row)
    at_boundary = before > 0 and before % layer[BLOCK_SIZE] == 0
    return at_boundary and not starts_alone(layer, step, row, before)


@compiled
def _check(layer: Numbers, step: Numbers, call: Numbers) -> None:
    """Find the first row that points outside of a tensor, and count those that run late."""
    starts, ends, table = (
        views.query_start_loc(step),
        views.seq_lens(step),
        views.block_table(step),
    )
    block_size = layer[BLOCK_SIZE]
    call[BAD_ROW] = -1
    call[LATE_ROWS] = 0
    for row in range(step[NUM_ROWS]):
        if not _has_tokens(step, row):
            continue
        start, stop, end, before = starts[row], starts[row + 1], ends[row], _context(step, row)
        is_bad = start < 0 or stop < start or stop > call[NUM_TOKENS] or before < 0
        is_bad = is_bad or (end - 1) // block_size >= step[TABLE_WIDTH]
        if not is_bad:
            for block in range(max(before - 1, 0) // block_size, (end - 1) // block_size + 1):
                is_bad = is_bad or not 0 <= table[row, block] < layer[NUM_BLOCKS]
        if is_bad:
            call[BAD_ROW] = row
            return
        call[LATE_ROWS] += _is_late(layer, step, row)


@compiled
def _prefetch_pages(layer: Numbers, step: Numbers) -> None:
    """Ask for the pages that rows will load, each somewhere else, while tokens are projected."""
    state_bytes = layer[HEADS] * layer[RANK] * layer[RANK] * WORD_BYTES
    for row in range(step[NUM_ROWS]):
        if _has_tokens(step, row):
            before = _context(step, row)
            page = start_page(layer, step, row, before)
            slot = layer[STATES] + page * layer[STATES_STRIDE] * WORD_BYTES
            slot += before % layer[RING] * state_bytes
            prefetch(slot, min(state_bytes, PREFETCHED))
            prefetch(layer[HEADER] + page * layer[HEADER_STRIDE] * WORD_BYTES, WORD_BYTES)


@compiled
def _activate(layer: Numbers, call: Numbers, tile: int) -> None:
    """What the tokens of a tile ask and write, to the scratch memory; their reads become 0."""
    rank, tokens = layer[RANK], call[NUM_TOKENS]
    first = tile * call[TILE]
    last = min(first + call[TILE], tokens)
    rows = views.projections(layer, call)[first:last]
    if call[INPUT_KIND] != PROJECTIONS:
        project(
            call[INPUT],
            call[INPUT_STRIDE],
            call[INPUT_KIND],
            layer[HIDDEN_SIZE],
            layer[WEIGHTS],
            layer[WEIGHTS_ARE_BF16],
            views.groups(layer),
            first,
            last,
            rows.ctypes.data,
        )
    reads = views.reads(layer, call)
    for token in range(first, last):
        for i in range(reads.shape[1]):
            reads[token, i] = ZERO
    activations = views.activations(layer, call)
    read_dim = layer[HEADS] * rank
    for kind in (QUERY, KEY):
        vectors = activations[kind][first:last]
        unpack(rows, kind * read_dim, rank, vectors)
        if layer[NORMALIZE_QK]:
            normalise(vectors)
    coefficients(
        rows,
        views.gate_bias(layer),
        rank,
        layer[COUPLE_LAMBDA] != 0,
        layer[MODE],
        activations[KEEP][first:last],
        activations[ERASE][first:last],
        activations[WRITTEN][first:last],
    )


@compiled
def _run_rows(layer: Numbers, step: Numbers, call: Numbers) -> None:
    """Run rows that are not late until none is left."""
    state = np.zeros((layer[HEADS], layer[RANK], layer[WIDTH]), np.float32)
    read = np.empty(layer[WIDTH], np.float32)
    words = np.empty(layer[HEADER_WORDS], np.int32)
    while True:
        row = take(call.ctypes.data + NEXT * 8)
        if row >= step[NUM_ROWS]:
            return
        if _has_tokens(step, row) and not _is_late(layer, step, row):
            run_row(layer, step, call, row, state, read, words)


@compiled
def _run_late_rows(layer: Numbers, step: Numbers, call: Numbers) -> None:
    order = np.empty(call[LATE_ROWS], np.int32)
    count = 0
    for row in range(step[NUM_ROWS]):
        if _has_tokens(step, row) and _is_late(layer, step, row):
            place = count
            while place > 0 and _context(step, order[place - 1]) > _context(step, row):
                order[place] = order[place - 1]
                place -= 1
            order[place] = row
            count += 1
    state = np.zeros((layer[HEADS], layer[RANK], layer[WIDTH]), np.float32)
    read = np.empty(layer[WIDTH], np.float32)
    words = np.empty(layer[HEADER_WORDS], np.int32)
    for row in order:
        run_row(layer, step, call, row, state, read, words)


@compiled
def _prepare_correction(call: Numbers) -> None:
    """Write down what the step's correction corrects."""
    if call[CORRECTED] != 0:
        numbers = carray(longs_at(call[CORRECTION]), (CORRECTION_NUMBERS,))
        numbers[BASE], numbers[BASE_STRIDE] = call[CORRECTED], call[CORRECTED_STRIDE]
        numbers[BASE_TOKENS], numbers[BASE_READS] = call[NUM_TOKENS], call[READS]
        numbers[BASE_NEXT] = 0


@compiled_once
def _correct_tokens(address: int) -> None:
    """Correct tiles of tokens until none is left."""
    numbers = carray(longs_at(address), (CORRECTION_NUMBERS,))
    while True:
        first = take(address + BASE_NEXT * 8) * CORRECTION_TILE
        if first >= numbers[BASE_TOKENS]:
            return
        correct(numbers, first, min(first + CORRECTION_TILE, numbers[BASE_TOKENS]))


def _make_step(sources: int):  # type: ignore[no-untyped-def]  # a plain function of an address
    def run(address: int) -> None:
        _ = sources
        call = carray(longs_at(address), (CALL_NUMBERS,))
        layer = carray(longs_at(call[LAYER]), (LAYER_NUMBERS,))
        step = carray(longs_at(call[STEP]), (STEP_NUMBERS,))
        phase = call[PHASE]
        if phase in (CHECK, ALL):
            _check(layer, step, call)
            if call[BAD_ROW] >= 0:
                return
            _prefetch_pages(layer, step)
            _prepare_correction(call)
        if phase in (TOKENS, ALL):
            while True:
                tile = take(address + NEXT * 8)
                if tile * call[TILE] >= call[NUM_TOKENS]:
                    break
                _activate(layer, call, tile)
        if phase == ALL:
            call[NEXT] = 0
        if phase in (ROWS, ALL):
            _run_rows(layer, step, call)
        if phase in (LAST_ROWS, ALL) and call[LATE_ROWS] > 0:
            _run_late_rows(layer, step, call)
        if phase == ALL and call[CORRECTED] != 0:
            _correct_tokens(call[CORRECTION])

    return run


def _make_correction(sources: int):  # type: ignore[no-untyped-def]  # a plain function of an address
    def run(address: int) -> None:
        _ = sources
        _correct_tokens(address)

    return run


def _make_norms(sources: int):  # type: ignore[no-untyped-def]  # a plain function of an address
    def run(address: int) -> None:
        _ = sources
        add_norms(carray(longs_at(address), (CORRECTION_NUMBERS,)))

    return run


run_step = entry_point(_make_step)
"""Run a phase; takes the address of a call's numbers."""

run_correction = entry_point(_make_correction)
"""Takes the address of a correction's numbers."""

run_norms = entry_point(_make_norms)
"""The same; before the correction."""
