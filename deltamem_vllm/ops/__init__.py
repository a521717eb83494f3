"""The delta rule as tensor functions that know nothing of an engine.

`memory_step` advances all requests of an engine's step, for one layer, in one call: packed tokens
with cumulative lengths go in, reads come out, and state pages are updated in place.

`reference.py` is the definition and the fallback for devices without a kernel; `cpu/` is the fast
form for CPUs, `triton.py` the one for GPUs.
"""

import functools
import logging
from importlib.util import find_spec
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from deltamem_vllm.ops.reference import delta_rule_scan
from deltamem_vllm.ops.rule import (
    ENDS_SPAN,
    IN_SPAN,
    MARK_BITS,
    MARKS_PER_WORD,
    READ_FROM,
    SPAN_END,
    STARTS_AT,
    UPDATE_MODES,
    WRITE_FROM,
    WRITE_UNTIL,
    Batch,
    BoundBatch,
    DeltaRule,
    SpanPages,
    StatePages,
)

__all__ = [
    "ENDS_SPAN",
    "IN_SPAN",
    "MARKS_PER_WORD",
    "MARK_BITS",
    "READ_FROM",
    "SPAN_END",
    "STARTS_AT",
    "UPDATE_MODES",
    "WRITE_FROM",
    "WRITE_UNTIL",
    "Batch",
    "BoundBatch",
    "BoundCorrection",
    "BoundStep",
    "DeltaRule",
    "ReadingStep",
    "SpanPages",
    "StatePages",
    "bind_batch",
    "bind_correction",
    "bind_step",
    "delta_rule_scan",
    "memory_step",
    "runs_in_graphs",
    "warm_up",
]

logger = logging.getLogger(__name__)


class _Implementation(Protocol):
    def __call__(
        self,
        rule: DeltaRule,
        projections: Tensor,
        gate_bias: Tensor,
        pages: StatePages,
        batch: Batch,
        reads: Tensor,
        *,
        block_size: int,
        pages_are_initialised: bool,
    ) -> None: ...


