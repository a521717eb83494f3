"""What the Triton kernels share: a token's activations and its write, where rows start, and who hit
whose blocks.

All of it is inlined into the kernels of `triton_scan.py` and `triton_chunk.py`. A state tile is
[I, C]: some rows of one head's state, or of all heads' (then row i belongs to head i // RANK), and
all columns. Keys and queries are [1, C], or [I, C] where rows belong to different heads. Sizes are
padded to powers of two; padded lanes are loaded as 0 and never stored, and lanes mix only along C.
"""

# Triton compiles kernels, and gives their arguments no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from deltamem_vllm.ops.reference import NORM_EPS
from deltamem_vllm.ops.rule import STARTS_AT as _STARTS_AT
from deltamem_vllm.ops.rule import UPDATE_MODES

LAMBDA_OUTSIDE = tl.constexpr(UPDATE_MODES.index("lambda_outside"))
NO_LAMBDA = tl.constexpr(UPDATE_MODES.index("no_lambda"))
EPS = tl.constexpr(NORM_EPS)
STARTS_AT = tl.constexpr(_STARTS_AT)
LOOK = tl.constexpr(128)
"""Rows of the batch, or blocks of a row, that are looked at together."""

ZEROED_TOKENS = tl.constexpr(64)
"""Tokens behind the batch whose reads one program sets to 0."""


# Activations


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """By a polynomial near 0, where 1 - 2 / (e^2x + 1) would lose digits (Cephes, tanhf.c)."""
    square = x * x
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    large = tl.where(x < 0, -large, large)
    # NaN takes the polynomial, which keeps it.
    return tl.where(tl.abs(x) >= 0.625, large, small)


@triton.jit
def direction(x, NORMALIZE: tl.constexpr):
    """A query or key out of its projection, [*, C]."""
    if NORMALIZE:
        x = tanh(x)
        norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
        # Not tl.maximum, which may drop a NaN.
        x = x / tl.where(norm < EPS, EPS, norm)[:, None]
    return x


@triton.jit
def factors(beta, lambda_, COUPLE: tl.constexpr, MODE: tl.constexpr):
    """keep, erase and write factors [I] out of gates before their sigmoid."""
    beta = sigmoid(beta)
    keep = 1.0 - beta
    if not COUPLE:
        keep = sigmoid(lambda_)
    erase = beta
    if MODE == LAMBDA_OUTSIDE:
        erase = keep * beta
    if MODE == NO_LAMBDA:
        keep = beta * 0.0 + 1.0
    return keep, erase, beta


@triton.jit
def gate_columns(i, head, HEADS: tl.constexpr, RANK: tl.constexpr, RANKWISE: tl.constexpr):
    """Columns of the gates of state rows `i` of `head`, counted from the first gate's."""
    if RANKWISE:
        return head * RANK + i
    return head + i * 0


@triton.jit
def only_if(mask, condition):
    """A mask where a scalar condition holds, else nothing. (`mask & condition`, whose broadcast
    Triton's interpreter takes for integers.)"""
    return mask.to(tl.int32) * condition.to(tl.int32) != 0


@triton.jit
def written(state, key, value, keep, erase, write):
    """diag(keep) S + (write v - erase S k) k^T of a tile [I, C]; the vectors are [I]."""
    change = write * value - erase * tl.sum(state * key, axis=1)
    return keep[:, None] * state + change[:, None] * key


@triton.jit
def writes_at(position, read_from, write_from, write_until):
    """Whether a position outside of spans is written."""
    return (position >= read_from) & ((position >= write_from) | (position < write_until))


# Rows of the batch


@triton.jit
def row_of(row, query_start_loc, seq_lens):
    """First token, token after the last one, tokens before this step and after it."""
    start = tl.load(query_start_loc + row)
    stop = tl.load(query_start_loc + row + 1)
    after = tl.load(seq_lens + row)
    return start, stop, after - (stop - start), after


