"""Prefill in parallel over chunks of a row's tokens, in four launches.

A row of a state goes through a token as s A + b, with A = keep I - erase k k^T and b = write v k^T.
So it goes through a chunk of tokens by one such map, which does not depend on the state:

1. `plan_kernel`: which rows are sound, which hit blocks filled in this step, and their headers.
2. `maps_kernel`: the map of every chunk but the last of its row, token by token, chunks in
   parallel. A is kept per row of the state with rankwise gates, else per head.
3. `carry_kernel`: the state at the start of every chunk, from map to map, rows in parallel. A row
   that hit blocks of another starts from that one's maps: it needs no page of this step.
4. `reads_kernel`: from those states, reads and pages, chunks in parallel.

No launch reads what it writes itself, and pages are only written by the last one.

A row's chunks begin at its first token. Slot `start // CHUNK + row + j` belongs to chunk j of a
row, so there are at most `tokens // CHUNK + rows` slots, and no sum over rows is needed.
"""

# Triton compiles kernels, and gives their arguments no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from deltamem_vllm.ops.rule import READ_FROM as _READ_FROM
from deltamem_vllm.ops.rule import STARTS_AT as _STARTS_AT
from deltamem_vllm.ops.rule import WRITE_FROM as _WRITE_FROM
from deltamem_vllm.ops.rule import WRITE_UNTIL as _WRITE_UNTIL
from deltamem_vllm.ops.triton_rule import (
    LOOK,
    direction,
    factors,
    gate_columns,
    is_sound,
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

PARENT = tl.constexpr(0)
"""Word of a row's plan: the row whose blocks it hit, -1 for none, `SKIPPED`."""

ROOT = tl.constexpr(1)
"""Word of a row's plan: the row at the end of its chain of parents, or itself."""

PAGE = tl.constexpr(2)
"""Word of a row's plan: the page that its root starts from."""

HEADER = tl.constexpr(3)
"""Where the header's words begin in a row's plan."""

SKIPPED = tl.constexpr(-2)
STAGES = tl.constexpr(4)
"""Tokens whose projections are on their way at once: a trip to memory takes longer than a token."""

CARRY_STAGES = tl.constexpr(3)
"""Maps on their way at once."""

STARTS_AT = tl.constexpr(_STARTS_AT)
READ_FROM = tl.constexpr(HEADER.value + _READ_FROM)
WRITE_FROM = tl.constexpr(HEADER.value + _WRITE_FROM)
WRITE_UNTIL = tl.constexpr(HEADER.value + _WRITE_UNTIL)


@triton.jit(do_not_specialize=["tokens", "rows", "table_width", "num_blocks"])
def plan_kernel(
    header,  # [num_blocks, HEADER_WORDS]
    table,  # [rows, table_width]
    query_start_loc,
    seq_lens,
    reads,  # [tokens, WIDTH]
    plans,  # [rows, HEADER + HEADER_WORDS], out
    slots,  # [tokens // CHUNK + rows], out: the row of each chunk
    header_stride,
    table_stride,
    tokens,
    rows,
    table_width,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    HEADER_WORDS: tl.constexpr,
    HEADER_PAD: tl.constexpr,
    INITIALISED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs (row,), and behind the rows, programs that set the reads of no row to 0."""
    row = tl.program_id(0)
    if row >= rows:
        zero_behind(reads, row, query_start_loc, rows, tokens, WIDTH, WIDTH_PAD)
        return
    start, stop, before, _after = row_of(row, query_start_loc, seq_lens)
    plan = plans + row * (HEADER + HEADER_WORDS)
    sound = is_sound(
        row, query_start_loc, seq_lens, table, table_stride, table_width, tokens, num_blocks,
        BLOCK_SIZE,
    )  # fmt: skip
    parent, root = row * 0 - 1, row
    if sound:
        parent = parent_of(
            row, query_start_loc, seq_lens, header, header_stride, table, table_stride,
            table_width, rows, tokens, num_blocks, BLOCK_SIZE, INITIALISED,
        )  # fmt: skip
        ancestor = parent
        while ancestor >= 0:
            root = ancestor
            sound = is_sound(
                root, query_start_loc, seq_lens, table, table_stride, table_width, tokens,
                num_blocks, BLOCK_SIZE,
            )  # fmt: skip
            ancestor = row * 0 - 1
            if sound:
                ancestor = parent_of(
                    root, query_start_loc, seq_lens, header, header_stride, table, table_stride,
                    table_width, rows, tokens, num_blocks, BLOCK_SIZE, INITIALISED,
                )  # fmt: skip
    if not sound:
        tl.store(plan + PARENT, SKIPPED)
        zero_reads(reads, tl.maximum(start, 0), tl.minimum(stop, tokens), WIDTH, WIDTH_PAD)
        return
    tl.store(plan + PARENT, parent)
    tl.store(plan + ROOT, root)
    _start, _stop, before, _after = row_of(root, query_start_loc, seq_lens)
    known = before > 0
    if INITIALISED:
        known = before >= 0
    alone = starts_alone(
        root, before, before > 0, header, header_stride, table, table_stride, num_blocks,
        BLOCK_SIZE, INITIALISED,
    )  # fmt: skip
    page = start_page(root, before, alone, table, table_stride, BLOCK_SIZE)
    tl.store(plan + PAGE, page.to(tl.int32))
    word = tl.arange(0, HEADER_PAD)
    words = tl.load(
        header + page * header_stride + word, only_if(word < HEADER_WORDS, known), other=0
    )
    tl.store(plan + HEADER + word, words, word < HEADER_WORDS)
    base, chunks = start // CHUNK + row, (stop - start + CHUNK - 1) // CHUNK
    for first in range(0, chunks, LOOK):
        chunk = first + tl.arange(0, LOOK)
        tl.store(slots + base + chunk, chunk * 0 + row, chunk < chunks)


@triton.jit
def chunk_of(
    slot, slots, plans, query_start_loc, seq_lens, rows,
    HEADER_WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The row of a slot, its plan, first token, position of that, tokens, and those after them; a
    slot of no chunk has 0 tokens.

    What stands in a slot that `plan_kernel` left alone is of any value, and is tried.
    """
    row = tl.load(slots + slot)
    row = tl.where((row >= 0) & (row < rows), row, 0)
    plan = plans + row * (HEADER + HEADER_WORDS)
    start, stop, before, _after = row_of(row, query_start_loc, seq_lens)
    chunk = slot - (start // CHUNK + row)
    first = start + chunk * CHUNK
    mine = (tl.load(plan + PARENT) != SKIPPED) & (chunk >= 0) & (first < stop)
    count = tl.where(mine, tl.minimum(stop - first, CHUNK), 0)
    return row, plan, first, before + chunk * CHUNK, count, tl.where(mine, stop - first - count, 0)


@triton.jit
def writes_any(first, count, plan):
    """Whether one of `count` positions from `first` on may write."""
    some = (first + count > tl.load(plan + WRITE_FROM)) | (first < tl.load(plan + WRITE_UNTIL))
    return some & (first + count > tl.load(plan + READ_FROM))


@triton.jit
def load_gates(
    source, gate_bias, gates, valid, WIDTH: tl.constexpr, GATES: tl.constexpr,
    COUPLE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """keep, erase and write factors of one token's gates at columns `gates`."""
    beta = tl.load(source + 3 * WIDTH + gates, valid, other=0.0)
    beta += tl.load(gate_bias + gates, valid, other=0.0)
    lambda_ = beta
    if not COUPLE:
        lambda_ = tl.load(source + 3 * WIDTH + GATES + gates, valid, other=0.0)
        lambda_ += tl.load(gate_bias + GATES + gates, valid, other=0.0)
    return factors(beta, lambda_, COUPLE, MODE)


@triton.jit
def after_token(
    state, source, gate_bias, head, HEADS: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
    NORMALIZE: tl.constexpr, COUPLE: tl.constexpr, RANKWISE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One head's state [C, C] after the write of the token whose projections are at `source`."""
    WIDTH: tl.constexpr = HEADS * RANK
    GATES: tl.constexpr = WIDTH if RANKWISE else HEADS
    i, c = tl.arange(0, C), tl.arange(0, C)[None, :]
    key = tl.load(source + WIDTH + head * RANK + c, c < RANK, other=0.0)
    value = tl.load(source + 2 * WIDTH + head * RANK + i, i < RANK, other=0.0)
    gates = gate_columns(i, head, HEADS, RANK, RANKWISE)
    keep, erase, write = load_gates(source, gate_bias, gates, i < RANK, WIDTH, GATES, COUPLE, MODE)
    return written(state, direction(key, NORMALIZE), value, keep, erase, write)


@triton.jit(do_not_specialize=["rows"])
def maps_kernel(
    projections,
    gate_bias,
    query_start_loc,
    seq_lens,
    plans,
    slots,
    maps,  # [slots, HEADS, RANK or 1, RANK, RANK], out
    offsets,  # [slots, HEADS, RANK, RANK], out
    projections_stride,
    rows,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    C: tl.constexpr,  # RANK, padded
    A: tl.constexpr,  # maps of a state: C with rankwise gates, else 1
    HEADER_WORDS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COUPLE: tl.constexpr,
    RANKWISE: tl.constexpr,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs (slot, head): s -> s A + b over a chunk; A is [A, C, C], b is [C, C]."""
    WIDTH: tl.constexpr = HEADS * RANK
    GATES: tl.constexpr = WIDTH if RANKWISE else HEADS
    MAPS: tl.constexpr = RANK if RANKWISE else 1
    slot, head = tl.program_id(0), tl.program_id(1)
    _row, plan, start, position, count, behind = chunk_of(
        slot, slots, plans, query_start_loc, seq_lens, rows, HEADER_WORDS, CHUNK
    )
    if behind == 0:
        return
    if not writes_any(position, count, plan):
        return
    read_from = tl.load(plan + READ_FROM)
    write_from, write_until = tl.load(plan + WRITE_FROM), tl.load(plan + WRITE_UNTIL)
    a = tl.arange(0, A)
    gates = gate_columns(a, head, HEADS, RANK, RANKWISE)
    m, c = tl.arange(0, C), tl.arange(0, C)
    unit = tl.where(m[:, None] == c[None, :], 1.0, 0.0)
    map_ = tl.zeros((A, C, C), tl.float32) + unit[None, :, :]
    offset = tl.zeros((C, C), tl.float32)
    for index in tl.range(0, CHUNK, num_stages=STAGES):
        source = projections + (start.to(tl.int64) + index) * projections_stride
        key = tl.load(source + WIDTH + head * RANK + c[None, :], c[None, :] < RANK, other=0.0)
        key = direction(key, NORMALIZE)[:, None, :]
        keep, erase, _write = load_gates(
            source, gate_bias, gates, a < MAPS, WIDTH, GATES, COUPLE, MODE
        )
        recalled = erase[:, None] * tl.sum(map_ * key, axis=2)
        changed = keep[:, None, None] * map_ - recalled[:, :, None] * key
        at = position + index
        writes = writes_at(at, read_from, write_from, write_until)
        map_ = tl.where(writes, changed, map_)
        changed_offset = after_token(
            offset, source, gate_bias, head, HEADS, RANK, C, NORMALIZE, COUPLE, RANKWISE, MODE
        )
        offset = tl.where(writes, changed_offset, offset)
    place = slot.to(tl.int64) * HEADS + head
    inside = (m < RANK)[:, None] & (c < RANK)[None, :]
    in_map = m[:, None] * RANK + c[None, :]
    target = maps + (place * MAPS + a)[:, None, None] * (RANK * RANK) + in_map[None, :, :]
    tl.store(target, map_, (a < MAPS)[:, None, None] & inside[None, :, :])
    tl.store(offsets + place * (RANK * RANK) + in_map, offset, inside)


@triton.jit(do_not_specialize=["rows"])
def carry_kernel(
    projections,
    gate_bias,
    states,  # [num_blocks, RING, HEADS, RANK, RANK]
    query_start_loc,
    seq_lens,
    plans,
    maps,
    offsets,
    starts,  # [slots, HEADS, RANK, RANK], out: the state before each chunk
    projections_stride,
    states_stride,
    rows,
    RING: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    HEADER_WORDS: tl.constexpr,
    INITIALISED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COUPLE: tl.constexpr,
    RANKWISE: tl.constexpr,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs (row, head), along the row's chain from its root down to itself."""
    MAPS: tl.constexpr = RANK if RANKWISE else 1
    PLAN: tl.constexpr = HEADER + HEADER_WORDS
    row, head = tl.program_id(0), tl.program_id(1)
    plan = plans + row * PLAN
    if tl.load(plan + PARENT) == SKIPPED:
        return
    node = tl.load(plan + ROOT)
    _start, _stop, before, _after = row_of(node, query_start_loc, seq_lens)
    known = before > 0
    if INITIALISED:
        known = before >= 0
    a, m, c = tl.arange(0, A), tl.arange(0, C), tl.arange(0, C)
    inside = (m < RANK)[:, None] & (c < RANK)[None, :]
    in_state = m[:, None] * RANK + c[None, :]
    in_maps = a[:, None, None] * (RANK * RANK) + in_state[None, :, :]
    maps_inside = (a < MAPS)[:, None, None] & inside[None, :, :]
    page = tl.load(plan + PAGE).to(tl.int64)
    at = states + page * states_stride + (before % RING * HEADS + head) * (RANK * RANK)
    state = tl.load(at + in_state, only_if(inside, known), other=0.0)

    while node >= 0:
        start, stop, before, _after = row_of(node, query_start_loc, seq_lens)
        # The next row of the chain, and the tokens of this one that it has in its context.
        following, goal = row, stop - start
        if node != row:
            above = tl.load(plans + following * PLAN + PARENT)
            while above != node:
                following = above
                above = tl.load(plans + following * PLAN + PARENT)
            _start, _stop, context, _after = row_of(following, query_start_loc, seq_lens)
            goal = context - before
        # The last chunk of a row has no map.
        full = tl.minimum(goal // CHUNK, (stop - start - 1) // CHUNK)
        base = start // CHUNK + node
        for chunk in tl.range(0, full, num_stages=CARRY_STAGES):
            place = (base + chunk).to(tl.int64) * HEADS + head
            here = place * (RANK * RANK) + in_state
            if node == row:
                tl.store(starts + here, state, inside)
            # Masked, not skipped: loads inside of a condition would not be fetched ahead.
            writes = writes_any(before + chunk * CHUNK, CHUNK, plan)
            in_map = maps + place * (MAPS * RANK * RANK) + in_maps
            map_ = tl.load(in_map, only_if(maps_inside, writes), other=0.0)
            offset = tl.load(offsets + here, only_if(inside, writes), other=0.0)
            mapped = tl.sum(state[:, :, None] * map_, axis=1) + offset
            state = tl.where(writes, mapped, state)
        done = full * CHUNK
        if node == row:
            place = (base + full).to(tl.int64) * HEADS + head
            tl.store(starts + place * (RANK * RANK) + in_state, state, inside)
            node = row * 0 - 1
        else:
            # Here, not above: they would take up registers in the loop over chunks.
            read_from = tl.load(plan + READ_FROM)
            write_from, write_until = tl.load(plan + WRITE_FROM), tl.load(plan + WRITE_UNTIL)
            for index in range(done, goal):
                changed = after_token(
                    state, projections + (start.to(tl.int64) + index) * projections_stride,
                    gate_bias, head, HEADS, RANK, C, NORMALIZE, COUPLE, RANKWISE, MODE,
                )  # fmt: skip
                at_ = before + index
                writes = writes_at(at_, read_from, write_from, write_until)
                state = tl.where(writes, changed, state)
            node = following


@triton.jit(do_not_specialize=["rows"])
def reads_kernel(
    projections,
    gate_bias,
    header,
    states,
    table,
    query_start_loc,
    seq_lens,
    plans,
    slots,
    starts,
    reads,
    projections_stride,
    header_stride,
    states_stride,
    table_stride,
    rows,
    BLOCK_SIZE: tl.constexpr,
    RING: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    C: tl.constexpr,
    HEADER_WORDS: tl.constexpr,
    HEADER_PAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COUPLE: tl.constexpr,
    RANKWISE: tl.constexpr,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs (slot, head): a chunk's tokens one after the other, from the state before it."""
    WIDTH: tl.constexpr = HEADS * RANK
    slot, head = tl.program_id(0), tl.program_id(1)
    row, plan, start, position, count, behind = chunk_of(
        slot, slots, plans, query_start_loc, seq_lens, rows, HEADER_WORDS, CHUNK
    )
    if count == 0:
        return
    read_from = tl.load(plan + READ_FROM)
    write_from, write_until = tl.load(plan + WRITE_FROM), tl.load(plan + WRITE_UNTIL)
    word = tl.arange(0, HEADER_PAD)
    words = tl.load(plan + HEADER + word, word < HEADER_WORDS, other=0)
    i, c = tl.arange(0, C), tl.arange(0, C)[None, :]
    inside = (i < RANK)[:, None] & (c < RANK)
    in_state = head * (RANK * RANK) + i[:, None] * RANK + c
    state = tl.load(starts + slot.to(tl.int64) * (WIDTH * RANK) + in_state, inside, other=0.0)
    after = position + count + behind
    for index in tl.range(0, count, num_stages=STAGES):
        token, at = start.to(tl.int64) + index, position + index
        source = projections + token * projections_stride
        query = tl.load(source + head * RANK + c, c < RANK, other=0.0)
        read = tl.sum(state * direction(query, NORMALIZE), axis=1)
        read = tl.where(at >= read_from, read, 0.0)
        tl.store(reads + token * WIDTH + head * RANK + i, read, i < RANK)
        changed = after_token(
            state, source, gate_bias, head, HEADS, RANK, C, NORMALIZE, COUPLE, RANKWISE, MODE
        )
        writes = writes_at(at, read_from, write_from, write_until)
        state = tl.where(writes, changed, state)
        done = at + 1
        if (done % BLOCK_SIZE == 0) | (done > after - RING):
            page = tl.load(table + row.to(tl.int64) * table_stride + at // BLOCK_SIZE)
            page = page.to(tl.int64)
            target = states + page * states_stride + done % RING * (WIDTH * RANK) + in_state
            tl.store(target, state, inside)
            if head == 0:
                copied = (word < HEADER_WORDS) & (word != STARTS_AT)
                tl.store(header + page * header_stride + word, words, copied)
