"""The delta rule as it is defined: sequential, readable, on any device, differentiable.

Every faster form is tested against this one. Formulas: arXiv 2605.12357, section 3, and
`DeltaMemAttention` of declare-lab/delta-Mem @ 5cd5d91 (`_memory_sequence_projections`,
`_memory_update_coefficients`). The one difference: arithmetic here is in the dtype of the inputs,
fp32 when serving, where the published code keeps the state in the model's dtype.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deltamem_vllm.ops.rule import (
    ENDS_SPAN,
    IN_SPAN,
    MARK_BITS,
    MARKS_PER_WORD,
    READ_FROM,
    SPAN_END,
    STARTS_AT,
    WRITE_FROM,
    WRITE_UNTIL,
    Batch,
    DeltaRule,
    StatePages,
)

NORM_EPS = 1e-6


class Activations(NamedTuple):
    """What T tokens ask and write; each tensor is [T, H, r]."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor
    erase: Tensor
    write: Tensor


class Scan(NamedTuple):
    """What T tokens read, and the state after each of them."""

    reads: Tensor  # [T, H * r]
    states: Tensor  # [T, H, r, r]


def activate(rule: DeltaRule, projections: Tensor, gate_bias: Tensor) -> Activations:
    """Turn packed projections into queries, keys, values and update factors.

    Args:
        rule: shapes and options.
        projections: [T, P], columns as in `DeltaRule`.
        gate_bias: [gate_bias_dim].
    """
    heads = (rule.num_heads, rule.rank)
    columns = [rule.read_dim] * 3 + [rule.gate_bias_dim]
    query, key, value, gates = projections.split(columns, dim=-1)
    query, key, value = (x.unflatten(-1, heads) for x in (query, key, value))
    if rule.normalize_qk:
        query = functional.normalize(torch.tanh(query), dim=-1, eps=NORM_EPS)
        key = functional.normalize(torch.tanh(key), dim=-1, eps=NORM_EPS)

    gates = torch.sigmoid(gates + gate_bias).unflatten(-1, (-1, rule.num_heads, rule.gate_rank))
    gates = gates.expand(*gates.shape[:-1], rule.rank)
    beta = gates[..., 0, :, :]
    keep = 1.0 - beta if rule.couple_lambda else gates[..., 1, :, :]
    erase = beta
    if rule.update_mode == "lambda_outside":
        erase = keep * beta
    elif rule.update_mode == "no_lambda":
        keep = torch.ones_like(beta)
    return Activations(query, key, value, keep, erase, beta)


def delta_rule_scan(
    rule: DeltaRule,
    projections: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    *,
    read_from: int = 0,
    write_from: int = 0,
    write_until: int = 0,
) -> Scan:
    """Run the rule over one sequence.

    Per token: read_t = S_{t-1} q_t, and then
    S_t = diag(keep) S_{t-1} - diag(erase) (S_{t-1} k_t) k_t^T + diag(write) v_t k_t^T.

    Args:
        rule: shapes and options.
        projections: [T, P], columns as in `DeltaRule`.
        gate_bias: [gate_bias_dim].
        state: [H, r, r] before the first token; not changed.
        read_from: index of the first token that reads and may write; earlier ones read exactly 0
            and leave the state as it is.
        write_from: index of the first token that writes; earlier ones leave the state as it is.
        write_until: tokens before this index write too, whatever `write_from` says.
    """
    steps = zip(*activate(rule, projections, gate_bias), strict=True)
    reads, states = [], []
    for index, (query, key, value, keep, erase, write) in enumerate(steps):
        read = _product(state, query) if index >= read_from else torch.zeros_like(query)
        reads.append(read.flatten())
        if index >= read_from and (index >= write_from or index < write_until):
            state = _written(state, key, value, keep, erase, write)
        states.append(state)
    if not reads:
        return Scan(projections.new_zeros(0, rule.read_dim), state.new_zeros(0, *state.shape))
    return Scan(torch.stack(reads), torch.stack(states))


class SpanScan(NamedTuple):
    """What T tokens of spans read, and what is left after each of them."""

    reads: Tensor  # [T, H * r]
    states: Tensor  # [T, H, r, r]
    sums: Tensor  # [T, sums_dim]


def span_scan(
    rule: DeltaRule,
    projections: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    frozen: Tensor,
    sums: Tensor,
    marks: Sequence[int],
    *,
    read_from: int = 0,
) -> SpanScan:
    """Run the rule over a part of a prompt whose tokens are written span by span.

    Every token reads `frozen`. A span is written once, at its last token, with the mean of its
    tokens' projections, which is the projection of their mean; activations come after that.

    Args:
        rule, projections, gate_bias, state, read_from: see `delta_rule_scan`.
        frozen: [H, r, r] before the whole prompt.
        sums: [sums_dim] of a span that was begun before; else 0.
        marks: of each token: `IN_SPAN`, `ENDS_SPAN`, both, or 0 for one that is not written.
    """
    queries = activate(rule, projections, gate_bias).query
    reads, states, all_sums = [], [], []
    for index, (query, row, mark) in enumerate(zip(queries, projections, marks, strict=True)):
        read = _product(frozen, query) if index >= read_from else torch.zeros_like(query)
        reads.append(read.flatten())
        if mark & IN_SPAN:
            sums = sums + torch.cat([row.new_ones(1), row[rule.read_dim :]])
        if mark & ENDS_SPAN:
            mean = torch.cat([row.new_zeros(rule.read_dim), sums[1:] / sums[0]])
            (written,) = zip(*activate(rule, mean[None], gate_bias), strict=True)
            state = _written(state, *written[1:])
            sums = torch.zeros_like(sums)
        states.append(state)
        all_sums.append(sums)
    return SpanScan(torch.stack(reads), torch.stack(states), torch.stack(all_sums))


