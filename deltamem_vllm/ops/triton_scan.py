"""One launch for a whole step: each request's tokens one after the other, all requests at once.

This is the kernel of decode steps, of tokens that are written span by span, and of ranks for which
the maps of `triton_chunk.py` would be too large.
"""

# Triton compiles kernels, and gives their arguments no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from deltamem_vllm.ops.rule import ENDS_SPAN as _ENDS_SPAN
from deltamem_vllm.ops.rule import IN_SPAN as _IN_SPAN
from deltamem_vllm.ops.rule import MARK_BITS as _MARK_BITS
from deltamem_vllm.ops.rule import MARKS_PER_WORD as _MARKS_PER_WORD
from deltamem_vllm.ops.rule import READ_FROM as _READ_FROM
from deltamem_vllm.ops.rule import SPAN_END as _SPAN_END
from deltamem_vllm.ops.rule import STARTS_AT as _STARTS_AT
from deltamem_vllm.ops.rule import WRITE_FROM as _WRITE_FROM
from deltamem_vllm.ops.rule import WRITE_UNTIL as _WRITE_UNTIL
from deltamem_vllm.ops.triton_rule import (
    direction,
    factors,
    gate_columns,
    is_sound,
    next_child,
    only_if,
    parent_of,
    row_of,
    start_page,
    starts_alone,
    writes_at,
    written,
    zero_behind,
    zero_reads,
)

# Kernels see globals only as constexpr.
READ_FROM, WRITE_FROM = tl.constexpr(_READ_FROM), tl.constexpr(_WRITE_FROM)
WRITE_UNTIL, SPAN_END = tl.constexpr(_WRITE_UNTIL), tl.constexpr(_SPAN_END)
STARTS_AT = tl.constexpr(_STARTS_AT)
IN_SPAN, ENDS_SPAN = tl.constexpr(_IN_SPAN), tl.constexpr(_ENDS_SPAN)
MARK_BITS, MARKS_PER_WORD = tl.constexpr(_MARK_BITS), tl.constexpr(_MARKS_PER_WORD)


