"""The delta rule as tensor functions that know nothing of an engine.

`memory_step` advances all requests of an engine's step, for one layer, in one call: packed tokens
with cumulative lengths go in, reads come out, and state pages are updated in place.

`reference.py` is the definition and the fallback for devices without a kernel; `cpu.py` is the fast
form for CPUs, `triton.py` the one for GPUs.
"""

import functools
import logging
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from deltamem_vllm.ops.reference import delta_rule_scan
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
    "UPDATE_MODES",
    "WRITE_FROM",
    "WRITE_UNTIL",
    "Batch",
    "DeltaRule",
    "SpanPages",
    "StatePages",
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
    page that was loaded rules which positions read and write, and is copied into every page that
    takes a state.

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
            of every request before its first token.
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
    """Refuse what a kernel would take for something else; kernels see addresses and strides only.

    This runs for every layer of every step: keep it to a few microseconds.
    """
    header, states, spans = pages
    tokens, rows = projections.shape[0], batch.seq_lens.shape[0]
    heads, rank, _ = rule.state_shape
    state_size = heads * rank * rank
    words = max(header.shape[-1], WRITE_UNTIL + 1)
    expected: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = [
        ("projections", projections, torch.float32, (tokens, rule.projection_dim)),
        ("gate_bias", gate_bias, torch.float32, (rule.gate_bias_dim,)),
        ("pages.header", header, torch.int32, (states.shape[0], words)),
        ("pages.states", states, torch.float32, (*states.shape[:2], heads, rank, rank)),
        ("batch.block_table", batch.block_table, torch.int32, (rows, batch.block_table.shape[-1])),
        ("batch.query_start_loc", batch.query_start_loc, torch.int32, (rows + 1,)),
        ("batch.seq_lens", batch.seq_lens, torch.int32, (rows,)),
        ("out", reads, torch.float32, (tokens, rule.read_dim)),
    ]
    if spans is not None:
        blocks, ring = states.shape[:2]
        expected += [
            ("spans.marks", spans.marks, torch.int32, (blocks, spans.marks.shape[-1])),
            ("spans.frozen", spans.frozen, torch.float32, (blocks, heads, rank, rank)),
            ("spans.sums", spans.sums, torch.float32, (blocks, ring, rule.sums_dim)),
        ]
    for name, tensor, dtype, shape in expected:
        if tensor.dtype is not dtype or tensor.shape != shape:
            raise ValueError(
                f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    strided = (projections, header, batch.block_table)
    addressable = (
        all(tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1] for tensor in strided)
        and states.stride()[1:] == (state_size, rank * rank, rank, 1)
        and states.stride(0) >= states.shape[1] * state_size
        and gate_bias.is_contiguous()
        and batch.query_start_loc.is_contiguous()
        and batch.seq_lens.is_contiguous()
        and reads.is_contiguous()
        and (spans is None or {page.stride(0) for page in (header, *spans)} == {states.stride(0)})
    )
    if not addressable:
        layouts = ", ".join(f"{name} {tensor.stride()}" for name, tensor, *_ in expected)
        raise ValueError(
            "rows of projections, pages and block table must be contiguous and may lie apart, but "
            f"not overlap; the other tensors must be contiguous; got strides {layouts}"
        )
