"""The delta rule on CPUs: one compiled call per layer and step, for all requests.

Importing this module compiles the code, or loads it from numba's cache on disk. Results agree with
`reference.py` within a few fp32 roundings, and do not depend on how a sequence is cut into steps,
nor on who shares a step or on threads: each token goes through the same instructions.

What is where: `step.py` says in which order things happen, `numbers.py` how tensors get there,
`products.py` projects and corrects, `activations.py`, `rows.py` and `spans.py` are the rule, and
`lanes.py` holds the inner loops, as instructions.
"""

import ctypes
import struct
import sys
import threading
from typing import Final, NoReturn

import torch
from torch import Tensor

from deltamem_vllm.ops.cpu.lanes import LANES, ROWS
from deltamem_vllm.ops.cpu.numbers import (
    ALL,
    BAD_ROW,
    BASE_COLUMNS,
    BASE_IS_BF16,
    CALL_NUMBERS,
    CHANGING_CALL_NUMBERS,
    CHANGING_CORRECTION_NUMBERS,
    CHECK,
    CORRECTED,
    CORRECTION,
    CORRECTION_NUMBERS,
    DELTA,
    DELTA_IS_BF16,
    GRAM,
    HIDDEN_BF16,
    HIDDEN_FP32,
    LAST_ROWS,
    LATE_ROWS,
    LAYER,
    LAYER_NUMBERS,
    NEXT,
    NORMS,
    PHASE,
    PROJECTIONS,
    READ_DIM,
    STEP_NUMBERS,
    TOKENS,
    WORD_BYTES,
)
from deltamem_vllm.ops.cpu.numbers import ROWS as ROWS_PHASE
from deltamem_vllm.ops.cpu.numbers import TILE as TILE_TOKENS
from deltamem_vllm.ops.cpu.products import can_pack, pack
from deltamem_vllm.ops.cpu.step import run_correction, run_norms, run_step
from deltamem_vllm.ops.cpu.team import run_by_team, team_size
from deltamem_vllm.ops.cpu.views import ACTIVATIONS
from deltamem_vllm.ops.rule import UPDATE_MODES, Batch, BoundBatch, DeltaRule, StatePages

__all__ = ["Correction", "LayerStep", "bind_batch", "can_pack", "memory_step"]

TILE: Final = 32
"""Tokens that one thread projects and activates at once: enough to vectorise, few enough for L1."""

TEAM_TILE: Final = 8
"""The same for several threads."""

TEAM_TOKENS: Final = 32
"""With fewer tokens, waking the other threads takes longer than what they save."""


