"""The Triton kernels against the formula, in Triton's interpreter.

`test_triton.py` runs this file in processes of their own, with TRITON_INTERPRET=1: Triton asks for
it when it is imported, and other tests of a process may want the compiler. The interpreter takes
some milliseconds for a token, so cases are small and chunks are short.
"""

import os
from functools import partial
from itertools import pairwise
from types import FunctionType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from deltamem_vllm.config import StateUpdateMode
from deltamem_vllm.ops import UPDATE_MODES, Batch, DeltaRule
from deltamem_vllm.ops import triton as ours
from deltamem_vllm.state.page import thresholds
from tests.ops.cases import (
    OUTSIDE,
    Case,
    Request,
    Result,
    assert_close,
    assert_same,
    definition,
    hitting_cases,
    lone_cases,
    positions,
    rings,
    seeds,
    span_requests,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "see the docstring"


class PatchedOnce:
    """Triton's interpreter takes over the language at every call of every function, and gives it
    back after each launch. Nothing else in this process uses the language: once for each module
    that does is enough, and halves the time."""

    def __init__(self) -> None:
        self.patch = interpreter._patch_lang
        self.modules: set[str] = set()

    def __call__(self, function: FunctionType) -> "PatchedOnce":
        if function.__module__ not in self.modules:
            self.modules.add(function.__module__)
            self.patch(function)
        return self

    def restore(self) -> None:
        """Called after a launch."""


interpreter._patch_lang = PatchedOnce()

CUT = 2e-6
"""Between two ways to cut the same tokens into steps and chunks."""

SCAN = 10**6
"""A length of chunks that no step needs two of."""

chunks = st.sampled_from([1, 3, 8, SCAN])


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True)


def run(case: Case, chunk: int, max_query_len: int | None = None, **options) -> Result:
    batch = options.pop("batch", case.batch)._replace(max_query_len=max_query_len)
    return case.run(partial(ours.memory_step, chunk=chunk), batch=batch, **options)


def assert_step_is_right(case: Case, chunk: int, max_query_len: int | None = None) -> None:
    expected = case.expected()
    assert_same("definition", expected, case.run(definition))
    assert_same("triton", expected, run(case, chunk, max_query_len))


# Steps of any shape

rules = st.builds(
    DeltaRule,
    rank=st.one_of(st.integers(1, 9), st.sampled_from([8, 13, 16])),
    num_heads=st.integers(1, 3),
    normalize_qk=st.booleans(),
    couple_lambda=st.booleans(),
    rankwise_gates=st.booleans(),
    update_mode=st.sampled_from(UPDATE_MODES),
)
requests = st.builds(
    Request,
    context=st.one_of(st.just(0), st.integers(1, 60)),
    query=st.one_of(st.integers(0, 2), st.integers(0, 20)),
    read_from=positions,
    write_from=positions,
    write_until=st.one_of(st.just(0), st.integers(0, 60)),
    padded=st.sampled_from([False, False, False, True]),
    spans=st.just(()),
    span_end=st.just(0),
    hits=st.none(),
    forgets=st.just(False),
    alone=st.just(False),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        draw(rules),
        draw(st.lists(requests, max_size=4)),
        block_size=draw(st.integers(1, 20)),
        ring=draw(rings),
        initialised=draw(st.booleans()),
        seed=draw(seeds),
    )


@examples(100)
@given(case=cases(), chunk=chunks, told=st.booleans())
def test_a_step_is_the_formula_and_touches_nothing_else(case: Case, chunk: int, told: bool) -> None:
    longest = max((request.query for request in case.requests), default=0)
    assert_step_is_right(case, chunk, longest if told else None)


@pytest.mark.parametrize("rank", [33, 64])
@pytest.mark.parametrize("rankwise", [True, False])
def test_large_ranks_are_the_formula(rank: int, rankwise: bool) -> None:
    rule = DeltaRule(rank, 2, rankwise_gates=rankwise, couple_lambda=rankwise)
    rows = [Request(5, 4), Request(0, 1), Request(30, 3)]
    assert_step_is_right(Case(rule, rows, block_size=4, ring=2, seed=rank), chunk=1)


@pytest.mark.parametrize("requests", [[], [Request(3, 4, padded=True)], [Request(9, 0)]])
@pytest.mark.parametrize("chunk", [2, SCAN])
def test_a_step_without_tokens_reads_zero(requests: list[Request], chunk: int) -> None:
    assert_step_is_right(Case(DeltaRule(8), requests), chunk)


def test_a_step_may_have_no_token_rows_at_all() -> None:
    case = Case(DeltaRule(8), [Request(9, 0)])
    result = run(case, SCAN, projections=case.projections[:0])
    assert result.reads.shape == (0, 8)
    assert torch.equal(result.raw, case.raw)


