"""Triton kernels of the memory op: one program per request and state head, its state in registers.

No length is read on the host: grids follow from shapes. See `triton.py` for what launches them.
"""

# Kernels are no Python functions: Triton compiles them, and gives their arguments no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Final

import triton
import triton.language as tl

from deltamem_vllm.ops.reference import NORM_EPS
from deltamem_vllm.ops.rule import (
    ENDS_SPAN,
    IN_SPAN,
    MARK_BITS,
    MARKS_PER_WORD,
    READ_FROM,
    SPAN_END,
    UPDATE_MODES,
    WRITE_FROM,
    WRITE_UNTIL,
)

VARYING: Final = ("num_blocks", "table_width", "num_rows", "num_tokens")
"""Integers that change from step to step; Triton would compile anew for multiples of 16."""

EPS = tl.constexpr(NORM_EPS)
READ_FROM_WORD = tl.constexpr(READ_FROM)
WRITE_FROM_WORD = tl.constexpr(WRITE_FROM)
WRITE_UNTIL_WORD = tl.constexpr(WRITE_UNTIL)
SPAN_END_WORD = tl.constexpr(SPAN_END)
IN_SPAN_MARK = tl.constexpr(IN_SPAN)
ENDS_SPAN_MARK = tl.constexpr(ENDS_SPAN)
BITS = tl.constexpr(MARK_BITS)
PER_WORD = tl.constexpr(MARKS_PER_WORD)
LAMBDA_OUTSIDE = tl.constexpr(UPDATE_MODES.index("lambda_outside"))
NO_LAMBDA = tl.constexpr(UPDATE_MODES.index("no_lambda"))


@triton.jit
def _tanh(x):
    """Exact near 0 too, where normalising would blow an error up (polynomial: Cephes, tanhf.c)."""
    square = x * x
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    # Written so that NaN takes the polynomial, which keeps it.
    return tl.where(tl.abs(x) >= 0.625, tl.where(x >= 0.0, large, -large), small)


@triton.jit
def _direction(x, NORMALIZE: tl.constexpr):
    """A query or key [RP] as the state sees it; padding is 0 and stays so."""
    if NORMALIZE:
        x = _tanh(x)
        norm = tl.sqrt(tl.sum(x * x, axis=0))
        x = x / tl.where(norm < EPS, EPS, norm)
    return x


