"""The delta rule on CPUs: one compiled call per layer and step, for all requests.

Importing this module compiles the kernel, or loads it from numba's cache on disk. Results agree
with `reference.py` within a few fp32 roundings, and do not depend on how a sequence is cut into
steps: each token goes through the same instructions whatever its neighbours are.

All compiled functions stay in this file: numba's cache notices a change of the file that holds the
entry point, and of no other. So touch it after a change of `compiler.py` or of the constants of
`rule.py` and `reference.py`, which are compiled in.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import carray
from torch import Tensor

from deltamem_vllm.ops.compiler import bits_as_float, compiled, floats_at, ints_at, longs_at
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
    Batch,
    BoundBatch,
    DeltaRule,
    StatePages,
)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

LANES: Final = 8
"""State rows are padded to whole vectors of this many fp32 (AVX2), so that no loop has a tail."""

CHUNK: Final = 32
"""Tokens whose activations are computed at once: enough to vectorise, small enough for L1."""

WORD_BYTES: Final = 4

LAMBDA_OUTSIDE: Final = UPDATE_MODES.index("lambda_outside")
NO_LAMBDA: Final = UPDATE_MODES.index("no_lambda")

# numba takes Python floats as fp64, and one of them would widen a whole expression.
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
EPS = np.float32(NORM_EPS)


# Elementary functions: numba's call libm for each element, 30 times slower than vectorised ones.
# The polynomials are those of Cephes (expf.c, tanhf.c); errors are below 2 units in the last place.

LOG2_E = np.float32(1.4426950408889634)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_LIMIT = np.float32(87)
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)

TANH_SMALL = np.float32(0.625)
T0, T1 = np.float32(-5.70498872745e-3), np.float32(2.06390887954e-2)
T2, T3 = np.float32(-5.37397155531e-2), np.float32(1.33314422036e-1)
T4 = np.float32(-3.33332819422e-1)


@compiled()
def _exp(x: np.float32) -> np.float32:
    """e^x for |x| up to `EXP_LIMIT`, e^(+-EXP_LIMIT) beyond."""
    x = min(max(x, -EXP_LIMIT), EXP_LIMIT)
    power = np.int32(x * LOG2_E + (HALF if x >= ZERO else -HALF))
    n = np.float32(power)
    x = x - n * LN_2_HIGH - n * LN_2_LOW
    y = ((((E0 * x + E1) * x + E2) * x + E3) * x + E4) * x + E5
    y = y * (x * x) + x + ONE
    return y * bits_as_float(np.int32((power + np.int32(127)) << np.int32(23)))  # type: ignore[no-any-return]  # numba


@compiled()
def _tanh(x: np.float32) -> np.float32:
    square = x * x
    small = ((((T0 * square + T1) * square + T2) * square + T3) * square + T4) * square * x + x
    large = ONE - TWO / (_exp(TWO * abs(x)) + ONE)
    large = large if x >= ZERO else -large
    # Written so that NaN takes the polynomial, which keeps it.
    return large if abs(x) >= TANH_SMALL else small


@compiled()
def _sigmoid(x: np.float32) -> np.float32:
    # `_exp` promises nothing about NaN.
    return ONE / (ONE + _exp(-x)) if x == x else x


# Activations. Shapes: n tokens, H heads, `width` = r padded to whole vectors. Padding never reaches
# a page or a read: lanes do not mix, but for the norm of a vector, whose padding is 0.


@compiled()
def _unpack(rows: Floats, column: int, rank: int, out: Floats) -> None:
    """Copy H * r columns of `rows` [n, P], from `column` on, to the padded `out` [n, H, width].

    Padding is set to 0: another request's NaN may have reached it.
    """
    for token in range(out.shape[0]):
        for head in range(out.shape[1]):
            source = rows[token, column + head * rank : column + (head + 1) * rank]
            target = out[token, head]
            for i in range(rank):
                target[i] = source[i]
            for i in range(rank, target.size):
                target[i] = ZERO


@compiled()
def _normalise(x: Floats) -> None:
    """x / max(|x|, eps) of each tanh(x) [n, H, width], in place; padding must be 0."""
    flat = x.reshape(-1)
    for i in range(flat.size):
        flat[i] = _tanh(flat[i])
    for token in range(x.shape[0]):
        for head in range(x.shape[1]):
            vector = x[token, head]
            square = ZERO
            for i in range(vector.size):
                square += vector[i] * vector[i]
            norm = np.sqrt(square)
            scale = ONE / (EPS if norm < EPS else norm)
            for i in range(vector.size):
                vector[i] *= scale


@compiled()
def _gate(rows: Floats, column: int, bias: Floats, rank: int, out: Floats) -> None:
    """sigmoid(gate + bias) to `out` [n, H, width].

    Args:
        rows: [n, P] projections; the gate's columns begin at `column`.
        bias: [H] for one gate per state, or [H * r] for one per row of a state.
        rank: r.
        out: every row of a state gets its gate; padding gets some number in 0..1.
    """
    heads = out.shape[1]
    rankwise = bias.size == heads * rank
    for token in range(out.shape[0]):
        for head in range(heads):
            target = out[token, head]
            for i in range(rank):
                gate = head * rank + i if rankwise else head
                target[i] = rows[token, column + gate] + bias[gate]
    flat = out.reshape(-1)
    for i in range(flat.size):
        flat[i] = _sigmoid(flat[i])


@compiled()
def _coefficients(
    rows: Floats,
    bias: Floats,
    rank: int,
    couple_lambda: bool,
    mode: int,
    keep: Floats,
    erase: Floats,
    written: Floats,
) -> None:
    """keep, erase, and beta * v of n tokens; each output is [n, H, width]."""
    read_dim = keep.shape[1] * rank
    gate_dim = bias.size if couple_lambda else bias.size // 2
    _gate(rows, 3 * read_dim, bias[:gate_dim], rank, erase)
    if not couple_lambda:
        _gate(rows, 3 * read_dim + gate_dim, bias[gate_dim:], rank, keep)
    _unpack(rows, 2 * read_dim, rank, written)
    keeps, erases, values = keep.reshape(-1), erase.reshape(-1), written.reshape(-1)
    for i in range(keeps.size):
        beta = erases[i]
        values[i] *= beta
        if couple_lambda:
            keeps[i] = ONE - beta
        if mode == LAMBDA_OUTSIDE:
            erases[i] = keeps[i] * beta
        elif mode == NO_LAMBDA:
            keeps[i] = ONE


# The scan. A state lies transposed, [column, row], so that its rows are the lanes of a vector: the
# sums over columns then run in the order of the definition, and need no horizontal adds.


@compiled()
def _read(state: Floats, query: Floats, key: Floats, read: Floats, recalled: Floats) -> None:
    """S q and S k of one head, in one pass: state [r, width], the vectors [width]."""
    for row in range(read.size):
        read[row] = ZERO
        recalled[row] = ZERO
    for column in range(state.shape[0]):
        q, k, lanes = query[column], key[column], state[column]
        for row in range(lanes.size):
            read[row] += lanes[row] * q
            recalled[row] += lanes[row] * k


@compiled()
def _write(
    state: Floats, key: Floats, keep: Floats, erase: Floats, written: Floats, recalled: Floats
) -> None:
    """S = diag(keep) S + (beta v - diag(erase) S k) k^T of one head; overwrites `recalled`, S k."""
    for row in range(recalled.size):
        recalled[row] = written[row] - erase[row] * recalled[row]
    for column in range(state.shape[0]):
        k, lanes = key[column], state[column]
        for row in range(lanes.size):
            lanes[row] = keep[row] * lanes[row] + recalled[row] * k


@compiled()
def _load(page: Floats, slot: int, state: Floats) -> None:
    """Ring slot of a page, each [H, r, r], to the transposed working state [H, r, width]."""
    heads, rank, _ = state.shape
    for head in range(heads):
        for row in range(rank):
            source = page[((slot * heads + head) * rank + row) * rank :]
            for column in range(rank):
                state[head, column, row] = source[column]


@compiled()
def _store(state: Floats, page: Floats, slot: int) -> None:
    """The inverse of `_load`."""
    heads, rank, _ = state.shape
    for head in range(heads):
        for row in range(rank):
            target = page[((slot * heads + head) * rank + row) * rank :]
            for column in range(rank):
                target[column] = state[head, column, row]


@compiled()
def _first_bad_row(
    query_start_loc: Ints,
    seq_lens: Ints,
    block_table: Ints,
    table_width: int,
    block_size: int,
    num_tokens: int,
    num_blocks: int,
) -> int:
    """The first row that points outside of a tensor, or -1. The kernel has no bounds checks."""
    for row in range(seq_lens.size):
        after, start, stop = seq_lens[row], query_start_loc[row], query_start_loc[row + 1]
        if after <= 0 or stop == start:
            continue
        before = after - (stop - start)
        if start < 0 or stop < start or stop > num_tokens or before < 0:
            return row
        if (after - 1) // block_size >= table_width:
            return row
        for block in range(max(before - 1, 0) // block_size, (after - 1) // block_size + 1):
            if not 0 <= block_table[row, block] < num_blocks:
                return row
    return -1


@compiled()
def _order(query_start_loc: Ints, seq_lens: Ints, block_size: int) -> Ints:
    """The rows that have tokens, those that may load a page stored in this very step last.

    vLLM lets a request hit, in the prefix cache, a block that another request fills in the same
    step. Hits are whole blocks, so only rows whose context ends at a block boundary can do that;
    and whoever fills the block began earlier in its sequence, so shorter contexts go first.
    """
    rows = seq_lens.size
    order = np.empty(rows, np.int32)
    contexts = np.empty(rows, np.int32)
    count = 0
    for boundary in (False, True):
        first = count
        for row in range(rows):
            query = query_start_loc[row + 1] - query_start_loc[row]
            before = seq_lens[row] - query
            if seq_lens[row] <= 0 or query == 0:
                continue
            if (before > 0 and before % block_size == 0) != boundary:
                continue
            place = count
            while boundary and place > first and contexts[place - 1] > before:
                order[place], contexts[place] = order[place - 1], contexts[place - 1]
                place -= 1
            order[place], contexts[place] = row, before
            count += 1
    return order[:count]


@compiled()
def _kernel(
    projections: Floats,
    gate_bias: Floats,
    header: Ints,
    header_words: int,
    states: Floats,
    ring: int,
    frozen_at: int,
    sums_at: int,
    marks_at: int,
    heads: int,
    rank: int,
    block_table: Ints,
    table_width: int,
    query_start_loc: Ints,
    seq_lens: Ints,
    reads: Floats,
    block_size: int,
    pages_are_initialised: bool,
    normalize_qk: bool,
    couple_lambda: bool,
    mode: int,
) -> int:
    """`memory_step` on arrays; returns the first malformed row, before touching anything, or -1.

    Rows of two-dimensional arrays may be longer than what is used of them.

    Args:
        header: [num_blocks, words].
        states: [num_blocks, ring * H * r * r].
        frozen_at, sums_at: where these begin in a row of `states`; -1 for pages without spans.
        marks_at: where marks begin in a row of `header`.
    """
    bad_row = _first_bad_row(
        query_start_loc,
        seq_lens,
        block_table,
        table_width,
        block_size,
        reads.shape[0],
        states.shape[0],
    )
    if bad_row >= 0:
        return bad_row

    read_dim = heads * rank
    width = (rank + LANES - 1) // LANES * LANES
    chunk = min(CHUNK, reads.shape[0])
    state = np.zeros((heads, rank, width), np.float32)
    activations = np.zeros((5, chunk, heads, width), np.float32)
    read, recalled = np.empty(width, np.float32), np.empty(width, np.float32)
    words = np.empty(header_words, np.int32)
    frozen = np.zeros((heads, rank, width), np.float32)
    sums = np.empty(1 + 2 * read_dim + gate_bias.size, np.float32)
    mean = np.zeros((1, read_dim + sums.size - 1), np.float32)
    reads[:] = ZERO

    for row in _order(query_start_loc, seq_lens, block_size):
        start, stop, after = query_start_loc[row], query_start_loc[row + 1], seq_lens[row]
        before = after - (stop - start)
        if before > 0 or pages_are_initialised:
            page = block_table[row, max(before - 1, 0) // block_size]
            _load(states[page], before % ring, state)
            words[:] = header[page, :header_words]
        else:
            state[:] = ZERO
            words[:] = 0
        read_from, write_from = words[READ_FROM], words[WRITE_FROM]
        write_until = words[WRITE_UNTIL]
        span_end = words[SPAN_END] if frozen_at >= 0 else 0

        first = last = start
        while last < stop:
            first = last
            position = before + first - start
            last = min(first + chunk, stop)
            in_spans = write_until <= position < span_end
            if position < span_end:
                last = min(last, first + (span_end if in_spans else write_until) - position)
            rows = projections[first:last]
            query, key = activations[0][: last - first], activations[1][: last - first]
            keep, erase = activations[2][: last - first], activations[3][: last - first]
            written = activations[4][: last - first]
            if in_spans:
                if position == write_until:
                    frozen[:] = state
                    sums[:] = ZERO
                elif first == start:
                    page = block_table[row, (position - 1) // block_size]
                    _load(states[page, frozen_at:], 0, frozen)
                    at = sums_at + position % ring * sums.size
                    sums[:] = states[page, at : at + sums.size]
                _unpack(rows, 0, rank, query)
                if normalize_qk:
                    _normalise(query)
                for token in range(last - first):
                    if position >= read_from:
                        for head in range(heads):
                            q = query[token, head]
                            _read(frozen[head], q, q, read, recalled)
                            for i in range(rank):
                                reads[first + token, head * rank + i] = read[i]
                    page = block_table[row, position // block_size]
                    place = position % block_size
                    bits = header[page, marks_at + place // MARKS_PER_WORD]
                    mark = bits >> (place % MARKS_PER_WORD * MARK_BITS)
                    if mark & IN_SPAN:
                        sums[0] += ONE
                        for i in range(1, sums.size):
                            sums[i] += rows[token, read_dim + i - 1]
                    if mark & ENDS_SPAN:
                        for i in range(1, sums.size):
                            mean[0, read_dim + i - 1] = sums[i] / sums[0]
                        sums[:] = ZERO
                        _unpack(mean, read_dim, rank, key[:1])
                        if normalize_qk:
                            _normalise(key[:1])
                        _coefficients(
                            mean,
                            gate_bias,
                            rank,
                            couple_lambda,
                            mode,
                            keep[:1],
                            erase[:1],
                            written[:1],
                        )
                        for head in range(heads):
                            k = key[0, head]
                            _read(state[head], k, k, read, recalled)
                            _write(
                                state[head],
                                k,
                                keep[0, head],
                                erase[0, head],
                                written[0, head],
                                recalled,
                            )
                    position += 1
                    if position % block_size == 0 or position > after - ring:
                        _store(state, states[page], position % ring)
                        header[page, :header_words] = words
                        if position < span_end:
                            _store(frozen, states[page, frozen_at:], 0)
                            at = sums_at + position % ring * sums.size
                            states[page, at : at + sums.size] = sums
                continue
            if position + (last - first) > read_from:
                _unpack(rows, 0, rank, query)
                if normalize_qk:
                    _normalise(query)
            if position + (last - first) > write_from or position < write_until:
                _unpack(rows, read_dim, rank, key)
                if normalize_qk:
                    _normalise(key)
                _coefficients(rows, gate_bias, rank, couple_lambda, mode, keep, erase, written)

            for token in range(last - first):
                for head in range(heads):
                    _read(state[head], query[token, head], key[token, head], read, recalled)
                    if position >= read_from:
                        for i in range(rank):
                            reads[first + token, head * rank + i] = read[i]
                    if position >= write_from or position < write_until:
                        _write(
                            state[head],
                            key[token, head],
                            keep[token, head],
                            erase[token, head],
                            written[token, head],
                            recalled,
                        )
                position += 1
                if position % block_size == 0 or position > after - ring:
                    page = block_table[row, (position - 1) // block_size]
                    _store(state, states[page], position % ring)
                    header[page, :header_words] = words
    return -1


# What stays of a layer, and what a step's layers share, is handed to the kernel as an array of
# numbers each: addresses, sizes, and strides in elements. These are their places.

(
    GATE_BIAS,
    GATE_BIAS_DIM,
    HEADER,
    HEADER_WORDS,
    HEADER_STRIDE,
    STATES,
    STATES_STRIDE,
    NUM_BLOCKS,
    RING,
    FROZEN_AT,
    SUMS_AT,
    MARKS_AT,
    HEADS,
    RANK,
    BLOCK_SIZE,
    PAGES_ARE_INITIALISED,
    NORMALIZE_QK,
    COUPLE_LAMBDA,
    MODE,
) = range(19)

BLOCK_TABLE, TABLE_WIDTH, TABLE_STRIDE, QUERY_START_LOC, SEQ_LENS, NUM_ROWS = range(6)


@compiled("int64(" + ", ".join(["int64"] * 6) + ")")
def _entry(
    layer_at: int,
    step_at: int,
    projections: int,
    projections_stride: int,
    reads: int,
    num_tokens: int,
) -> int:
    """`_kernel` on addresses: a tensor's numpy view costs a microsecond, its address a tenth."""
    layer = carray(longs_at(layer_at), (MODE + 1,))
    step = carray(longs_at(step_at), (NUM_ROWS + 1,))
    num_blocks, num_rows = layer[NUM_BLOCKS], step[NUM_ROWS]
    return _kernel(
        carray(floats_at(projections), (num_tokens, projections_stride)),
        carray(floats_at(layer[GATE_BIAS]), (layer[GATE_BIAS_DIM],)),
        carray(ints_at(layer[HEADER]), (num_blocks, layer[HEADER_STRIDE])),
        layer[HEADER_WORDS],
        carray(floats_at(layer[STATES]), (num_blocks, layer[STATES_STRIDE])),
        layer[RING],
        layer[FROZEN_AT],
        layer[SUMS_AT],
        layer[MARKS_AT],
        layer[HEADS],
        layer[RANK],
        carray(ints_at(step[BLOCK_TABLE]), (num_rows, step[TABLE_STRIDE])),
        step[TABLE_WIDTH],
        carray(ints_at(step[QUERY_START_LOC]), (num_rows + 1,)),
        carray(ints_at(step[SEQ_LENS]), (num_rows,)),
        carray(floats_at(reads), (num_tokens, layer[HEADS] * layer[RANK])),
        layer[BLOCK_SIZE],
        layer[PAGES_ARE_INITIALISED] != 0,
        layer[NORMALIZE_QK] != 0,
        layer[COUPLE_LAMBDA] != 0,
        layer[MODE],
    )


