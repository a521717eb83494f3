"""Tokens that are written span by span: all read the state as it was before the first of them, and
a span's mean is written with its last token."""

import numpy as np

from deltamem_vllm.ops.cpu import views
from deltamem_vllm.ops.cpu.activations import coefficients, normalise, unpack
from deltamem_vllm.ops.cpu.compiler import compiled_once
from deltamem_vllm.ops.cpu.functions import ONE, ZERO
from deltamem_vllm.ops.cpu.lanes import read_state, write_state
from deltamem_vllm.ops.cpu.numbers import (
    BLOCK_SIZE,
    COUPLE_LAMBDA,
    FROZEN_AT,
    HEADS,
    MARKS_AT,
    MODE,
    NORMALIZE_QK,
    RANK,
    RING,
    SUMS_AT,
    WIDTH,
    Floats,
    Ints,
    Numbers,
)
from deltamem_vllm.ops.cpu.states import load, store, store_header
from deltamem_vllm.ops.cpu.views import ACTIVATIONS, ERASE, KEEP, KEY, QUERY, WRITTEN
from deltamem_vllm.ops.rule import (
    ENDS_SPAN,
    IN_SPAN,
    MARK_BITS,
    MARKS_PER_WORD,
    READ_FROM,
    SPAN_END,
    WRITE_UNTIL,
)


@compiled_once
def run_span_tokens(
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
    """Tokens [first, last) of a row, all in its part that is written span by span.

    A span may be cut anywhere, so sums and frozen state come from a page if the part began before.
    """
    heads, rank, width = layer[HEADS], layer[RANK], layer[WIDTH]
    block_size, ring = layer[BLOCK_SIZE], layer[RING]
    frozen_at, sums_at = layer[FROZEN_AT], layer[SUMS_AT]
    pages, headers, table = views.pages(layer), views.headers(layer), views.block_table(step)
    projections, bias = views.projections(layer, call), views.gate_bias(layer)
    activations, reads = views.activations(layer, call), views.reads(layer, call)
    end = views.seq_lens(step)[row]
    position = end - (views.query_start_loc(step)[row + 1] - first)

    read_dim = heads * rank
    frozen = np.zeros((heads, rank, width), np.float32)
    sums = np.zeros(1 + 2 * read_dim + bias.size, np.float32)
    mean = np.zeros((1, read_dim + sums.size - 1), np.float32)
    written = np.zeros((ACTIVATIONS, 1, heads, width), np.float32)
    if position == words[WRITE_UNTIL]:
        frozen[:] = state
    else:
        page = table[row, (position - 1) // block_size]
        load(pages[page, frozen_at:], 0, frozen)
        at = sums_at + position % ring * sums.size
        sums[:] = pages[page, at : at + sums.size]

    for token in range(first, last):
        if position >= words[READ_FROM]:
            for head in range(heads):
                query = activations[QUERY, token, head]
                read_state(
                    frozen[head].ctypes.data, rank, width, query.ctypes.data, read.ctypes.data
                )
                for i in range(rank):
                    reads[token, head * rank + i] = read[i]
        page = table[row, position // block_size]
        place = position % block_size
        mark = headers[page, layer[MARKS_AT] + place // MARKS_PER_WORD] >> (
            place % MARKS_PER_WORD * MARK_BITS
        )
        if mark & IN_SPAN:
            sums[0] += ONE
            for i in range(1, sums.size):
                sums[i] += projections[token, read_dim + i - 1]
        if mark & ENDS_SPAN:
            for i in range(1, sums.size):
                mean[0, read_dim + i - 1] = sums[i] / sums[0]
            sums[:] = ZERO
            unpack(mean, read_dim, rank, written[KEY])
            if layer[NORMALIZE_QK]:
                normalise(written[KEY])
            coefficients(
                mean,
                bias,
                rank,
                layer[COUPLE_LAMBDA] != 0,
                layer[MODE],
                written[KEEP],
                written[ERASE],
                written[WRITTEN],
            )
            for head in range(heads):
                write_state(
                    state[head].ctypes.data,
                    rank,
                    width,
                    written[KEY, 0, head].ctypes.data,
                    written[KEEP, 0, head].ctypes.data,
                    written[ERASE, 0, head].ctypes.data,
                    written[WRITTEN, 0, head].ctypes.data,
                )
        position += 1
        if position % block_size == 0 or position > end - ring:
            store(state, pages[page], position % ring)
            store_header(words, headers, page)
            if position < words[SPAN_END]:
                store(frozen, pages[page, frozen_at:], 0)
                at = sums_at + position % ring * sums.size
                pages[page, at : at + sums.size] = sums
