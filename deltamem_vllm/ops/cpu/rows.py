"""A request's tokens of one step, read and written one after the other: the rule's second half.

A working state is [H, r, width] and lies transposed, see `lanes.py`; `layer`, `step` and `call` are
the arrays of `numbers.py`.
"""

from deltamem_vllm.ops.cpu import views
from deltamem_vllm.ops.cpu.compiler import compiled_once
from deltamem_vllm.ops.cpu.functions import ZERO
from deltamem_vllm.ops.cpu.lanes import read_state, write_state
from deltamem_vllm.ops.cpu.numbers import (
    BLOCK_SIZE,
    FROZEN_AT,
    HEADS,
    PAGES_ARE_INITIALISED,
    RANK,
    RING,
    WIDTH,
    WORD_BYTES,
    Floats,
    Ints,
    Numbers,
)
from deltamem_vllm.ops.cpu.spans import run_span_tokens
from deltamem_vllm.ops.cpu.states import load, start_page, store, store_header
from deltamem_vllm.ops.cpu.views import ERASE, KEEP, KEY, QUERY, WRITTEN
from deltamem_vllm.ops.rule import READ_FROM, SPAN_END, WRITE_FROM, WRITE_UNTIL


@compiled_once
def run_row(
    layer: Numbers,
    step: Numbers,
    call: Numbers,
    row: int,
    state: Floats,
    read: Floats,
    words: Ints,
) -> None:
    """Run one request of the batch; its row must be well-formed and have tokens.

    Args:
        row: which.
        state, read, words: [H, r, width], [width] and a header's words, of this thread.
    """
    headers, starts = views.headers(layer), views.query_start_loc(step)
    start, stop = starts[row], starts[row + 1]
    before = views.seq_lens(step)[row] - (stop - start)
    if before > 0 or layer[PAGES_ARE_INITIALISED]:
        page = start_page(layer, step, row, before)
        load(views.pages(layer)[page], before % layer[RING], state)
        for i in range(words.size):
            words[i] = headers[page, i]
    else:
        state[:] = ZERO
        words[:] = 0
    span_begin = span_end = 0
    if layer[FROZEN_AT] >= 0:
        span_begin, span_end = words[WRITE_UNTIL], words[SPAN_END]

    token = start
    while token < stop:
        position = before + token - start
        if span_begin <= position < span_end:
            last = min(stop, token + span_end - position)
            run_span_tokens(layer, step, call, row, token, last, state, read, words)
        else:
            last = min(stop, token + span_begin - position) if position < span_end else stop
            _run_tokens(layer, step, call, row, token, last, state, read, words)
        token = last


@compiled_once
def _run_tokens(
    layer: Numbers,
    step: Numbers,
    call: Numbers,
    row: int,
    first: int,
    last: int,
    state: Floats,
    read: Floats,
    words: Ints,
) -> None:
    """Tokens [first, last) of a row, each written by itself."""
    heads, rank, width = layer[HEADS], layer[RANK], layer[WIDTH]
    block_size, ring = layer[BLOCK_SIZE], layer[RING]
    pages, headers, table = views.pages(layer), views.headers(layer), views.block_table(step)
    activations, reads = views.activations(layer, call), views.reads(layer, call)
    # Addresses: a view of each vector would cost more than what is done with it.
    vectors, vector_bytes = activations.ctypes.data, width * WORD_BYTES
    kind_bytes = activations[0].size * WORD_BYTES
    state_at, state_bytes = state.ctypes.data, rank * width * WORD_BYTES
    end = views.seq_lens(step)[row]
    position = end - (views.query_start_loc(step)[row + 1] - first)
    for token in range(first, last):
        is_read = position >= words[READ_FROM]
        is_written = is_read and (position >= words[WRITE_FROM] or position < words[WRITE_UNTIL])
        for head in range(heads):
            vector = vectors + (token * heads + head) * vector_bytes
            lanes = state_at + head * state_bytes
            if is_read:
                read_state(lanes, rank, width, vector + QUERY * kind_bytes, read.ctypes.data)
                for i in range(rank):
                    reads[token, head * rank + i] = read[i]
            if is_written:
                write_state(
                    lanes,
                    rank,
                    width,
                    vector + KEY * kind_bytes,
                    vector + KEEP * kind_bytes,
                    vector + ERASE * kind_bytes,
                    vector + WRITTEN * kind_bytes,
                )
        position += 1
        if position % block_size == 0 or position > end - ring:
            page = table[row, (position - 1) // block_size]
            store(state, pages[page], position % ring)
            store_header(words, headers, page)