@pytest.mark.parametrize("chunk", [4, SCAN])
def test_more_rows_than_are_looked_at_together(chunk: int) -> None:
    hits = {3: 140, 77: 3, 150: 140, 151: 2}
    rows = [Request(7 * i % 40, 1, padded=i % 11 == 10) for i in range(152)]
    rows[140], rows[2] = Request(3, 8), Request(0, 4)
    rows[3], rows[77] = Request(8, 5, hits=140), Request(12, 1, hits=3)
    rows[150], rows[151] = Request(8, 1, hits=140), Request(4, 1, hits=2)
    assert all(rows[row].hits == hit for row, hit in hits.items())
    case = Case(DeltaRule(2), rows, block_size=4)
    assert_step_is_right(case, chunk)


@pytest.mark.parametrize("chunk", [50, SCAN])
def test_more_blocks_than_are_looked_at_together(chunk: int) -> None:
    assert_step_is_right(Case(DeltaRule(2), [Request(1, 260)], block_size=1), chunk)


def test_more_unused_token_rows_than_a_program_zeroes() -> None:
    case = Case(DeltaRule(3), [Request(2, 1), Request(4, 2, padded=True)])
    padding = torch.full((200, case.projections.shape[1]), torch.nan)
    projections = torch.cat([case.projections, padding])
    for chunk in (1, SCAN):
        result = run(case, chunk, projections=projections)
        assert torch.equal(result.reads[1:], torch.zeros(205, 3))
        assert result.reads[0].abs().max() > 0


# Blocks that are hit while another row fills them


@examples(30)
@given(case=hitting_cases(), chunk=chunks)
def test_a_request_may_hit_a_block_that_another_fills_in_the_same_step(
    case: Case, chunk: int
) -> None:
    assert_step_is_right(case, chunk)


@pytest.mark.parametrize(("chunk", "initialised"), [(3, False), (5, True), (SCAN, False)])
def test_a_tree_of_hits_runs_in_the_order_of_the_sequence(chunk: int, initialised: bool) -> None:
    rows = [
        Request(16, 5, hits=1),
        Request(8, 12, hits=4),
        Request(16, 9, hits=1),
        Request(24, 1, hits=2),
        Request(0, 20, 3, 2),
        Request(16, 3, hits=4),
        Request(8, 1, hits=4),
        Request(8, 1),
    ]
    case = Case(DeltaRule(4, 2), rows, block_size=8, ring=2, initialised=initialised)
    assert_step_is_right(case, chunk)
    # The last row of the chain did read what came down to it.
    assert run(case, chunk).reads[case.tokens(3)].abs().max() > 0


@examples(40)
@given(case=lone_cases(), chunk=chunks)
def test_a_row_may_start_from_its_own_page_behind_blocks_of_another(case: Case, chunk: int) -> None:
    assert_step_is_right(case, chunk)


@pytest.mark.parametrize("chunk", [3, SCAN])
@pytest.mark.parametrize("page", [OUTSIDE, -1])
def test_a_bad_page_of_a_row_that_could_start_alone_is_not_followed(chunk: int, page: int) -> None:
    rows = [Request(8, 3, hits=1, alone=True), Request(0, 12), Request(8, 2, hits=1, alone=True)]
    case = Case(DeltaRule(4), rows, block_size=4, initialised=True)
    table = case.table.clone()
    table[0, 2] = page
    good, bad = run(case, chunk), run(case, chunk, batch=case.batch._replace(block_table=table))
    assert torch.equal(bad.reads[3:17], good.reads[3:17])
    if chunk != SCAN:
        assert torch.equal(bad.reads[:3], torch.zeros_like(bad.reads[:3]))


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_a_hit_may_be_at_the_end_of_all_tokens_of_a_step(chunk: int) -> None:
    rows = [Request(16, 5, hits=1), Request(8, 8, hits=2), Request(0, 8, 1, 3)]
    assert_step_is_right(Case(DeltaRule(4), rows, block_size=8, initialised=True), chunk)


def test_decodes_may_hit_a_block_that_another_decode_completes() -> None:
    rows = [Request(8, 1, hits=2), Request(8, 1), Request(7, 1), Request(8, 1, hits=2)]
    case = Case(DeltaRule(8), rows, block_size=8, ring=1)
    assert_step_is_right(case, ours.CHUNK, max_query_len=1)
    reads = run(case, ours.CHUNK, max_query_len=1).reads
    assert reads[0].abs().max() > 0
    assert reads[3].abs().max() > 0