def memory_step(
    rule: DeltaRule,
    projections: Tensor,
    gate_bias: Tensor,
    pages: StatePages,
    batch: Batch,
    *,
    block_size: int,
    pages_are_initialised: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Read and write the memories of all requests of a step, for one layer.

    Per request: the state after its context is loaded from its page, the rule runs over its tokens
    (each reads before it writes, see `reference.delta_rule_scan`), and the state is stored at every
    block boundary that the tokens cross, and for the last `ring` token counts. The header of the
    page that was loaded rules which positions read and write, and is copied, but for `STARTS_AT`,
    into every page that takes a state.

    Rows run in an order in which a request finds the blocks that it hit, in the prefix cache, while
    another request of this step fills them.

    A request without context starts from slot 0 and the header of its first page if
    `pages_are_initialised`, else from zero states and a zero header, whatever its pages hold. A row
    with seq_lens 0 or without tokens touches nothing. Pages that belong to no request of the step
    are neither read nor written.

    Args:
        rule: shapes and options.
        projections: [T, P] fp32, columns as in `DeltaRule`; T may exceed the tokens of the batch.
        gate_bias: [gate_bias_dim] fp32.
        pages: the layer's state pages, updated in place.
        batch: the requests of this step.
        block_size: tokens per block of the KV cache.
        pages_are_initialised: someone (the KV connector) fills header and slot 0 of the first page
            of every request before its first token. Only then is there a `STARTS_AT`.
        out: [T, H * r] fp32, contiguous, to write the reads into.

    Returns:
        [T, H * r] fp32 reads; rows of no request are 0.

    Raises:
        ValueError: a tensor has the wrong shape, dtype or layout; or, on CPUs, a row of the batch
            points outside of a tensor. Nothing is written then. On GPUs such a row is skipped.
    """
    reads = projections.new_empty(projections.shape[0], rule.read_dim) if out is None else out
    _check(rule, projections, gate_bias, pages, batch, reads)
    _implementation(projections.device.type)(
        rule,
        projections,
        gate_bias,
        pages,
        batch,
        reads,
        block_size=block_size,
        pages_are_initialised=pages_are_initialised,
    )
    return reads


class BoundCorrection(Protocol):
    """Adds the corrections that reads make, by weights that stay as they are."""

    def __call__(self, base: Tensor, reads: Tensor) -> Tensor:
        """base += reads delta^T, in place; the sum is rounded once to the dtype of `base`.

        Args:
            base: [T, at least first + n], rows contiguous; n columns of it are corrected.
            reads: [T, H * r] fp32, contiguous.

        Returns:
            base.
        """

    def add_norms(self, base: Tensor, reads: Tensor, sums: Tensor) -> None:
        """Before that: add the squared norms of the corrections, and of what will be corrected, to
        `sums` [2], fp32; of tokens that read something.
        """


def bind_correction(
    delta: Tensor, dtype: torch.dtype, *, first: int = 0, measured: bool = False
) -> BoundCorrection | None:
    """A correction in one call; None where nothing is faster than torch.

    Args:
        delta: [n, H * r] fp32. Must not change later.
        dtype: of what is corrected.
        first: the column that the first row of `delta` corrects.
        measured: `add_norms` will be called.
    """
    if delta.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        from deltamem_vllm.ops import cpu

        if cpu.can_pack(delta.shape[0]):
            return cpu.Correction(delta, dtype, first, measured)
    return None


class BoundStep(Protocol):
    """`memory_step` of one layer, its weights and pages checked and where they stay."""

    def __call__(
        self, source: Tensor, bound: BoundBatch, reads: Tensor, base: Tensor | None = None
    ) -> None:
        """One step of all requests.

        Args:
            source: [T, P] fp32 projections, or [T, hidden] of any dtype if the step has the weights
                that make the one of the other; rows contiguous.
            bound: see `bind_batch`.
            reads: [T, H * r] fp32, contiguous; overwritten.
            base: what the step's correction corrects, if it has one.
        """


@runtime_checkable
class ReadingStep(Protocol):
    """A `BoundStep` that has weights and a correction, and another way to be called."""

    def read(self, source: Tensor, bound: BoundBatch, base: Tensor) -> Tensor:
        """The step with a tensor of reads that all layers use: theirs until the next one's step.

        Returns:
            The reads.
        """


def bind_step(
    rule: DeltaRule,
    gate_bias: Tensor,
    pages: StatePages,
    *,
    block_size: int,
    pages_are_initialised: bool,
    projection: Tensor | None = None,
    correction: BoundCorrection | None = None,
) -> BoundStep:
    """`memory_step` without what is the same in every step; arguments and errors as there.

    A step of few tokens takes a few microseconds: as long as the checks of its arguments, and as
    another call. So on CPUs it takes in what is done before and after it.

    Args:
        projection: [P, hidden] fp32; steps are then given hidden states. Must not change later.
        correction: of `bind_correction`.
    """
    _check_layer(rule, gate_bias, pages)
    if projection is not None:
        _refuse_others(
            ("projection", projection, torch.float32, (rule.projection_dim, projection.shape[-1]))
        )
    if gate_bias.device.type == "cpu":
        from deltamem_vllm.ops import cpu

        if projection is None or cpu.can_pack(projection.shape[1]):
            return cpu.LayerStep(
                rule,
                gate_bias,
                pages,
                block_size=block_size,
                pages_are_initialised=pages_are_initialised,
                projection=projection,
                correction=cast("cpu.Correction | None", correction),
            )
    implementation = _implementation(gate_bias.device.type)

    def step(source: Tensor, bound: BoundBatch, reads: Tensor, base: Tensor | None = None) -> None:
        if projection is not None:
            source = functional.linear(source.float(), projection)
        implementation(
            rule,
            source,
            gate_bias,
            pages,
            bound.batch,
            reads,
            block_size=block_size,
            pages_are_initialised=pages_are_initialised,
        )
        if correction is not None and base is not None:
            correction(base, reads)

    return step


def bind_batch(batch: Batch) -> BoundBatch:
    """A step's batch for the steps of `bind_step`.

    Raises:
        ValueError: a tensor has the wrong shape, dtype or layout.
    """
    _check_batch(batch)
    if batch.seq_lens.device.type == "cpu":
        from deltamem_vllm.ops import cpu

        return cpu.bind_batch(batch)
    return BoundBatch(batch)


def warm_up(device: torch.device) -> None:
    """Compile what `memory_step` runs on `device`, so that no request waits for a compiler.

    The first time on a machine this takes some 20 seconds on CPUs; later the kernel comes from
    numba's cache on disk. On GPUs the engine's own warm-up runs compile.
    """
    _implementation(device.type)


def runs_in_graphs(device: torch.device) -> bool:
    """Whether `memory_step` on `device` can be captured in a CUDA graph, and replayed with other
    lengths in the same tensors; each row with as many tokens as `Batch.max_query_len` said."""
    return device.type == "cuda" and find_spec("triton") is not None


@functools.cache
def _implementation(device_type: str) -> _Implementation:
    # Imported late: a frontend that only wants shapes should not pay for loading compilers.
    if device_type == "cpu":
        from deltamem_vllm.ops import cpu

        return cpu.memory_step
    if device_type == "cuda" and find_spec("triton") is not None:
        from deltamem_vllm.ops import triton

        return triton.memory_step
    from deltamem_vllm.ops import reference

    logger.warning(
        "no memory kernel for device %r: using the sequential definition, which is slow",
        device_type,
    )
    return reference.memory_step


def _check(
    rule: DeltaRule,
    projections: Tensor,
    gate_bias: Tensor,
    pages: StatePages,
    batch: Batch,
    reads: Tensor,
) -> None:
    """Refuse what a kernel, which sees addresses and strides, would take for something else."""
    tokens = projections.shape[0]
    _check_layer(rule, gate_bias, pages)
    _check_batch(batch)
    _refuse_others(
        ("projections", projections, torch.float32, (tokens, rule.projection_dim)),
        ("out", reads, torch.float32, (tokens, rule.read_dim)),
    )
    _refuse_unaddressable(rows=(projections,), whole=(reads,))


def _check_layer(rule: DeltaRule, gate_bias: Tensor, pages: StatePages) -> None:
    header, states, spans = pages
    heads, rank, _ = rule.state_shape
    state_size = heads * rank * rank
    blocks, ring = states.shape[:2]
    words = max(header.shape[-1], STARTS_AT + 1)
    _refuse_others(
        ("gate_bias", gate_bias, torch.float32, (rule.gate_bias_dim,)),
        ("pages.header", header, torch.int32, (blocks, words)),
        ("pages.states", states, torch.float32, (blocks, ring, heads, rank, rank)),
    )
    if spans is not None:
        _refuse_others(
            ("spans.marks", spans.marks, torch.int32, (blocks, spans.marks.shape[-1])),
            ("spans.frozen", spans.frozen, torch.float32, (blocks, heads, rank, rank)),
            ("spans.sums", spans.sums, torch.float32, (blocks, ring, rule.sums_dim)),
        )
    _refuse_unaddressable(
        rows=(header,),
        whole=(gate_bias,),
        further=states.stride()[1:] == (state_size, rank * rank, rank, 1)
        and states.stride(0) >= ring * state_size
        and (spans is None or {page.stride(0) for page in (header, *spans)} == {states.stride(0)}),
    )


def _check_batch(batch: Batch) -> None:
    rows = batch.seq_lens.shape[0]
    table, starts, lengths = batch.block_table, batch.query_start_loc, batch.seq_lens
    if (
        table.dtype is starts.dtype is lengths.dtype is torch.int32
        and table.dim() == 2
        and table.shape[0] == rows == starts.shape[0] - 1
        and table.stride(1) == 1
        and table.stride(0) >= table.shape[1]
        and starts.stride() == lengths.stride() == (1,)
    ):
        # The usual case; what follows is slow, and says what is wrong.
        return
    _refuse_others(
        ("batch.block_table", table, torch.int32, (rows, table.shape[-1])),
        ("batch.query_start_loc", starts, torch.int32, (rows + 1,)),
        ("batch.seq_lens", lengths, torch.int32, (rows,)),
    )
    _refuse_unaddressable(rows=(table,), whole=(starts, lengths))


def _refuse_others(*expected: tuple[str, Tensor, torch.dtype, tuple[int, ...]]) -> None:
    for name, tensor, dtype, shape in expected:
        if tensor.dtype is not dtype or tensor.shape != shape:
            raise ValueError(
                f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )


def _refuse_unaddressable(
    *, rows: tuple[Tensor, ...], whole: tuple[Tensor, ...], further: bool = True
) -> None:
    """Refuse layouts.

    Args:
        rows: tensors whose rows may lie apart.
        whole: tensors that are contiguous.
        further: what else must hold.
    """
    addressable = (
        further
        and all(one.stride(1) == 1 and one.stride(0) >= one.shape[1] for one in rows)
        and all(one.is_contiguous() for one in whole)
    )
    if not addressable:
        strides = ", ".join(str(one.stride()) for one in (*rows, *whole))
        raise ValueError(
            "rows of projections, pages and block table must be contiguous and may lie apart, but "
            f"not overlap; the other tensors must be contiguous; got strides {strides}"
        )