def _written(
    state: Tensor, key: Tensor, value: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> Tensor:
    change = write * value - erase * _product(state, key)
    return keep.unsqueeze(-1) * state + change.unsqueeze(-1) * key.unsqueeze(-2)


def _product(state: Tensor, vector: Tensor) -> Tensor:
    """S x per head: [H, r, r], [H, r] -> [H, r]."""
    return (state @ vector.unsqueeze(-1)).squeeze(-1)


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
    """One step of all requests; see `deltamem_vllm.ops.memory_step`, whose checks it relies on."""
    reads.zero_()
    ring = pages.states.shape[1]
    starts = batch.query_start_loc.tolist()
    ends = batch.seq_lens.tolist()
    queries = [stop - start for start, stop in itertools.pairwise(starts)]
    rows = [row for row, after in enumerate(ends) if after > 0 and queries[row] > 0]
    # A request may hit, in the prefix cache, a block that another request fills in this very step.
    # The one that fills it began earlier in its sequence, so the shorter context goes first.
    rows.sort(key=lambda row: ends[row] - queries[row])
    for row in rows:
        after, query = ends[row], queries[row]
        before = after - query
        table = batch.block_table[row].tolist()
        if before == 0 and not pages_are_initialised:
            state = torch.zeros_like(pages.states[0, 0])
            header = torch.zeros_like(pages.header[0])
        else:
            page = _start_page(pages, table, before, block_size, pages_are_initialised)
            state = pages.states[page, before % ring].clone()
            header = pages.header[page].clone()
        span_start = int(header[WRITE_UNTIL])
        span_end = 0 if pages.spans is None else int(header[SPAN_END])
        start = min(max(span_start, before), after) if span_end > before else after
        stop = max(start, min(span_end, after))
        for first, last in ((before, start), (start, stop), (stop, after)):
            if first == last:
                continue
            tokens = slice(starts[row] + first - before, starts[row] + last - before)
            stored = [
                count
                for count in range(first + 1, last + 1)
                if count % block_size == 0 or count > after - ring
            ]
            scan: Scan | SpanScan
            if (first, last) != (start, stop):
                scan = delta_rule_scan(
                    rule,
                    projections[tokens],
                    gate_bias,
                    state,
                    read_from=int(header[READ_FROM]) - first,
                    write_from=int(header[WRITE_FROM]) - first,
                    write_until=span_start - first,
                )
            else:
                assert pages.spans is not None
                frozen, sums = state, pages.spans.sums.new_zeros(rule.sums_dim)
                if first > span_start:  # in the midst of the prompt: its page knows the rest
                    page = table[(first - 1) // block_size]
                    frozen = pages.spans.frozen[page].clone()
                    sums = pages.spans.sums[page, first % ring].clone()
                scan = span_scan(
                    rule,
                    projections[tokens],
                    gate_bias,
                    state,
                    frozen,
                    sums,
                    [_mark(pages, table, at, block_size) for at in range(first, last)],
                    read_from=int(header[READ_FROM]) - first,
                )
                for count in stored:
                    if count < span_end:
                        page = table[(count - 1) // block_size]
                        pages.spans.frozen[page] = frozen
                        pages.spans.sums[page, count % ring] = scan.sums[count - first - 1]
            reads[tokens], state = scan.reads, scan.states[-1]
            for count in stored:
                page = table[(count - 1) // block_size]
                pages.states[page, count % ring] = scan.states[count - first - 1]
                starts_at = int(pages.header[page, STARTS_AT])
                pages.header[page] = header
                pages.header[page, STARTS_AT] = starts_at


def _start_page(
    pages: StatePages, table: Sequence[int], before: int, block_size: int, initialised: bool
) -> int:
    """The page with the state before a row's first token."""
    if initialised and before % block_size == 0:
        own = table[before // block_size]
        # Before its first token a request has, at most, what was put into its first page.
        if before == 0 or pages.header[own, STARTS_AT] == before:
            return own
    return table[(before - 1) // block_size]


def _mark(pages: StatePages, table: Sequence[int], position: int, block_size: int) -> int:
    assert pages.spans is not None
    word, place = divmod(position % block_size, MARKS_PER_WORD)
    bits = int(pages.spans.marks[table[position // block_size], word])
    return bits >> place * MARK_BITS & (1 << MARK_BITS) - 1