@triton.jit
def _gate(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _written(
    state,
    key,
    value,
    beta,
    other,
    COUPLED: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The state [RP, RP] after a write.

    Args:
        state: before it.
        key, value, beta, other: [RP] before the non-linearities, biases added; `other` is lambda,
            unless it is coupled.
    """
    key = _direction(key, NORMALIZE)
    beta = _gate(beta)
    if COUPLED:
        keep = 1.0 - beta
    else:
        keep = _gate(other)
    erase = beta
    if MODE == LAMBDA_OUTSIDE:
        erase = keep * beta
    if MODE == NO_LAMBDA:
        keep = tl.full(beta.shape, 1.0, tl.float32)
    recalled = tl.sum(state * key[None, :], axis=1)
    change = beta * value - erase * recalled
    return keep[:, None] * state + change[:, None] * key[None, :]


@triton.jit
def _filler(
    position,
    page,
    block_table,
    table_stride,
    query_start_loc,
    seq_lens,
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The row that has the token at `position` in this step, in `page`, or -1; and its context."""
    found = -1
    context = 0
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        after = tl.load(seq_lens + rows, mask=is_row, other=0)
        start = tl.load(query_start_loc + rows, mask=is_row, other=0)
        stop = tl.load(query_start_loc + rows + 1, mask=is_row, other=0)
        before = after - (stop - start)
        has_it = is_row & (before >= 0) & (before <= position) & (position < after)
        place = rows.to(tl.int64) * table_stride + position // BLOCK_SIZE
        theirs = tl.load(block_table + place, mask=has_it, other=-1)
        has_it = has_it & (theirs == page)
        found = tl.maximum(found, tl.max(tl.where(has_it, rows, -1), axis=0))
        context = tl.maximum(context, tl.max(tl.where(has_it, before, 0), axis=0))
    return found, context


@triton.jit
def _beginning(
    row,
    before,
    block_table,
    table_stride,
    query_start_loc,
    seq_lens,
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The latest token count up to a row's context whose state was there before this step."""
    begin = before
    going = (before > 0) & (before % BLOCK_SIZE == 0)
    while going:
        place = row.to(tl.int64) * table_stride + begin // BLOCK_SIZE - 1
        page = tl.load(block_table + place)
        found, context = _filler(
            begin - 1,
            page,
            block_table,
            table_stride,
            query_start_loc,
            seq_lens,
            num_rows,
            BLOCK_SIZE,
            ROWS,
        )
        if found >= 0:
            begin = tl.maximum(begin - BLOCK_SIZE, context)
        going = (found >= 0) & (begin > 0) & (begin % BLOCK_SIZE == 0)
    return begin


@triton.jit
def _load_columns(source, first, head, R: tl.constexpr, PER_ROW: tl.constexpr, mask, lanes):
    """[RP] fp32 of a state head: R columns of its own, or one for all of its rows."""
    if PER_ROW:
        return tl.load(source + first + head * R + lanes, mask=mask, other=0.0)
    return tl.load(source + first + head + lanes * 0, mask=mask, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def first_states_kernel(
    states,
    states_stride,
    num_blocks,
    block_table,
    table_stride,
    table_width,
    query_start_loc,
    seq_lens,
    num_rows,
    num_tokens,
    sums_at,
    first_states,
    first_sums,
    begins,
    H: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    RING: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_P: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INITIALISED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copy where each row's scan begins to `begins` [rows], with the state and sums there."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    after = tl.load(seq_lens + row)
    start = tl.load(query_start_loc + row)
    stop = tl.load(query_start_loc + row + 1)
    before = after - (stop - start)
    is_row = (after > 0) & (stop > start) & (before >= 0) & (start >= 0) & (stop <= num_tokens)
    is_row = is_row & ((after - 1) // BLOCK_SIZE < table_width)
    if is_row:
        begin = _beginning(
            row,
            before,
            block_table,
            table_stride,
            query_start_loc,
            seq_lens,
            num_rows,
            BLOCK_SIZE,
            ROWS,
        )
        tl.store(begins + row, begin)
        lanes = tl.arange(0, RP)
        is_lane = lanes < R
        is_state = is_lane[:, None] & is_lane[None, :]
        inside = lanes[:, None] * R + lanes[None, :]
        place = row.to(tl.int64) * table_stride + tl.maximum(begin - 1, 0) // BLOCK_SIZE
        page = tl.load(block_table + place)
        is_page = (page >= 0) & (page < num_blocks)
        if not INITIALISED:
            is_page = is_page & (begin > 0)
        slot = begin % RING
        source = states + page.to(tl.int64) * states_stride
        there = (lanes[:, None] < tl.where(is_page, R, 0)) & is_lane[None, :]
        state = tl.load(source + (slot * H + head) * R * R + inside, mask=there, other=0.0)
        target = first_states + (row * H + head).to(tl.int64) * R * R
        tl.store(target + inside, state, mask=is_state)
        if SUMS > 0:
            if head == 0:
                columns = tl.arange(0, SUMS_P)
                sums = tl.load(
                    source + sums_at + slot * SUMS + columns,
                    mask=columns < tl.where(is_page, SUMS, 0),
                    other=0.0,
                )
                at = first_sums + row.to(tl.int64) * SUMS
                tl.store(at + columns, sums, mask=columns < SUMS)


@triton.jit(do_not_specialize=VARYING)
def scan_kernel(
    projections,
    projections_stride,
    gate_bias,
    header,
    header_stride,
    states,
    states_stride,
    num_blocks,
    frozen_at,
    sums_at,
    marks_at,
    block_table,
    table_stride,
    table_width,
    query_start_loc,
    seq_lens,
    num_rows,
    num_tokens,
    first_states,
    first_sums,
    begins,
    reads,
    H: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    RING: tl.constexpr,
    WORDS: tl.constexpr,
    WORDS_P: tl.constexpr,
    GATE_DIM: tl.constexpr,
    PER_ROW: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COUPLED: tl.constexpr,
    MODE: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INITIALISED: tl.constexpr,
    COPIED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`memory_step` for one row and state head.

    Args:
        frozen_at, sums_at: where these begin in a page of `states`; for spans.
        marks_at: where marks begin in a page of `header`.
        first_states, first_sums, begins: see `first_states_kernel`; read if COPIED.
        SUMS: 0 without spans.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    after = tl.load(seq_lens + row)
    start = tl.load(query_start_loc + row)
    stop = tl.load(query_start_loc + row + 1)
    before = after - (stop - start)
    is_row = (after > 0) & (stop > start) & (before >= 0) & (start >= 0) & (stop <= num_tokens)
    is_row = is_row & ((after - 1) // BLOCK_SIZE < table_width)
    if is_row:
        lanes = tl.arange(0, RP)
        is_lane = lanes < R
        is_state = is_lane[:, None] & is_lane[None, :]
        inside = lanes[:, None] * R + lanes[None, :]
        own_table = block_table + row.to(tl.int64) * table_stride

        if COPIED:
            begin = tl.load(begins + row)
        else:
            begin = _beginning(
                row,
                before,
                block_table,
                table_stride,
                query_start_loc,
                seq_lens,
                num_rows,
                BLOCK_SIZE,
                ROWS,
            )
        page = tl.load(own_table + tl.maximum(begin - 1, 0) // BLOCK_SIZE)
        is_page = (page >= 0) & (page < num_blocks)
        if not INITIALISED:
            is_page = is_page & (begin > 0)
        words = tl.arange(0, WORDS_P)
        head_words = header + page.to(tl.int64) * header_stride
        kept_words = tl.load(head_words + words, mask=words < tl.where(is_page, WORDS, 0), other=0)
        read_from = tl.load(head_words + READ_FROM_WORD, mask=is_page, other=0)
        write_from = tl.load(head_words + WRITE_FROM_WORD, mask=is_page, other=0)
        write_until = tl.load(head_words + WRITE_UNTIL_WORD, mask=is_page, other=0)
        slot = begin % RING
        source = states + page.to(tl.int64) * states_stride
        there = (lanes[:, None] < tl.where(is_page, R, 0)) & is_lane[None, :]
        if COPIED:
            at = first_states + (row * H + head).to(tl.int64) * R * R
            state = tl.load(at + inside, mask=is_state, other=0.0)
        else:
            state = tl.load(source + (slot * H + head) * R * R + inside, mask=there, other=0.0)
        beta_bias = _load_columns(gate_bias, 0, head, R, PER_ROW, is_lane, lanes)
        if COUPLED:
            other_bias = beta_bias
        else:
            other_bias = _load_columns(gate_bias, GATE_DIM, head, R, PER_ROW, is_lane, lanes)

        span_end = 0
        frozen = state
        count = 0.0
        key_sum = tl.zeros([RP], tl.float32)
        value_sum = tl.zeros([RP], tl.float32)
        beta_sum = tl.zeros([RP], tl.float32)
        other_sum = tl.zeros([RP], tl.float32)
        if SUMS > 0:
            span_end = tl.load(head_words + SPAN_END_WORD, mask=is_page, other=0)
            if (begin > write_until) & (begin < span_end):
                frozen = tl.load(source + frozen_at + head * R * R + inside, mask=there, other=0.0)
                if COPIED:
                    sums = first_sums + row.to(tl.int64) * SUMS
                else:
                    sums = source + sums_at + slot * SUMS
                count = tl.load(sums)
                sums += 1
                key_sum = _load_columns(sums, 0, head, R, True, is_lane, lanes)
                value_sum = _load_columns(sums, H * R, head, R, True, is_lane, lanes)
                beta_sum = _load_columns(sums, 2 * H * R, head, R, PER_ROW, is_lane, lanes)
                if not COUPLED:
                    other_sum = _load_columns(
                        sums, 2 * H * R + GATE_DIM, head, R, PER_ROW, is_lane, lanes
                    )

        for position in range(begin, after):
            is_own = position >= before
            page = tl.load(own_table + position // BLOCK_SIZE)
            token = start + position - before
            if position < before:
                filler, context = _filler(
                    position,
                    page,
                    block_table,
                    table_stride,
                    query_start_loc,
                    seq_lens,
                    num_rows,
                    BLOCK_SIZE,
                    ROWS,
                )
                token = tl.load(query_start_loc + tl.maximum(filler, 0)) + position - context
            columns = projections + token.to(tl.int64) * projections_stride
            key = _load_columns(columns, H * R, head, R, True, is_lane, lanes)
            value = _load_columns(columns, 2 * H * R, head, R, True, is_lane, lanes)
            beta = _load_columns(columns, 3 * H * R, head, R, PER_ROW, is_lane, lanes)
            other = beta
            if not COUPLED:
                other = _load_columns(
                    columns, 3 * H * R + GATE_DIM, head, R, PER_ROW, is_lane, lanes
                )
            in_prompt = False
            if SUMS > 0:
                in_prompt = (position >= write_until) & (position < span_end)
                if position == write_until:
                    frozen = state
            if is_own & (position >= read_from):
                query = _load_columns(columns, 0, head, R, True, is_lane, lanes)
                query = _direction(query, NORMALIZE)
                asked = state
                if SUMS > 0:
                    if in_prompt:
                        asked = frozen
                read = tl.sum(asked * query[None, :], axis=1)
                target = reads + token.to(tl.int64) * (H * R) + head * R
                tl.store(target + lanes, read, mask=is_lane)

            is_written = (position >= write_from) | (position < write_until)
            if SUMS > 0:
                if in_prompt:
                    is_page = (page >= 0) & (page < num_blocks)
                    place = position % BLOCK_SIZE
                    bits = tl.load(
                        header + page.to(tl.int64) * header_stride + marks_at + place // PER_WORD,
                        mask=is_page,
                        other=0,
                    )
                    mark = bits >> (place % PER_WORD * BITS)
                    if (mark & IN_SPAN_MARK) != 0:
                        count += 1.0
                        key_sum += key
                        value_sum += value
                        beta_sum += beta
                        other_sum += other
                    is_written = (mark & ENDS_SPAN_MARK) != 0
                    if is_written:
                        key = key_sum / count
                        value = value_sum / count
                        beta = beta_sum / count
                        other = other_sum / count
                        count = 0.0
                        key_sum = tl.zeros([RP], tl.float32)
                        value_sum = tl.zeros([RP], tl.float32)
                        beta_sum = tl.zeros([RP], tl.float32)
                        other_sum = tl.zeros([RP], tl.float32)
            if is_written:
                state = _written(
                    state,
                    key,
                    value,
                    beta + beta_bias,
                    other + other_bias,
                    COUPLED,
                    MODE,
                    NORMALIZE,
                )

            done = position + 1
            is_page = (page >= 0) & (page < num_blocks)
            is_stored = is_own & is_page & ((done % BLOCK_SIZE == 0) | (done > after - RING))
            if is_stored:
                slot = done % RING
                target = states + page.to(tl.int64) * states_stride
                tl.store(target + (slot * H + head) * R * R + inside, state, mask=is_state)
                if head == 0:
                    tl.store(
                        header + page.to(tl.int64) * header_stride + words,
                        kept_words,
                        mask=words < WORDS,
                    )
                if SUMS > 0:
                    if in_prompt & (done < span_end):
                        tl.store(target + frozen_at + head * R * R + inside, frozen, mask=is_state)
                        sums = target + sums_at + slot * SUMS
                        if head == 0:
                            tl.store(sums, count)
                        sums += 1
                        tl.store(sums + head * R + lanes, key_sum, mask=is_lane)
                        tl.store(sums + H * R + head * R + lanes, value_sum, mask=is_lane)
                        gates = sums + 2 * H * R
                        if PER_ROW:
                            tl.store(gates + head * R + lanes, beta_sum, mask=is_lane)
                        else:
                            tl.store(gates + head + lanes, beta_sum, mask=lanes == 0)
                        if not COUPLED:
                            gates += GATE_DIM
                            if PER_ROW:
                                tl.store(gates + head * R + lanes, other_sum, mask=is_lane)
                            else:
                                tl.store(gates + head + lanes, other_sum, mask=lanes == 0)
