"""The kernel against the definition, and the definition against the formula in fp64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.config import StateUpdateMode
from deltamem_vllm.ops import (
    STARTS_AT,
    UPDATE_MODES,
    Batch,
    DeltaRule,
    StatePages,
    delta_rule_scan,
    memory_step,
)
from deltamem_vllm.state.page import thresholds
from tests.ops.cases import (
    Case,
    Request,
    Result,
    assert_close,
    assert_same,
    block_sizes,
    cases,
    definition,
    formula,
    hitting_cases,
    kernel,
    lone_cases,
    rings,
    rules,
    seeds,
    small_rules,
    span_cases,
    span_requests,
)

TIGHT = 1e-6
"""Between two runs of the kernel over the same tokens."""


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True)


def assert_step_is_right(case: Case) -> None:
    expected = case.expected()
    defined = case.run(definition)
    assert_same("definition", expected, defined)
    # Whoever checks the kernel knows from the formula which words it had to write.
    defined = defined._replace(written=expected.written)
    assert_same("kernel", defined, case.run(kernel))


@examples(100)
@given(cases())
def test_a_step_is_the_formula_and_touches_nothing_else(case: Case) -> None:
    assert_step_is_right(case)


@examples(40)
@given(hitting_cases())
def test_a_request_may_hit_a_block_that_another_fills_in_the_same_step(case: Case) -> None:
    assert_step_is_right(case)


@examples(80)
@given(span_cases())
def test_a_step_of_spans_is_the_formula_and_touches_nothing_else(case: Case) -> None:
    assert_step_is_right(case)


def test_a_chain_of_hits_runs_in_the_order_of_the_sequence() -> None:
    rows = [Request(16, 5, hits=1), Request(8, 8, hits=2), Request(0, 20)]
    case = Case(DeltaRule(4), rows, block_size=8)
    assert_step_is_right(case)
    # Row 0 did read what row 1 wrote, which started from what row 2 wrote.
    assert case.run(kernel).reads[:5].abs().max() > 0


@examples(60)
@given(lone_cases())
def test_a_row_may_start_from_its_own_page_behind_blocks_of_another(case: Case) -> None:
    assert_step_is_right(case)


@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize("query", [1, 5, 20])
def test_rows_that_start_alone_at_one_shared_block_stay_apart(ring: int, query: int) -> None:
    """Among them rows that hit the same block, which is filled in this step, and go on from it; and
    one whose prompt is written by spans behind the block."""
    rows = [
        Request(8, query, read_from=8 + query // 2, hits=3, alone=True),
        Request(8, query, read_from=9, hits=3, alone=True, write_until=10, span_end=40,
                spans=((10, 12), (12, 40))),
        Request(8, query, hits=3),
        Request(0, 8, read_from=3),
        Request(8, 1),
        Request(8 + 8 * (query >= 8), 2, hits=0 if query >= 8 else 3),
    ]  # fmt: skip
    case = Case(DeltaRule(4, 2), rows, block_size=8, ring=ring, initialised=True, with_spans=True)
    assert_step_is_right(case)


def test_a_word_that_names_another_position_starts_no_row() -> None:
    case = Case(DeltaRule(4), [Request(8, 3), Request(7, 2)], block_size=8, initialised=True)
    pages = case.layout.views(case.raw)
    pages.header[case.page(0, 9), STARTS_AT] = 16
    pages.header[case.page(1, 9), STARTS_AT] = 8  # its first position is before the block
    assert_step_is_right(case)


def test_pages_that_nobody_initialises_start_no_row() -> None:
    case = Case(DeltaRule(4), [Request(8, 3)], block_size=8)
    case.layout.views(case.raw).header[case.page(0, 9), STARTS_AT] = 8
    assert_step_is_right(case)


def test_positions_before_the_first_that_reads_write_nothing() -> None:
    case = Case(DeltaRule(4), [Request(0, 9, 6, 0, 8)], block_size=4, initialised=True)
    state = case.layout.views(case.raw).states[case.page(0, 0), 0].clone()
    states = case.states(case.run(kernel))
    assert torch.equal(states[case.page(0, 4), 0], state)
    assert not torch.equal(states[case.page(0, 8), 0], state)
    assert_step_is_right(case)


# One sequence in several steps


def run_in_steps(case: Case, cuts: list[int]) -> Result:
    """The only request of `case`, its tokens cut into steps at `cuts`."""
    (request,) = case.requests
    raw, reads = case.raw.clone(), []
    for first, last in pairwise([0, *cuts, request.query]):
        batch = Batch(
            case.table,
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([request.context + last], dtype=torch.int32),
        )
        part = case.run(kernel, raw=raw, projections=case.projections[first:last], batch=batch)
        reads.append(part.reads)
    return part._replace(reads=torch.cat(reads))


@examples(40)
@given(
    rule=small_rules,
    context=st.sampled_from([0, 1, 7, 64]),
    query=st.integers(1, 300),
    cuts=st.sets(st.integers(1, 299), max_size=40),
    block_size=block_sizes,
    ring=rings,
    seed=seeds,
)
def test_reads_and_states_are_independent_of_chunks(
    rule: DeltaRule,
    context: int,
    query: int,
    cuts: set[int],
    block_size: int,
    ring: int,
    seed: int,
) -> None:
    case = Case(rule, [Request(context, query)], block_size=block_size, ring=ring, seed=seed)
    whole, written = case.run(kernel), case.expected().written
    parts = run_in_steps(case, sorted(cut for cut in cuts if cut < query))
    assert_close("reads", whole.reads[:query], parts.reads, TIGHT)
    assert_close("states", whole.states[written], parts.states[written], TIGHT)


@examples(40)
@given(
    rule=small_rules,
    request_=span_requests(),
    cuts=st.sets(st.integers(1, 199), max_size=20),
    block_size=block_sizes,
    ring=rings,
    seed=seeds,
)
def test_spans_are_independent_of_chunks(
    rule: DeltaRule, request_: Request, cuts: set[int], block_size: int, ring: int, seed: int
) -> None:
    case = Case(
        rule,
        [request_],
        block_size=block_size,
        ring=ring,
        initialised=True,
        with_spans=True,
        seed=seed,
    )
    whole, written = case.run(kernel), case.expected().written
    parts = run_in_steps(case, sorted(cut for cut in cuts if cut < request_.query))
    assert_close("reads", whole.reads[: request_.query], parts.reads, TIGHT)
    assert_close("states and sums", whole.states[written], parts.states[written], TIGHT)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("mode", UPDATE_MODES)
def test_rounding_errors_do_not_grow_over_a_long_sequence(
    heads: int, mode: StateUpdateMode
) -> None:
    tokens = 3000
    case = Case(DeltaRule(8, heads, update_mode=mode), [Request(0, tokens)], seed=heads)
    expected = case.expected()
    assert_same("whole", expected, case.run(kernel))
    decoded = run_in_steps(case, [*range(1, 200), *range(200, tokens, 97)])
    assert_close("cut", expected.reads[:tokens], decoded.reads)
    assert_close("cut", expected.states[expected.written], decoded.states[expected.written])


@examples(30)
@given(
    rule=small_rules,
    context=st.integers(0, 20),
    drafted=st.integers(1, 3),
    rejected=st.integers(1, 3),
    block_size=st.integers(1, 8),
    seed=seeds,
)
def test_a_step_may_start_from_any_state_in_the_ring(
    rule: DeltaRule, context: int, drafted: int, rejected: int, block_size: int, seed: int
) -> None:
    accepted = 1 + max(drafted - rejected, 0)
    request = Request(context, 1 + drafted + 4)
    case = Case(rule, [request], block_size=block_size, ring=drafted + 1, seed=seed)
    raw, first = case.raw.clone(), slice(0, 1 + drafted)
    second = slice(1 + drafted, 1 + drafted + 3)
    for tokens, before in ((first, context), (second, context + accepted)):
        batch = Batch(
            case.table,
            torch.tensor([0, tokens.stop - tokens.start], dtype=torch.int32),
            torch.tensor([before + tokens.stop - tokens.start], dtype=torch.int32),
        )
        result = case.run(kernel, raw=raw, projections=case.projections[tokens], batch=batch)
    state = torch.zeros(rule.state_shape)
    if context:
        page = case.page(0, context)
        state = case.layout.views(case.raw).states[page, context % case.ring]
    rows = torch.cat([case.projections[:accepted], case.projections[second]])
    expected = formula(rule, rows, case.gate_bias, state)
    assert_close("reads", expected.reads[accepted:], result.reads)
    count = context + accepted + 3
    last = case.states(result)[case.page(0, count), count % case.ring]
    assert_close("state", expected.states[-1], last)


# Neighbours


@pytest.mark.parametrize("rule", [DeltaRule(8), DeltaRule(5, 3, rankwise_gates=False)])
@pytest.mark.parametrize("count", [2, 64, 200])
def test_a_batch_gives_each_request_what_it_gets_alone(rule: DeltaRule, count: int) -> None:
    rows = [
        Request(7 * i % 60, 1 if i % 5 else 1 + i % 40, padded=i % 11 == 10) for i in range(count)
    ]
    case = Case(rule, rows, ring=2, seed=count)
    expected, together = case.expected(), case.run(kernel)
    assert_same("batch", expected, together)
    for row, request in enumerate(rows):
        tokens = case.tokens(row)
        batch = Batch(
            case.table[row : row + 1],
            torch.tensor([0, request.query], dtype=torch.int32),
            case.batch.seq_lens[row : row + 1],
        )
        alone = case.run(kernel, projections=case.projections[tokens], batch=batch)
        assert_close("reads", alone.reads, together.reads[tokens], TIGHT)
        own = (alone.raw != case.raw) & expected.written
        assert_close("states", alone.states[own], together.states[own], TIGHT)


@pytest.mark.parametrize("requests", [[], [Request(3, 4, padded=True)], [Request(9, 0)]])
def test_a_step_without_tokens_reads_zero(requests: list[Request]) -> None:
    assert_step_is_right(Case(DeltaRule(8), requests))


def test_a_step_may_have_no_token_rows_at_all() -> None:
    case = Case(DeltaRule(8), [Request(9, 0)])
    result = case.run(kernel, projections=case.projections[:0])
    assert result.reads.shape == (0, 8)
    assert torch.equal(result.raw, case.raw)


@examples(60)
@given(
    rule=rules,
    queries=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    where=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=8),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    seed=seeds,
)
def test_nan_and_infinity_stay_in_their_request(
    rule: DeltaRule, queries: list[int], where: list[tuple[int, int]], value: float, seed: int
) -> None:
    case = Case(rule, [Request(5, query) for query in queries], seed=seed)
    clean = case.run(kernel)
    ill = seed % len(queries)
    tokens = case.tokens(ill)
    for token, column in where:
        row = tokens.start + token % queries[ill]
        case.projections[row, column % rule.projection_dim] = value
    result, defined = case.run(kernel), case.run(definition)
    assert torch.equal(result.reads[tokens].isnan(), defined.reads[tokens].isnan())
    result.reads[tokens] = clean.reads[tokens]
    assert torch.equal(result.reads, clean.reads)
    pages = [case.page(ill, count) for count in range(5, 5 + queries[ill] + 1)]
    result.raw[pages] = clean.raw[pages]
    assert torch.equal(result.raw, clean.raw)


# Extreme inputs


@pytest.mark.parametrize("bias", [-1e30, -100.0, -60.0, -15.0, 15.0, 60.0, 100.0, 1e30])
@pytest.mark.parametrize("mode", UPDATE_MODES)
@pytest.mark.parametrize("couple_lambda", [True, False])
def test_saturated_gates_stay_exact(
    bias: float, mode: StateUpdateMode, couple_lambda: bool
) -> None:
    rule = DeltaRule(8, 2, couple_lambda=couple_lambda, update_mode=mode)
    case = Case(rule, [Request(0, 200)])
    case.gate_bias.fill_(bias)
    if not couple_lambda:
        case.gate_bias[rule.gate_dim :] = -bias
    assert_step_is_right(case)


@examples(40)
@given(rule=small_rules, scale=st.sampled_from([0.0, 1e-38, 1e-9, 1e-3, 1e4, 1e30]), seed=seeds)
def test_tiny_and_huge_projections_stay_exact(rule: DeltaRule, scale: float, seed: int) -> None:
    case = Case(rule, [Request(3, 60)], seed=seed)
    if rule.normalize_qk:
        case.projections *= scale
    else:
        case.projections[:, 2 * rule.read_dim :] *= scale
    assert_step_is_right(case)


# Modes


@examples(20)
@given(rule=rules, query=st.integers(1, 90), context=st.integers(0, 40), ring=rings, seed=seeds)
def test_read_only_leaves_the_state_bit_identical(
    rule: DeltaRule, query: int, context: int, ring: int, seed: int
) -> None:
    request = Request(context, query, *thresholds("read_only"))
    case = Case(rule, [request], ring=ring, initialised=True, seed=seed)
    start = case.layout.views(case.raw).states[case.page(0, context), context % ring]
    result, written = case.run(kernel), case.expected().written
    kept = result.states[written].unflatten(0, (-1, *rule.state_shape))
    assert torch.equal(kept, start.expand_as(kept))
    assert result.reads[:query].abs().max() > 0


@examples(20)
@given(rule=rules, query=st.integers(1, 90), context=st.integers(0, 40), seed=seeds)
def test_off_reads_exactly_zero_and_leaves_the_state(
    rule: DeltaRule, query: int, context: int, seed: int
) -> None:
    case = Case(rule, [Request(context, query, *thresholds("off"))], initialised=True, seed=seed)
    start = case.layout.views(case.raw).states[case.page(0, context), 0]
    result, written = case.run(kernel), case.expected().written
    assert torch.equal(result.reads, torch.zeros_like(result.reads))
    kept = result.states[written].unflatten(0, (-1, *rule.state_shape))
    assert torch.equal(kept, start.expand_as(kept))


# The definition alone


def test_a_scan_of_no_tokens_gives_nothing_and_changes_no_state() -> None:
    rule = DeltaRule(4, 2)
    state = torch.ones(rule.state_shape)
    scan = delta_rule_scan(
        rule, torch.zeros(0, rule.projection_dim), torch.zeros(rule.gate_bias_dim), state
    )
    assert scan.reads.shape == (0, rule.read_dim)
    assert scan.states.shape == (0, *rule.state_shape)
    assert torch.equal(state, torch.ones(rule.state_shape))


def test_the_definition_is_differentiable() -> None:
    rule = DeltaRule(2, 2, couple_lambda=False)
    random = torch.Generator().manual_seed(0)
    shapes = ((3, rule.projection_dim), (rule.gate_bias_dim,), rule.state_shape)
    leaves = [
        torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    assert torch.autograd.gradcheck(lambda *x: tuple(delta_rule_scan(rule, *x)), leaves)


# Refusals


@pytest.mark.parametrize(
    ("start", "lengths", "page"),
    [
        pytest.param([0, 2, 6], [2, 8], 10_000, id="page beyond the cache"),
        pytest.param([0, 2, 6], [2, 8], -1, id="negative page"),
        pytest.param([0, 2, 6], [2, 100], 0, id="more blocks than the table holds"),
        pytest.param([0, 2, 6], [2, 3], 0, id="more tokens than the sequence"),
        pytest.param([0, 2, 60], [2, 58], 0, id="tokens beyond the projections"),
        pytest.param([0, 2, 1], [2, 8], 0, id="decreasing starts"),
    ],
)
def test_malformed_rows_are_refused_before_anything_is_written(
    start: list[int], lengths: list[int], page: int
) -> None:
    case = Case(DeltaRule(4), [Request(0, 2), Request(4, 4)], block_size=4)
    table = case.table.clone()
    table[1, 1] = page
    batch = Batch(
        table, torch.tensor(start, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    )
    raw, reads = case.raw.clone(), torch.full((len(case.projections), 4), 7.0)
    with pytest.raises(ValueError, match="row 1"):
        memory_step(
            case.rule,
            case.projections,
            case.gate_bias,
            case.layout.views(raw),
            batch,
            block_size=4,
            pages_are_initialised=False,
            out=reads,
        )
    assert torch.equal(raw, case.raw)
    assert (reads == 7).all()


def test_a_negative_start_is_refused() -> None:
    case = Case(DeltaRule(4), [Request(0, 2)])
    start = torch.tensor([-1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="row 0"):
        case.run(kernel, batch=case.batch._replace(query_start_loc=start))


WRONG = {
    "projections": lambda x: [x.double(), x[:, :-1], x[0]],
    "gate_bias": lambda x: [x.double(), x[:-1], x[None]],
    "header": lambda x: [x.long(), x[:-1], x[:, :1]],
    "states": lambda x: [x.half(), x[..., :-1], x[:, 0]],
    "block_table": lambda x: [x.long(), x[:-1], x[0]],
    "query_start_loc": lambda x: [x.long(), x[:-1]],
    "seq_lens": lambda x: [x.long(), x[:-1]],
    "out": lambda x: [x.double(), x[:-1], x[:, :-1]],
}
OVERLAPPING = {
    "projections": lambda x: [x[:1].expand_as(x), x.T.contiguous().T],
    "gate_bias": lambda x: [x[:1].expand_as(x)],
    "header": lambda x: [x[:1].expand_as(x)],
    "states": lambda x: [x[:1].expand_as(x), x.transpose(3, 4)],
    "block_table": lambda x: [x[:1].expand_as(x), x.T.contiguous().T],
    "query_start_loc": lambda x: [x[:1].expand_as(x)],
    "out": lambda x: [x[:1].expand_as(x), torch.cat([x, x], dim=1)[:, : x.shape[1]]],
}


def run_with(name: str, change) -> None:
    """Call `memory_step`, once with each variant of one of its tensors."""
    case = Case(DeltaRule(4), [Request(0, 8), Request(0, 3)], ring=2)
    tensors = {
        "projections": case.projections,
        "gate_bias": case.gate_bias,
        **case.layout.views(case.raw)._asdict(),
        **case.batch._asdict(),
        "out": torch.zeros(len(case.projections), case.rule.read_dim),
    }
    for variant in change(tensors[name]):
        given = {**tensors, name: variant}
        memory_step(
            case.rule,
            given["projections"],
            given["gate_bias"],
            StatePages(given["header"], given["states"]),
            Batch(given["block_table"], given["query_start_loc"], given["seq_lens"]),
            block_size=16,
            pages_are_initialised=False,
            out=given["out"],
        )


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("variant", range(3))
def test_wrong_dtypes_and_shapes_are_refused_by_name(name: str, variant: int) -> None:
    # Fewer rows of one tensor look like more rows of another: the message may name that one.
    named = {"out": "out", "seq_lens": "batch", "states": "pages", "header": "pages"}.get(
        name, name
    )
    with pytest.raises(ValueError, match=named):
        run_with(name, lambda x: WRONG[name](x)[variant : variant + 1] or WRONG[name](x)[:1])


@pytest.mark.parametrize("name", OVERLAPPING)
@pytest.mark.parametrize("variant", [0, -1])
def test_layouts_that_the_kernel_cannot_address_are_refused(name: str, variant: int) -> None:
    with pytest.raises(ValueError, match="strides"):
        run_with(name, lambda x: [OVERLAPPING[name](x)[variant]])


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("rank", 65), ("num_heads", 0), ("update_mode", "lambda")]
)
def test_a_rule_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        DeltaRule(**{"rank": 8, field: value})