def test_spans_go_on_in_a_request_that_hits_a_block_in_the_midst_of_them() -> None:
    spans, end = ((0, 5), (5, 13), (13, 19)), 20
    rows = [
        Request(8, 15, hits=1, spans=spans, span_end=end),
        Request(0, 11, spans=spans, span_end=end),
    ]
    case = Case(DeltaRule(4, 2), rows, block_size=8, initialised=True, with_spans=True)
    assert_step_is_right(case, 4)


# Spans


@st.composite
def span_cases(draw: st.DrawFn) -> Case:
    one = span_requests().map(lambda request: request._replace(query=min(request.query, 25)))
    return Case(
        draw(rules),
        draw(st.lists(st.one_of(one, requests), min_size=1, max_size=3)),
        block_size=draw(st.integers(1, 40)),
        ring=draw(rings),
        initialised=True,
        with_spans=True,
        seed=draw(seeds),
    )


@examples(60)
@given(span_cases())
def test_a_step_of_spans_is_the_formula_and_touches_nothing_else(case: Case) -> None:
    assert_step_is_right(case, 8)


# One sequence in several steps and chunks


def run_in_steps(case: Case, cuts: list[int], chunk: int) -> Result:
    """The only request of `case`, its tokens cut into steps at `cuts`."""
    (request,) = case.requests
    raw, reads = case.raw.clone(), []
    for first, last in pairwise([0, *cuts, request.query]):
        batch = Batch(
            case.table,
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([request.context + last], dtype=torch.int32),
        )
        part = run(
            case,
            chunk,
            last - first,
            raw=raw,
            projections=case.projections[first:last],
            batch=batch,
        )
        reads.append(part.reads)
    return part._replace(reads=torch.cat(reads))


@examples(12)
@given(
    rule=rules,
    context=st.sampled_from([0, 1, 7, 64]),
    query=st.integers(1, 60),
    cuts=st.sets(st.integers(1, 59), max_size=8),
    block_size=st.integers(1, 20),
    ring=rings,
    seed=seeds,
)
def test_reads_and_states_are_independent_of_steps_and_chunks(
    rule: DeltaRule,
    context: int,
    query: int,
    cuts: set[int],
    block_size: int,
    ring: int,
    seed: int,
) -> None:
    case = Case(rule, [Request(context, query)], block_size=block_size, ring=ring, seed=seed)
    whole, written = run(case, SCAN), case.expected().written
    parts = run_in_steps(case, sorted(cut for cut in cuts if cut < query), chunk=5)
    scale = max(1.0, whole.states[written].abs().max().item())
    assert_close("reads", whole.reads[:query], parts.reads[:query], CUT, scale)
    assert_close("states", whole.states[written], parts.states[written], CUT)


@pytest.mark.parametrize(
    ("rule", "tokens"),
    [
        (DeltaRule(8), 2000),
        (DeltaRule(8, rankwise_gates=False, update_mode="no_lambda"), 600),
        (DeltaRule(4, 2, couple_lambda=False, update_mode="lambda_outside"), 400),
    ],
)
def test_rounding_errors_do_not_grow_over_a_long_sequence(rule: DeltaRule, tokens: int) -> None:
    case = Case(rule, [Request(0, tokens), Request(9, 1)], seed=tokens)
    assert_same("chunks of 64", case.expected(), run(case, 64))


@pytest.mark.parametrize("bias", [-1e30, -60.0, -15.0, 15.0, 60.0, 1e30])
@pytest.mark.parametrize("mode", UPDATE_MODES)
@pytest.mark.parametrize("couple_lambda", [True, False])
def test_saturated_gates_stay_exact(
    bias: float, mode: StateUpdateMode, couple_lambda: bool
) -> None:
    rule = DeltaRule(8, couple_lambda=couple_lambda, update_mode=mode, rankwise_gates=bias > 0)
    case = Case(rule, [Request(0, 45)])
    case.gate_bias.fill_(bias)
    if not couple_lambda:
        case.gate_bias[rule.gate_dim :] = -bias
    assert_step_is_right(case, 16)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-9, 1e-6, 1e-3, 1e4, 1e30])
@pytest.mark.parametrize("rule", [DeltaRule(8), DeltaRule(3, 2, normalize_qk=False)])
def test_tiny_and_huge_projections_stay_exact(rule: DeltaRule, scale: float) -> None:
    case = Case(rule, [Request(3, 14)])
    if rule.normalize_qk:
        case.projections *= scale
    else:
        case.projections[:, 2 * rule.read_dim :] *= scale
    assert_step_is_right(case, 6)


# Neighbours and modes


