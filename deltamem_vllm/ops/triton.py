"""The delta rule on CUDA devices, in Triton.

A step takes one launch of `triton_scan.py` (decode, spans, large ranks), or the four launches of
`triton_chunk.py` (prefill chunks, alone or beside decodes). Nothing waits for the device or depends
on its values: grids follow from shapes and `Batch.max_query_len`, so that a step can be captured in
a CUDA graph. Scratch comes from torch's allocator, in sizes that follow from shapes too.

A row that points outside of its tensors is skipped and reads 0. So is one that hit its blocks, but
in the one launch of `triton_scan.py` such a row's reads are left as they were.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from deltamem_vllm.ops.rule import UPDATE_MODES, Batch, DeltaRule, StatePages
from deltamem_vllm.ops.triton_chunk import (
    HEADER,
    carry_kernel,
    maps_kernel,
    plan_kernel,
    reads_kernel,
)
from deltamem_vllm.ops.triton_rule import ZEROED_TOKENS
from deltamem_vllm.ops.triton_scan import scan_kernel

CHUNK: Final = 64
"""Tokens of a chunk. A prefill of T tokens takes 2 CHUNK + T / CHUNK steps one after the other, all
of about a length, so the best is near the root of T / 2: 64 for 8k tokens."""

LARGEST_MAPPED: Final = 16
"""The largest rank whose chunks are run in parallel: maps have r^3 numbers per chunk and head."""

SCAN_TILE: Final = 1024
"""At most this many elements of a state in one program of the scan, spans aside."""


class Launch(NamedTuple):
    """A kernel, and all that it is launched with."""

    kernel: Any
    grid: tuple[int, int]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int


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
    chunk: int = CHUNK,
) -> None:
    """One step of all requests; see `deltamem_vllm.ops.memory_step`, whose checks it relies on.

    Args:
        chunk: tokens of a chunk.
    """
    for kernel, grid, arguments, constants, warps in launches(
        rule,
        projections,
        gate_bias,
        pages,
        batch,
        reads,
        block_size=block_size,
        pages_are_initialised=pages_are_initialised,
        chunk=chunk,
    ):
        if 0 not in grid:
            kernel[grid](**arguments, **constants, num_warps=warps)


def launches(
    rule: DeltaRule,
    projections: Tensor,
    gate_bias: Tensor,
    pages: StatePages,
    batch: Batch,
    reads: Tensor,
    *,
    block_size: int,
    pages_are_initialised: bool,
    chunk: int,
) -> Iterator[Launch]:
    """What `memory_step` launches, in this order; see there."""
    header, states, spans = pages
    tokens, rows, heads = reads.shape[0], batch.seq_lens.shape[0], rule.num_heads
    size = padded(rule.rank)
    arguments: dict[str, Any] = {
        "projections": projections,
        "gate_bias": gate_bias,
        "header": header,
        "states": states,
        "table": batch.block_table,
        "query_start_loc": batch.query_start_loc,
        "seq_lens": batch.seq_lens,
        "reads": reads,
        "projections_stride": projections.stride(0),
        "header_stride": header.stride(0),
        "states_stride": states.stride(0),
        "table_stride": batch.block_table.stride(0),
        "tokens": tokens,
        "rows": rows,
        "table_width": batch.block_table.shape[1],
        "num_blocks": states.shape[0],
    }
    constants = {
        "BLOCK_SIZE": block_size,
        "RING": states.shape[1],
        "HEADS": heads,
        "RANK": rule.rank,
        "WIDTH": rule.read_dim,
        "WIDTH_PAD": padded(rule.read_dim),
        "C": size,
        "A": size if rule.rankwise_gates else 1,
        "HEADER_WORDS": header.shape[1],
        "HEADER_PAD": padded(header.shape[1]),
        "INITIALISED": pages_are_initialised,
        "NORMALIZE": rule.normalize_qk,
        "COUPLE": rule.couple_lambda,
        "RANKWISE": rule.rankwise_gates,
        "MODE": UPDATE_MODES.index(rule.update_mode),
        "SPANS": spans is not None,
        "CHUNK": chunk,
    }

    def launch(kernel: Any, grid: tuple[int, int], elements: int) -> Launch:
        names = kernel.arg_names
        return Launch(
            kernel,
            grid,
            {name: arguments[name] for name in names if name in arguments},
            {name: constants[name] for name in names if name in constants},
            warps_for(elements),
        )

    programs = rows + -(-tokens // ZEROED_TOKENS.value)
    longest = tokens if batch.max_query_len is None else batch.max_query_len
    if spans is not None or size > LARGEST_MAPPED or longest <= chunk or rows == 0:
        # A page's spans are shared by all heads: one program runs them all.
        tile = padded(rule.read_dim) if spans is not None else min(size, SCAN_TILE // size)
        tiles = 1 if spans is not None else heads * -(-rule.rank // tile)
        constants["I"] = tile
        arguments["frozen"], arguments["sums"], arguments["marks"] = (
            (states, states, header) if spans is None else (spans.frozen, spans.sums, spans.marks)
        )
        yield launch(scan_kernel, (programs, tiles), tile * size)
        return

    slots = tokens // chunk + rows
    maps = rule.rank if rule.rankwise_gates else 1

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=reads.device)

    arguments |= {
        "plans": scratch(rows, HEADER.value + header.shape[1], dtype=torch.int32),
        "slots": scratch(slots, dtype=torch.int32),
        "maps": scratch(slots, heads, maps, rule.rank, rule.rank),
        "offsets": scratch(slots, *rule.state_shape),
        "starts": scratch(slots, *rule.state_shape),
    }
    elements = constants["A"] * size * size
    yield launch(plan_kernel, (programs, 1), 1)
    yield launch(maps_kernel, (slots, heads), elements)
    yield launch(carry_kernel, (rows, heads), elements)
    yield launch(reads_kernel, (slots, heads), size * size)


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def warps_for(elements: int) -> int:
    """Warps for tiles of so many elements: a thread holds 16, in larger tiles more."""
    return max(1, min(8, elements // 512))
