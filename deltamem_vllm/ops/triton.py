"""The delta rule on GPUs: one or two launches per layer and step, for all requests.

No length is read on the host, so a launch can be captured in a CUDA graph and replayed with other
lengths in the same tensors.

A request may hit, in the prefix cache, a block that another one fills in this very step. Programs
run at once, so it cannot wait for that block's state: it runs over the other request's tokens
itself, from the last state that was there before the step, and stores nothing of them. If a request
may have more tokens in a step than a page keeps states, the page of that last state may be written
meanwhile; then a launch of its own copies the first states out before.
"""

from typing import Final

import torch
import triton
from torch import Tensor

from deltamem_vllm.ops.rule import UPDATE_MODES, Batch, DeltaRule, StatePages
from deltamem_vllm.ops.triton_kernels import first_states_kernel, scan_kernel

SEARCHED_ROWS: Final = 128
"""Rows looked at together in a search for the one that fills a block."""

WORD_BYTES: Final = 4


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

    Rows and pages that point outside of a tensor are skipped: nothing is copied to the host that
    could be checked there.
    """
    reads.zero_()
    num_rows, heads, rank = batch.seq_lens.shape[0], rule.num_heads, rule.rank
    if num_rows == 0 or projections.shape[0] == 0:
        return
    header, states, spans = pages
    num_blocks, header_words = header.shape
    ring = states.shape[1]
    frozen_at = sums_at = marks_at = sums_dim = 0
    if spans is not None:
        frozen_at = (spans.frozen.data_ptr() - states.data_ptr()) // WORD_BYTES
        sums_at = (spans.sums.data_ptr() - states.data_ptr()) // WORD_BYTES
        marks_at = (spans.marks.data_ptr() - header.data_ptr()) // WORD_BYTES
        sums_dim = rule.sums_dim
    is_copied = batch.max_query_len is None or batch.max_query_len >= ring
    first_states, first_sums, begins = states, states, batch.seq_lens
    padded_rank = triton.next_power_of_2(rank)
    grid = (num_rows, heads)
    warps = 1 if rank <= 16 else 4
    if is_copied:
        first_states = states.new_empty(num_rows, heads, rank, rank)
        first_sums = states.new_empty(num_rows, max(1, sums_dim))
        begins = torch.empty_like(batch.seq_lens)
        first_states_kernel[grid](
            states,
            states.stride(0),
            num_blocks,
            batch.block_table,
            batch.block_table.stride(0),
            batch.block_table.shape[1],
            batch.query_start_loc,
            batch.seq_lens,
            num_rows,
            projections.shape[0],
            sums_at,
            first_states,
            first_sums,
            begins,
            H=heads,
            R=rank,
            RP=padded_rank,
            RING=ring,
            SUMS=sums_dim,
            SUMS_P=triton.next_power_of_2(max(1, sums_dim)),
            BLOCK_SIZE=block_size,
            INITIALISED=pages_are_initialised,
            ROWS=SEARCHED_ROWS,
            num_warps=warps,
        )
    scan_kernel[grid](
        projections,
        projections.stride(0),
        gate_bias,
        header,
        header.stride(0),
        states,
        states.stride(0),
        num_blocks,
        frozen_at,
        sums_at,
        marks_at,
        batch.block_table,
        batch.block_table.stride(0),
        batch.block_table.shape[1],
        batch.query_start_loc,
        batch.seq_lens,
        num_rows,
        projections.shape[0],
        first_states,
        first_sums,
        begins,
        reads,
        H=heads,
        R=rank,
        RP=padded_rank,
        RING=ring,
        WORDS=header_words,
        WORDS_P=triton.next_power_of_2(header_words),
        GATE_DIM=rule.gate_dim,
        PER_ROW=rule.rankwise_gates,
        NORMALIZE=rule.normalize_qk,
        COUPLED=rule.couple_lambda,
        MODE=UPDATE_MODES.index(rule.update_mode),
        SUMS=sums_dim,
        BLOCK_SIZE=block_size,
        INITIALISED=pages_are_initialised,
        COPIED=is_copied,
        ROWS=SEARCHED_ROWS,
        num_warps=warps,
    )