@examples(12)
@given(
    rule=rules,
    queries=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    where=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=8),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    chunk=st.sampled_from([3, SCAN]),
    seed=seeds,
)
def test_nan_and_infinity_stay_in_their_request(
    rule: DeltaRule,
    queries: list[int],
    where: list[tuple[int, int]],
    value: float,
    chunk: int,
    seed: int,
) -> None:
    case = Case(rule, [Request(5, query) for query in queries], seed=seed)
    clean = run(case, chunk)
    ill = seed % len(queries)
    tokens = case.tokens(ill)
    for token, column in where:
        row = tokens.start + token % queries[ill]
        case.projections[row, column % rule.projection_dim] = value
    result, defined = run(case, chunk), case.run(definition)
    sick = defined.reads[tokens].isnan()
    assert result.reads[tokens].isnan()[sick].all()
    result.reads[tokens] = clean.reads[tokens]
    assert torch.equal(result.reads, clean.reads)
    pages = [case.page(ill, count) for count in range(5, 5 + queries[ill] + 1)]
    result.raw[pages] = clean.raw[pages]
    assert torch.equal(result.raw, clean.raw)


@examples(8)
@given(
    rule=rules,
    query=st.integers(1, 30),
    context=st.integers(0, 40),
    ring=rings,
    chunk=st.sampled_from([4, SCAN]),
    seed=seeds,
)
def test_read_only_leaves_the_state_bit_identical(
    rule: DeltaRule, query: int, context: int, ring: int, chunk: int, seed: int
) -> None:
    request = Request(context, query, *thresholds("read_only"))
    case = Case(rule, [request], ring=ring, initialised=True, seed=seed)
    start = case.layout.views(case.raw).states[case.page(0, context), context % ring]
    result, written = run(case, chunk), case.expected().written
    kept = result.states[written].unflatten(0, (-1, *rule.state_shape))
    assert torch.equal(kept, start.expand_as(kept))
    assert result.reads[:query].abs().max() > 0


# Malformed rows


@pytest.mark.parametrize("chunk", [1, SCAN])
@pytest.mark.parametrize(
    ("start", "lengths", "page"),
    [
        pytest.param([0, 2, 6], [2, 8], 10_000, id="page beyond the cache"),
        pytest.param([0, 2, 6], [2, 8], OUTSIDE, id="page far beyond the cache"),
        pytest.param([0, 2, 6], [2, 8], -1, id="negative page"),
        pytest.param([0, 2, 6], [2, 100], 0, id="more blocks than the table holds"),
        pytest.param([0, 2, 6], [2, OUTSIDE], 0, id="far more blocks than the table holds"),
        pytest.param([0, 2, 6], [2, 3], 0, id="more tokens than the sequence"),
        pytest.param([0, 2, 60], [2, 58], 0, id="tokens beyond the projections"),
        pytest.param([0, 2, OUTSIDE], [2, OUTSIDE], 0, id="tokens far beyond the projections"),
        pytest.param([0, 2, 1], [2, 8], 0, id="decreasing starts"),
        pytest.param([0, 2, -9], [2, 8], 0, id="negative stop"),
    ],
)
def test_malformed_rows_are_skipped_and_read_zero(
    start: list[int], lengths: list[int], page: int, chunk: int
) -> None:
    case = Case(DeltaRule(4), [Request(0, 2), Request(4, 4)], block_size=4)
    good = run(case, chunk)
    table = case.table.clone()
    table[1, 1] = page
    batch = Batch(
        table, torch.tensor(start, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    )
    bad = run(case, chunk, batch=batch)
    assert torch.equal(bad.reads[:2], good.reads[:2])
    assert torch.equal(bad.reads[2:], torch.zeros_like(bad.reads[2:]))
    own = case.page(0, 2)
    assert torch.equal(bad.raw[own], good.raw[own])
    bad.raw[own] = case.raw[own]
    assert torch.equal(bad.raw, case.raw)


@pytest.mark.parametrize("chunk", [90, SCAN])
def test_a_bad_page_among_many_is_seen(chunk: int) -> None:
    case = Case(DeltaRule(2), [Request(1, 150), Request(0, 1)], block_size=1)
    table = case.table.clone()
    table[0, 5] = OUTSIDE
    result = run(case, chunk, batch=case.batch._replace(block_table=table))
    assert torch.equal(result.reads, torch.zeros_like(result.reads))
    result.raw[case.page(1, 1)] = case.raw[case.page(1, 1)]
    assert torch.equal(result.raw, case.raw)


def test_a_row_that_hit_blocks_of_a_malformed_one_is_skipped_by_chunks() -> None:
    rows = [Request(8, 3, hits=1), Request(0, 12), Request(4, 4)]
    case = Case(DeltaRule(4), rows, block_size=4)
    table = case.table.clone()
    table[1, 0] = -1
    result = run(case, 2, batch=case.batch._replace(block_table=table))
    assert torch.equal(result.reads[:15], torch.zeros_like(result.reads[:15]))
    assert result.reads[15:19].abs().max() > 0