class LayerStep:
    """`memory_step` of one layer, whose weights and pages stay where they are.

    Args:
        rule, gate_bias, pages, block_size, pages_are_initialised: see `memory_step`, whose checks
            are relied on.
        projection: [P, hidden] fp32, the weights that make projections of hidden states, which
            `can_pack`; None for steps that are given projections. A copy is kept.
        correction: what is done with the reads in the same call.
    """

    def __init__(
        self,
        rule: DeltaRule,
        gate_bias: Tensor,
        pages: StatePages,
        *,
        block_size: int,
        pages_are_initialised: bool,
        projection: Tensor | None = None,
        correction: "Correction | None" = None,
    ) -> None:
        header, states, spans = pages
        frozen_at = sums_at = marks_at = -1
        if spans is not None:
            frozen_at = (spans.frozen.data_ptr() - states.data_ptr()) // WORD_BYTES
            sums_at = (spans.sums.data_ptr() - states.data_ptr()) // WORD_BYTES
            marks_at = (spans.marks.data_ptr() - header.data_ptr()) // WORD_BYTES
        width = -(-rule.rank // ROWS) * ROWS
        weights = None if projection is None else pack(projection)
        self._tensors = (gate_bias, pages, weights)
        self._block_size = block_size
        self._correction = correction
        self._numbers = (ctypes.c_int64 * LAYER_NUMBERS)(
            *[
                gate_bias.data_ptr(),
                rule.gate_bias_dim,
                0 if weights is None else weights.data_ptr(),
                weights is not None and weights.dtype is torch.bfloat16,
                0 if projection is None else projection.shape[1],
                rule.projection_dim,
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
                width,
                block_size,
                pages_are_initialised,
                rule.normalize_qk,
                rule.couple_lambda,
                UPDATE_MODES.index(rule.update_mode),
            ]
        )
        self._read_dim = rule.read_dim
        self._scratch_words = ACTIVATIONS * rule.num_heads * width
        if weights is not None:
            self._scratch_words += weights.shape[0] * LANES
        self._threads = team_size()
        self._team_tokens = TEAM_TOKENS if self._threads > 1 else sys.maxsize
        self._dtype, self._offset = None, 0
        if correction is not None:
            self._dtype, self._offset = correction.dtype, correction.offset
        self._is_used = False
        self._kind = HIDDEN_BF16 if self._dtype is torch.bfloat16 else HIDDEN_FP32
        self._call = (ctypes.c_int64 * CALL_NUMBERS)()
        self._call[LAYER], self._call[BAD_ROW] = ctypes.addressof(self._numbers), -1
        self._call[CORRECTION] = 0 if correction is None else correction.at
        self._call_at = ctypes.addressof(self._call)

    def read(self, source: Tensor, bound: BoundBatch, base: Tensor) -> Tensor:
        """See `deltamem_vllm.ops.ReadingStep`; `source` and `base` have the correction's dtype.

        All in one piece: a frame of Python here takes as long as a request's whole token below.
        """
        if bound.num_tokens != source.size(0):
            self._make_room(source.size(0), bound)
        if source.dtype is not self._dtype or base.dtype is not self._dtype or not self._is_used:
            self._check(source, base)
        _CALL.pack_into(
            self._call,
            0,
            bound.at,
            source.data_ptr(),
            source.stride(0),
            self._kind,
            bound.num_tokens,
            bound.reads_at,
            bound.scratch_at,
            base.data_ptr() + self._offset,
            base.stride(0),
            ALL,
            TILE,
            0,
        )
        if bound.num_tokens >= self._team_tokens:
            self._run_as_team()
        else:
            run_step(self._call_at)
        if self._call[BAD_ROW] >= 0:
            self._raise(bound)
        return bound.reads  # type: ignore[return-value]  # there is room

    def __call__(
        self, source: Tensor, bound: BoundBatch, reads: Tensor, base: Tensor | None = None
    ) -> None:
        """See `deltamem_vllm.ops.BoundStep`.

        Raises:
            ValueError: a row of the batch points outside of a tensor. Nothing is written then.
            TypeError: the correction cannot correct the base.
        """
        kind = PROJECTIONS
        if self._tensors[2] is not None:
            kind = _KINDS.get(source.dtype, HIDDEN_FP32)
            source = source if source.dtype in _KINDS else source.float()
        corrected = corrected_stride = 0
        if base is not None and self._correction is not None:
            self._correction.check(base)
            corrected, corrected_stride = base.data_ptr() + self._offset, base.stride(0)
        tokens = reads.shape[0]
        if bound.num_tokens != tokens:
            self._make_room(tokens, bound)
        _CALL.pack_into(
            self._call,
            0,
            bound.at,
            source.data_ptr(),
            source.stride(0),
            kind,
            tokens,
            reads.data_ptr(),
            bound.scratch_at,
            corrected,
            corrected_stride,
            ALL,
            TILE,
            0,
        )
        if tokens >= self._team_tokens:
            self._run_as_team()
        else:
            run_step(self._call_at)
        if self._call[BAD_ROW] >= 0:
            self._raise(bound)

    def _check(self, source: Tensor, base: Tensor) -> None:
        """What cannot change from call to call is looked at in the first one.

        Raises:
            TypeError: compiled code would take a tensor for something else.
        """
        if source.dtype is not self._dtype or source.stride(1) != 1:
            raise TypeError(f"expected rows of {self._dtype}, got {describe(source)}")
        assert self._correction is not None
        self._correction.check(base)
        self._is_used = True

    def _make_room(self, tokens: int, bound: BoundBatch) -> None:
        """Where a step's layers, one after the other, put reads and what is between phases."""
        bound.num_tokens = tokens
        bound.reads = torch.empty((tokens, self._read_dim), dtype=torch.float32, device="cpu")
        bound.reads_at = bound.reads.data_ptr()
        bound.scratch_at = _scratch.at(tokens * self._scratch_words)
        # It stays while the batch does, also if another one makes a larger one.
        bound.scratch = _scratch.words

    def _run_as_team(self) -> None:
        self._call[PHASE], self._call[TILE_TOKENS] = CHECK, TEAM_TILE
        run_step(self._call_at)
        if self._call[BAD_ROW] >= 0:
            return
        for phase in (TOKENS, ROWS_PHASE):
            self._call[PHASE], self._call[NEXT] = phase, 0
            run_by_team(run_step, self._call_at, self._threads)
        if self._call[LATE_ROWS]:
            self._call[PHASE] = LAST_ROWS
            run_step(self._call_at)
        if self._call[CORRECTED]:
            run_by_team(run_correction, self._call[CORRECTION], self._threads)

    def _raise(self, bound: BoundBatch) -> NoReturn:
        row, batch, pages = self._call[BAD_ROW], bound.batch, self._tensors[1]
        raise ValueError(
            f"row {row} of the batch points outside of its tensors: {batch.seq_lens[row]} tokens, "
            f"queries {batch.query_start_loc[row : row + 2].tolist()} of {bound.num_tokens}, "
            f"{batch.block_table.shape[1]} blocks of {self._block_size} in its table, pages 0 to "
            f"{len(pages.states) - 1}"
        )


class Correction:
    """base += reads delta^T, in place, rounded once to the dtype of `base`.

    Args:
        delta: [n, H * r] fp32; n is one that `can_pack`. A copy is kept.
        dtype: of `base`: fp32 or bf16.
        first: the column of `base` that the first row of `delta` corrects.
        measured: `add_norms` is called.
    """

    def __init__(
        self, delta: Tensor, dtype: torch.dtype, first: int = 0, measured: bool = False
    ) -> None:
        self.dtype = dtype
        self.offset = first * dtype.itemsize
        """In bytes, from where `base` begins."""

        self._columns = first + delta.shape[0]
        self._weights = pack(delta)
        # Of the columns' squares: |delta r|^2 is r^T (delta^T delta) r.
        self._gram = (delta.double().t() @ delta.double()).float() if measured else None
        self._is_used = False
        self._threads = team_size()
        self._team_tokens = TEAM_TOKENS if self._threads > 1 else sys.maxsize
        self._numbers = (ctypes.c_int64 * CORRECTION_NUMBERS)()
        self._numbers[BASE_IS_BF16] = dtype is torch.bfloat16
        self._numbers[BASE_COLUMNS], self._numbers[READ_DIM] = delta.shape
        self._numbers[DELTA] = self._weights.data_ptr()
        self._numbers[DELTA_IS_BF16] = self._weights.dtype is torch.bfloat16
        self.at = ctypes.addressof(self._numbers)
        """Where its numbers are, for a step that corrects by the way."""

    def __call__(self, base: Tensor, reads: Tensor) -> Tensor:
        """See `deltamem_vllm.ops.BoundCorrection`.

        Raises:
            TypeError: see `check`.
        """
        if base.dtype is not self.dtype or not self._is_used:
            self.check(base)
        tokens = base.size(0)
        base_at = base.data_ptr() + self.offset
        _CORRECTION.pack_into(
            self._numbers, 0, base_at, base.stride(0), tokens, reads.data_ptr(), 0
        )
        if tokens >= self._team_tokens:
            run_by_team(run_correction, self.at, self._threads)
        else:
            run_correction(self.at)
        return base

    def add_norms(self, base: Tensor, reads: Tensor, sums: Tensor) -> None:
        """Add squared norms, of the correction and of what it will be added to, to fp32 `sums` [2].

        Tokens that read nothing do not count.
        """
        self.check(base)
        assert self._gram is not None
        self._numbers[GRAM], self._numbers[NORMS] = self._gram.data_ptr(), sums.data_ptr()
        base_at, tokens = base.data_ptr() + self.offset, base.shape[0]
        _CORRECTION.pack_into(
            self._numbers, 0, base_at, base.stride(0), tokens, reads.data_ptr(), 0
        )
        run_norms(self.at)

    def check(self, base: Tensor) -> None:
        """Refuse what compiled code would take for something else.

        Raises:
            TypeError: it has another dtype, fewer columns, or its rows are not contiguous.
        """
        if base.dtype is not self.dtype or base.shape[1] < self._columns or base.stride(1) != 1:
            raise TypeError(
                f"expected rows of {self.dtype}, {self._columns} at least, got {describe(base)}"
            )
        self._is_used = True


def describe(tensor: Tensor) -> str:
    """What messages say of a tensor."""
    return f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"


_KINDS = {torch.float32: HIDDEN_FP32, torch.bfloat16: HIDDEN_BF16}
_StepNumbers = ctypes.c_int64 * STEP_NUMBERS
_CALL = struct.Struct(f"{CHANGING_CALL_NUMBERS}q")
_CORRECTION = struct.Struct(f"{CHANGING_CORRECTION_NUMBERS}q")


class _Scratch(threading.local):
    """Memory of this thread between the phases of a call; kept, as fresh pages cost time."""

    def __init__(self) -> None:
        self.words = torch.empty(0, dtype=torch.float32, device="cpu")
        self._address = 0

    def at(self, words: int) -> int:
        """The address of at least so many fp32 numbers."""
        if words > self.words.numel():
            self.words = torch.empty(words, dtype=torch.float32, device="cpu")
            self._address = self.words.data_ptr()
        return self._address


_scratch = _Scratch()


def bind_batch(batch: Batch) -> BoundBatch:
    """A step's batch for `LayerStep`."""
    table, lengths = batch.block_table, batch.seq_lens
    numbers = _StepNumbers(
        table.data_ptr(),
        table.shape[1],
        table.stride(0),
        batch.query_start_loc.data_ptr(),
        lengths.data_ptr(),
        lengths.shape[0],
    )
    return BoundBatch(batch, numbers, ctypes.addressof(numbers))


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