@triton.jit
def is_plausible(start, stop, before, after, tokens, table_width, BLOCK_SIZE: tl.constexpr):
    """Rows that have tokens, and lie inside of projections and block table."""
    inside = (start >= 0) & (stop > start) & (stop <= tokens) & (before >= 0) & (after > 0)
    return inside & ((after - 1) // BLOCK_SIZE < table_width)


@triton.jit
def is_sound(
    row, query_start_loc, seq_lens, table, table_stride, table_width, tokens, num_blocks,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Whether a row has tokens and points into its tensors."""
    start, stop, before, after = row_of(row, query_start_loc, seq_lens)
    sound = is_plausible(start, stop, before, after, tokens, table_width, BLOCK_SIZE)
    first = tl.maximum(before - 1, 0) // BLOCK_SIZE
    last = tl.where(sound, (after - 1) // BLOCK_SIZE + 1, first)
    bad = 0
    for block in range(first, last, LOOK):
        column = block + tl.arange(0, LOOK)
        page = tl.load(table + row.to(tl.int64) * table_stride + column, column < last, other=0)
        bad += tl.sum(((page < 0) | (page >= num_blocks)).to(tl.int32))
    return sound & (bad == 0)


@triton.jit
def starts_alone(
    row, before, there, header, header_stride, table, table_stride, num_blocks,
    BLOCK_SIZE: tl.constexpr, INITIALISED: tl.constexpr,
):  # fmt: skip
    """Whether rows with `before` tokens start from the page of their first position, see
    `rule.STARTS_AT`; not where they are not `there`.

    Nobody changes that word in a step, so it may be asked for while other programs run.
    """
    alone = there & (before < 0)
    if INITIALISED:
        asked = there & (before > 0) & (before % BLOCK_SIZE == 0)
        at = table + row.to(tl.int64) * table_stride + before // BLOCK_SIZE
        page = tl.load(at, asked, other=-1)
        asked = asked & (page >= 0) & (page < num_blocks)
        at = header + page.to(tl.int64) * header_stride + STARTS_AT
        alone = asked & (tl.load(at, asked, other=0) == before)
    return alone


@triton.jit
def start_page(row, before, alone, table, table_stride, BLOCK_SIZE: tl.constexpr):
    """The page with the state before a sound row's first token."""
    last = tl.where(alone, before, tl.maximum(before - 1, 0))
    page = tl.load(table + row.to(tl.int64) * table_stride + last // BLOCK_SIZE)
    return page.to(tl.int64)


@triton.jit
def parent_of(
    row, query_start_loc, seq_lens, header, header_stride, table, table_stride, table_width, rows,
    tokens, num_blocks, BLOCK_SIZE: tl.constexpr, INITIALISED: tl.constexpr,
):  # fmt: skip
    """The row that fills, in this step, the last block of a sound row's context; or -1.

    vLLM caches a block when it schedules the step that will fill it, so a request of the same step
    may hit it. Hits are whole blocks, and blocks that two requests share are in the same columns of
    their tables. A parent has less context, so chains of parents end.
    """
    found = row * 0 - 1
    _start, _stop, before, _after = row_of(row, query_start_loc, seq_lens)
    hits = (before > 0) & (before % BLOCK_SIZE == 0)
    alone = starts_alone(
        row, before, hits, header, header_stride, table, table_stride, num_blocks, BLOCK_SIZE,
        INITIALISED,
    )  # fmt: skip
    if hits & (alone == 0):
        column = before // BLOCK_SIZE - 1
        page = tl.load(table + row.to(tl.int64) * table_stride + column)
        for first in range(0, rows, LOOK):
            other = first + tl.arange(0, LOOK)
            there = other < rows
            begin = tl.load(query_start_loc + other, there, other=0)
            end = tl.load(query_start_loc + other + 1, there, other=0)
            length = tl.load(seq_lens + other, there, other=0)
            context = length - (end - begin)
            fills = there & (context < before) & (before <= length)
            fills = fills & is_plausible(
                begin, end, context, length, tokens, table_width, BLOCK_SIZE
            )
            theirs = tl.load(table + other.to(tl.int64) * table_stride + column, fills, other=-1)
            found = tl.maximum(found, tl.max(tl.where(fills & (theirs == page), other, -1)))
    return found


@triton.jit
def next_child(
    row, after_row, query_start_loc, seq_lens, header, header_stride, table, table_stride,
    table_width, rows, tokens, num_blocks, BLOCK_SIZE: tl.constexpr, INITIALISED: tl.constexpr,
):  # fmt: skip
    """The first row beyond `after_row` that hit a block which `row` fills in this step; or -1."""
    found = rows
    _start, _stop, before, after = row_of(row, query_start_loc, seq_lens)
    if before // BLOCK_SIZE < after // BLOCK_SIZE:
        for first in range(0, rows, LOOK):
            other = first + tl.arange(0, LOOK)
            there = (other < rows) & (other > after_row)
            begin = tl.load(query_start_loc + other, there, other=0)
            end = tl.load(query_start_loc + other + 1, there, other=0)
            length = tl.load(seq_lens + other, there, other=0)
            context = length - (end - begin)
            hits = there & (context % BLOCK_SIZE == 0) & (before < context) & (context <= after)
            hits = hits & is_plausible(begin, end, context, length, tokens, table_width, BLOCK_SIZE)
            column = tl.where(hits, context // BLOCK_SIZE - 1, 0)
            theirs = tl.load(table + other.to(tl.int64) * table_stride + column, hits, other=-1)
            mine = tl.load(table + row.to(tl.int64) * table_stride + column, hits, other=-2)
            hits = hits & (theirs == mine)
            alone = starts_alone(
                other, context, hits, header, header_stride, table, table_stride, num_blocks,
                BLOCK_SIZE, INITIALISED,
            )  # fmt: skip
            found = tl.minimum(found, tl.min(tl.where(hits & (alone == 0), other, rows)))
    return tl.where(found < rows, found, -1)


# Reads of no request


@triton.jit
def zero_reads(reads, first, last, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):
    """Set the reads of tokens first to last to 0."""
    column = tl.arange(0, WIDTH_PAD)[None, :]
    for block in range(first, last, 16):
        token = block + tl.arange(0, 16)[:, None]
        zeros = tl.zeros((16, WIDTH_PAD), tl.float32)
        at = reads + token.to(tl.int64) * WIDTH + column
        tl.store(at, zeros, (token < last) & (column < WIDTH))


@triton.jit
def zero_behind(
    reads, program, query_start_loc, rows, tokens, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr
):
    """Set the reads of tokens behind all rows' tokens to 0, by programs from number `rows` on."""
    covered = 0
    for first in range(0, rows + 1, LOOK):
        other = first + tl.arange(0, LOOK)
        covered = tl.maximum(
            covered, tl.max(tl.load(query_start_loc + other, other <= rows, other=0))
        )
    first = (program - rows) * ZEROED_TOKENS
    last = tl.minimum(first + ZEROED_TOKENS, tokens)
    zero_reads(reads, tl.maximum(first, covered), last, WIDTH, WIDTH_PAD)