@triton.jit(do_not_specialize=["tokens", "rows", "table_width", "num_blocks"])
def scan_kernel(
    projections,  # [tokens, P], rows apart by projections_stride
    gate_bias,
    header,  # [num_blocks, HEADER_WORDS]
    states,  # [num_blocks, RING, HEADS, RANK, RANK]
    frozen,  # the rest of a page, if SPANS
    sums,
    marks,
    table,  # [rows, table_width]
    query_start_loc,
    seq_lens,
    reads,  # [tokens, HEADS * RANK]
    projections_stride,
    header_stride,
    states_stride,
    table_stride,
    tokens,
    rows,
    table_width,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    RING: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    I: tl.constexpr,  # state rows of a program
    C: tl.constexpr,  # RANK, padded
    WIDTH_PAD: tl.constexpr,  # HEADS * RANK, padded
    HEADER_WORDS: tl.constexpr,
    HEADER_PAD: tl.constexpr,
    INITIALISED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COUPLE: tl.constexpr,
    RANKWISE: tl.constexpr,
    MODE: tl.constexpr,
    SPANS: tl.constexpr,
):  # fmt: skip
    """Programs (row, tile of a head), with SPANS (row, 0) for all heads; and behind the rows,
    programs that set the reads of tokens of no row to 0.

    A row that hit blocks filled in this step is run by the program of the row that fills them, once
    it has stored them. The parts of a page that tiles share are the same in all of them.
    """
    WIDTH: tl.constexpr = HEADS * RANK
    GATES: tl.constexpr = WIDTH if RANKWISE else HEADS
    row, tile = tl.program_id(0), tl.program_id(1)
    if row >= rows:
        if tile == 0:
            zero_behind(reads, row, query_start_loc, rows, tokens, WIDTH, WIDTH_PAD)
        return
    if not is_sound(
        row, query_start_loc, seq_lens, table, table_stride, table_width, tokens, num_blocks,
        BLOCK_SIZE,
    ):  # fmt: skip
        if tile == 0:
            start, stop, before, after = row_of(row, query_start_loc, seq_lens)
            zero_reads(reads, tl.maximum(start, 0), tl.minimum(stop, tokens), WIDTH, WIDTH_PAD)
        return
    if parent_of(
        row, query_start_loc, seq_lens, header, header_stride, table, table_stride, table_width,
        rows, tokens, num_blocks, BLOCK_SIZE, INITIALISED,
    ) >= 0:  # fmt: skip
        return

    c = tl.arange(0, C)[None, :]
    if SPANS:
        flat = tl.arange(0, I)
        head, i = flat // RANK, flat % RANK
        valid = flat < WIDTH
        columns = head[:, None] * RANK + c
        columns_valid = valid[:, None] & (c < RANK)
    else:
        TILES: tl.constexpr = (RANK + I - 1) // I
        head = tile // TILES
        i = tile % TILES * I + tl.arange(0, I)
        valid = i < RANK
        columns = head * RANK + c
        columns_valid = c < RANK
    lanes = valid[:, None] & (c < RANK)
    flat = head * RANK + i
    in_state = flat[:, None] * RANK + c
    gates = gate_columns(i, head, HEADS, RANK, RANKWISE)
    beta_bias = tl.load(gate_bias + gates, valid, other=0.0)
    lambda_bias = beta_bias
    if not COUPLE:
        lambda_bias = tl.load(gate_bias + GATES + gates, valid, other=0.0)

    # Rows that this program runs have their root's header, through the pages they hit.
    start, stop, before, after = row_of(row, query_start_loc, seq_lens)
    alone = starts_alone(
        row, before, before > 0, header, header_stride, table, table_stride, num_blocks,
        BLOCK_SIZE, INITIALISED,
    )  # fmt: skip
    root_page = start_page(row, before, alone, table, table_stride, BLOCK_SIZE)
    known = before > 0
    if INITIALISED:
        known = before >= 0
    word = tl.arange(0, HEADER_PAD)
    copied = (word < HEADER_WORDS) & (word != STARTS_AT)
    words = tl.load(header + root_page * header_stride + word, only_if(copied, known), other=0)
    read_from = tl.sum(tl.where(word == READ_FROM, words, 0))
    write_from = tl.sum(tl.where(word == WRITE_FROM, words, 0))
    write_until = tl.sum(tl.where(word == WRITE_UNTIL, words, 0))
    span_end = 0
    if SPANS:
        span_end = tl.sum(tl.where(word == SPAN_END, words, 0))

    current = row
    while current >= 0:
        start, stop, before, after = row_of(current, query_start_loc, seq_lens)
        sound = current == row
        if current != row:
            sound = is_sound(
                current, query_start_loc, seq_lens, table, table_stride, table_width, tokens,
                num_blocks, BLOCK_SIZE,
            )  # fmt: skip
        if sound:
            pages = table + current.to(tl.int64) * table_stride
            page = start_page(current, before, alone, table, table_stride, BLOCK_SIZE)
            slot = before % RING
            state = tl.load(
                states + page * states_stride + slot * (WIDTH * RANK) + in_state,
                only_if(lanes, known), other=0.0,
            )  # fmt: skip
            calm = state
            count = 0.0
            key_sum = tl.zeros((columns_valid.shape[0], C), tl.float32)
            value_sum = tl.zeros((I,), tl.float32)
            beta_sum = tl.zeros((I,), tl.float32)
            lambda_sum = tl.zeros((I,), tl.float32)
            if SPANS:
                amid = (write_until < before) & (before < span_end)
                calm = tl.load(
                    frozen + page * states_stride + in_state, only_if(lanes, amid), other=0.0
                )
                kept = sums + page * states_stride + slot * (1 + 2 * WIDTH + GATES * (2 - COUPLE))
                count = tl.load(kept, amid, other=0.0)
                key_sum = tl.load(kept + 1 + columns, only_if(columns_valid, amid), other=0.0)
                value_sum = tl.load(kept + 1 + WIDTH + flat, only_if(valid, amid), other=0.0)
                beta_sum = tl.load(kept + 1 + 2 * WIDTH + gates, only_if(valid, amid), other=0.0)
                if not COUPLE:
                    lambda_sum = tl.load(
                        kept + 1 + 2 * WIDTH + GATES + gates, only_if(valid, amid), other=0.0
                    )

            for index in range(0, stop - start):
                position = before + index
                token = start.to(tl.int64) + index
                source = projections + token * projections_stride
                query = tl.load(source + columns, columns_valid, other=0.0)
                key = tl.load(source + WIDTH + columns, columns_valid, other=0.0)
                value = tl.load(source + 2 * WIDTH + flat, valid, other=0.0)
                beta = tl.load(source + 3 * WIDTH + gates, valid, other=0.0)
                lambda_ = beta
                if not COUPLE:
                    lambda_ = tl.load(source + 3 * WIDTH + GATES + gates, valid, other=0.0)
                writes = writes_at(position, read_from, write_from, write_until)
                seen = state
                in_spans = (position >= write_until) & (position < span_end)
                if SPANS:
                    begins = position == write_until
                    calm = tl.where(begins, state, calm)
                    count = tl.where(begins, 0.0, count)
                    key_sum = tl.where(begins, 0.0, key_sum)
                    value_sum = tl.where(begins, 0.0, value_sum)
                    beta_sum = tl.where(begins, 0.0, beta_sum)
                    lambda_sum = tl.where(begins, 0.0, lambda_sum)
                    here = tl.load(pages + position // BLOCK_SIZE).to(tl.int64)
                    place = position % BLOCK_SIZE
                    bits = tl.load(marks + here * header_stride + place // MARKS_PER_WORD)
                    mark = tl.where(in_spans, bits >> (place % MARKS_PER_WORD * MARK_BITS), 0)
                    counts = (mark & IN_SPAN) != 0
                    count = tl.where(counts, count + 1.0, count)
                    key_sum = tl.where(counts, key_sum + key, key_sum)
                    value_sum = tl.where(counts, value_sum + value, value_sum)
                    beta_sum = tl.where(counts, beta_sum + beta, beta_sum)
                    lambda_sum = tl.where(counts, lambda_sum + lambda_, lambda_sum)
                    ends = (mark & ENDS_SPAN) != 0
                    writes = tl.where(in_spans, ends, writes)
                    divisor = tl.where(ends, count, 1.0)
                    key = tl.where(ends, key_sum / divisor, key)
                    value = tl.where(ends, value_sum / divisor, value)
                    beta = tl.where(ends, beta_sum / divisor, beta)
                    lambda_ = tl.where(ends, lambda_sum / divisor, lambda_)
                    count = tl.where(ends, 0.0, count)
                    key_sum = tl.where(ends, 0.0, key_sum)
                    value_sum = tl.where(ends, 0.0, value_sum)
                    beta_sum = tl.where(ends, 0.0, beta_sum)
                    lambda_sum = tl.where(ends, 0.0, lambda_sum)
                    seen = tl.where(in_spans, calm, state)

                read = tl.sum(seen * direction(query, NORMALIZE), axis=1)
                read = tl.where(position >= read_from, read, 0.0)
                tl.store(reads + token * WIDTH + flat, read, valid)
                keep, erase, write = factors(beta + beta_bias, lambda_ + lambda_bias, COUPLE, MODE)
                changed = written(state, direction(key, NORMALIZE), value, keep, erase, write)
                state = tl.where(writes, changed, state)

                done = position + 1
                if (done % BLOCK_SIZE == 0) | (done > after - RING):
                    here = tl.load(pages + position // BLOCK_SIZE).to(tl.int64)
                    slot = done % RING
                    tl.store(
                        states + here * states_stride + slot * (WIDTH * RANK) + in_state,
                        state, lanes,
                    )  # fmt: skip
                    if tile == 0:
                        tl.store(header + here * header_stride + word, words, copied)
                    if SPANS:
                        goes_on = in_spans & (done < span_end)
                        tl.store(
                            frozen + here * states_stride + in_state, calm, only_if(lanes, goes_on)
                        )
                        kept = sums + here * states_stride
                        kept += slot * (1 + 2 * WIDTH + GATES * (2 - COUPLE))
                        tl.store(kept, count, goes_on)
                        tl.store(kept + 1 + columns, key_sum, only_if(columns_valid, goes_on))
                        tl.store(kept + 1 + WIDTH + flat, value_sum, only_if(valid, goes_on))
                        tl.store(kept + 1 + 2 * WIDTH + gates, beta_sum, only_if(valid, goes_on))
                        if not COUPLE:
                            tl.store(
                                kept + 1 + 2 * WIDTH + GATES + gates,
                                lambda_sum,
                                only_if(valid, goes_on),
                            )

        # Through the tree of rows that hit blocks of this one, or of one that did, parents first.
        # The barrier makes this program's own stores visible to all of its threads.
        tl.debug_barrier()
        # A row that hit a block has a page, whatever its root has, and starts from that.
        known, alone = current == current, current != current
        node, child_after, found, searching = current, current * 0 - 1, current * 0 - 1, True
        while searching:
            child = next_child(
                node, child_after, query_start_loc, seq_lens, header, header_stride, table,
                table_stride, table_width, rows, tokens, num_blocks, BLOCK_SIZE, INITIALISED,
            )  # fmt: skip
            if child >= 0:
                found = child
                searching = False
            elif node == row:
                searching = False
            else:
                child_after = node
                node = parent_of(
                    node, query_start_loc, seq_lens, header, header_stride, table, table_stride,
                    table_width, rows, tokens, num_blocks, BLOCK_SIZE, INITIALISED,
                )  # fmt: skip
                searching = node >= 0
        current = found