def bind_batch(batch: Batch) -> BoundBatch:
    """A step's batch for `LayerStep`."""
    numbers = np.array(
        [
            batch.block_table.data_ptr(),
            batch.block_table.shape[1],
            batch.block_table.stride(0),
            batch.query_start_loc.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.seq_lens.shape[0],
        ],
        np.int64,
    )
    return BoundBatch(batch, numbers, numbers.ctypes.data)


class LayerStep:
    """`memory_step` of one layer, whose bias and pages stay where they are.

    Args:
        rule, gate_bias, pages, block_size, pages_are_initialised: see `memory_step`, whose checks
            are relied on.
    """

    def __init__(
        self,
        rule: DeltaRule,
        gate_bias: Tensor,
        pages: StatePages,
        *,
        block_size: int,
        pages_are_initialised: bool,
    ) -> None:
        header, states, spans = pages
        frozen_at = sums_at = marks_at = -1
        if spans is not None:
            frozen_at = (spans.frozen.data_ptr() - states.data_ptr()) // WORD_BYTES
            sums_at = (spans.sums.data_ptr() - states.data_ptr()) // WORD_BYTES
            marks_at = (spans.marks.data_ptr() - header.data_ptr()) // WORD_BYTES
        self._tensors = (gate_bias, pages)
        self._block_size = block_size
        self._numbers = np.array(
            [
                gate_bias.data_ptr(),
                rule.gate_bias_dim,
                header.data_ptr(),
                header.shape[1],
                header.stride(0),
                states.data_ptr(),
                states.stride(0),
                states.shape[0],
                states.shape[1],
                frozen_at,
                sums_at,
                marks_at,
                rule.num_heads,
                rule.rank,
                block_size,
                pages_are_initialised,
                rule.normalize_qk,
                rule.couple_lambda,
                UPDATE_MODES.index(rule.update_mode),
            ],
            np.int64,
        )
        self._at: int = self._numbers.ctypes.data

    def __call__(self, projections: Tensor, bound: BoundBatch, reads: Tensor) -> None:
        """One step of all requests.

        Raises:
            ValueError: a row of the batch points outside of a tensor. Nothing is written then.
        """
        bad_row = _entry(
            self._at,
            bound.at,
            projections.data_ptr(),
            projections.stride(0),
            reads.data_ptr(),
            reads.shape[0],
        )
        if bad_row >= 0:
            batch, pages = bound.batch, self._tensors[1]
            raise ValueError(
                f"row {bad_row} of the batch points outside of its tensors: "
                f"{batch.seq_lens[bad_row]} tokens, queries "
                f"{batch.query_start_loc[bad_row : bad_row + 2].tolist()} of {len(reads)}, "
                f"{batch.block_table.shape[1]} blocks of {self._block_size} in its table, pages 0 "
                f"to {len(pages.states) - 1}"
            )


def memory_step(
    rule: DeltaRule,
    projections: Tensor,
    gate_bias: Tensor,
    pages: StatePages,
    batch: Batch,
    reads: Tensor,
    *,
    block_size: int,
    pages_are_initialised: bool,
) -> None:
    """One step of all requests; see `deltamem_vllm.ops.memory_step`, whose checks it relies on.

    Raises:
        ValueError: a row of the batch points outside of a tensor.
    """
    step = LayerStep(
        rule,
        gate_bias,
        pages,
        block_size=block_size,
        pages_are_initialised=pages_are_initialised,
    )
    step(projections, bind_batch(batch), reads)
