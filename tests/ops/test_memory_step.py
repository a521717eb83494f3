"""The fast memory step against the definition, and the definition against an fp64 formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltamem_vllm.ops import (
    READ_FROM,
    UPDATE_MODES,
    WRITE_FROM,
    Batch,
    DeltaRule,
    StatePages,
    memory_step,
    reference,
)
from deltamem_vllm.state.page import NEVER, PageLayout

NAN = float("nan")


def formula(rule: DeltaRule, projections: Tensor, bias: Tensor, state: Tensor) -> tuple:
    """Reads and final state of one sequence, in fp64 einsums that share nothing with `ops`."""
    heads, rank, width = rule.num_heads, rule.rank, rule.read_dim
    p, b = projections.double(), bias.double()
    q, k, v = (p[:, i * width : (i + 1) * width].reshape(-1, heads, rank) for i in range(3))
    if rule.normalize_qk:
        q, k = q.tanh(), k.tanh()
        q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    gates = 1 / (1 + torch.exp(-(p[:, 3 * width :] + b)))
    per_head = gates.shape[1] // heads // (1 if rule.couple_lambda else 2)
    beta = gates[:, : heads * per_head].reshape(-1, heads, per_head).expand(-1, heads, rank)
    lam = 1 - beta
    if not rule.couple_lambda:
        lam = gates[:, heads * per_head :].reshape(-1, heads, per_head).expand(-1, heads, rank)
    keep = torch.ones_like(lam) if rule.update_mode == "no_lambda" else lam
    erase = lam * beta if rule.update_mode == "lambda_outside" else beta
    s, reads = state.double(), []
    for t in range(len(p)):
        reads.append(torch.einsum("hij,hj->hi", s, q[t]).reshape(-1))
        old = torch.einsum("hij,hj->hi", s, k[t])
        s = (
            keep[t][..., None] * s
            - torch.einsum("hi,hj->hij", erase[t] * old, k[t])
            + torch.einsum("hi,hj->hij", beta[t] * v[t], k[t])
        )
    return torch.stack(reads), s


def assert_close(name: str, expected: Tensor, actual: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (expected.double() - actual.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{name}: error {error} at scale {scale}"


rules = st.builds(
    DeltaRule,
    rank=st.one_of(st.integers(1, 12), st.sampled_from([16, 33, 64])),
    num_heads=st.integers(1, 4),
    normalize_qk=st.booleans(),
    couple_lambda=st.booleans(),
    rankwise_gates=st.booleans(),
    update_mode=st.sampled_from(UPDATE_MODES),
)


class Case:
    """Requests with contexts and queries on permuted pages; everything not theirs is NaN."""

    def __init__(self, rule, lengths, block_size, ring, thresholds, initialised, seed):
        g = torch.Generator().manual_seed(seed)
        self.rule, self.block_size, self.initialised = rule, block_size, initialised
        blocks = [-(-(before + query) // block_size) for before, query in lengths]
        num_blocks, width = sum(blocks) + 3, max([*blocks, 1]) + 2
        layout = PageLayout(rule.state_shape, ring)
        raw = torch.full((num_blocks, layout.page_words + 16), NAN)
        self.pages = layout.views(raw.view(torch.uint8)[:, : layout.page_bytes + 32])
        self.pages.header.fill_(-12345)
        order = iter(torch.randperm(num_blocks, generator=g).tolist())
        wide = torch.full((len(lengths), width + 5), -1, dtype=torch.int32)
        self.table = wide[:, :width]
        for row, count in enumerate(blocks):
            self.table[row, :count] = torch.tensor([next(order) for _ in range(count)])
        self.start = []
        for row, (before, query) in enumerate(lengths):
            state = torch.zeros(rule.state_shape)
            if query and (before or initialised):
                state = torch.randn(rule.state_shape, generator=g) * 0.3
                page = self.table[row, max(before - 1, 0) // block_size]
                self.pages.states[page, before % ring] = state
                self.pages.header[page] = 0
                self.pages.header[page, READ_FROM], self.pages.header[page, WRITE_FROM] = thresholds
            self.start.append(state)
        queries = [query for _, query in lengths]
        total = sum(queries)
        columns = torch.full((total + 3, rule.projection_dim + 7), NAN)
        scale = 0.5 if not rule.normalize_qk else 1.5
        columns[:total] = torch.randn(total, rule.projection_dim + 7, generator=g) * scale
        self.projections = columns[:, : rule.projection_dim]
        if not rule.normalize_qk:
            self.projections *= 1 / rule.rank**0.5
        self.bias = torch.randn(rule.gate_bias_dim, generator=g)
        ends = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
        seq_lens = [before + query if query else 0 for before, query in lengths]
        self.batch = Batch(self.table, ends, torch.tensor(seq_lens, dtype=torch.int32))

    def run(self, step) -> tuple[Tensor, StatePages]:
        pages = StatePages(self.pages.header.clone(), self.pages.states.clone())
        reads = torch.full((len(self.projections), self.rule.read_dim), NAN)
        step(
            self.rule,
            self.projections,
            self.bias,
            pages,
            self.batch,
            reads,
            block_size=self.block_size,
            pages_are_initialised=self.initialised,
        )
        return reads, pages


def fast(rule, projections, bias, pages, batch, reads, **options) -> None:
    memory_step(rule, projections, bias, pages, batch, out=reads, **options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rule=rules,
    lengths=st.lists(
        st.tuples(st.one_of(st.just(0), st.integers(1, 70)), st.integers(0, 90)),
        min_size=1,
        max_size=6,
    ),
    block_size=st.integers(1, 40),
    ring=st.integers(1, 4),
    thresholds=st.tuples(st.sampled_from([0, 5, 40, NEVER]), st.sampled_from([0, 7, 50, NEVER])),
    initialised=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_fast_step_is_the_definition(
    rule, lengths, block_size, ring, thresholds, initialised, seed
) -> None:
    case = Case(rule, lengths, block_size, ring, thresholds, initialised, seed)
    expected_reads, expected = case.run(reference.memory_step)
    reads, pages = case.run(fast)
    assert_close("reads", expected_reads, reads)
    assert torch.equal(pages.header, expected.header)
    untouched = expected.states.isnan()
    assert torch.equal(pages.states.isnan(), untouched)
    assert_close("states", expected.states[~untouched], pages.states[~untouched])
    total = int(case.batch.query_start_loc[-1])
    assert (reads[total:] == 0).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rule=rules, length=st.integers(1, 120), seed=st.integers(0, 10_000))
def test_definition_is_the_formula(rule: DeltaRule, length: int, seed: int) -> None:
    case = Case(rule, [(1, length)], 16, 1, (0, 0), True, seed)
    projections = case.projections[:length]
    scan = reference.delta_rule_scan(rule, projections, case.bias, case.start[0])
    reads, state = formula(rule, projections, case.bias, case.start[0])
    assert_close("reads", reads, scan.reads)
    assert_close("state", state, scan.states[-1])


@pytest.mark.parametrize("chunks", [[1200], [1] * 40 + [1160], [37] * 32 + [16], [600, 600]])
def test_state_is_independent_of_chunks(chunks: list[int]) -> None:
    rule, block_size = DeltaRule(8, 2), 16
    whole = Case(rule, [(0, 1200)], block_size, 1, (0, 0), False, 3)
    reads, _ = whole.run(fast)
    expected, state = formula(
        rule, whole.projections[:1200], whole.bias, torch.zeros(rule.state_shape)
    )
    pages = StatePages(whole.pages.header.clone(), whole.pages.states.clone())
    done = 0
    for chunk in chunks:
        part = memory_step(
            rule,
            whole.projections[done : done + chunk],
            whole.bias,
            pages,
            Batch(
                whole.table,
                torch.tensor([0, chunk], dtype=torch.int32),
                torch.tensor([done + chunk], dtype=torch.int32),
            ),
            block_size=block_size,
            pages_are_initialised=False,
        )
        assert_close("reads", expected[done : done + chunk], part)
        assert_close("chunked reads", reads[done : done + chunk], part, 1e-6)
        done += chunk
    last = int(whole.table[0, (1200 - 1) // block_size])
    assert_close("state", state, pages.states[last, 0])


@pytest.mark.parametrize("bias", [-60.0, -15.0, 15.0, 60.0])
@pytest.mark.parametrize("mode", UPDATE_MODES)
def test_saturated_gates_stay_exact(bias: float, mode) -> None:
    rule = DeltaRule(8, 1, update_mode=mode)
    case = Case(rule, [(0, 200)], 64, 1, (0, 0), False, 5)
    case.bias.fill_(bias)
    reads, _ = case.run(fast)
    expected, _ = formula(rule, case.projections[:200], case.bias, torch.zeros(rule.state_shape))
    assert_close("reads", expected, reads[:200])


def test_read_only_leaves_the_state_bit_identical_and_off_reads_zero() -> None:
    rule = DeltaRule(8, 2)
    only = Case(rule, [(0, 100)], 16, 1, (0, NEVER), True, 7)
    reads, pages = only.run(fast)
    for block in only.table[0, :7]:
        assert torch.equal(pages.states[int(block), 0], only.start[0])
    assert reads[:100].abs().max() > 0
    off = Case(rule, [(0, 100)], 16, 1, (NEVER, NEVER), True, 7)
    reads, _ = off.run(fast)
    assert (reads[:100] == 0).all()


def test_a_request_may_hit_a_block_that_another_fills_in_the_same_step() -> None:
    rule, block_size = DeltaRule(4, 1), 8
    case = Case(rule, [(0, 8), (0, 20)], block_size, 1, (0, 0), False, 11)
    # The first row continues behind the second row's first block, as after a prefix-cache hit.
    table = case.table.clone()
    table[0, 1], table[0, 0] = table[0, 0].item(), table[1, 0]
    batch = Batch(table, case.batch.query_start_loc, torch.tensor([16, 20], dtype=torch.int32))
    pages = StatePages(case.pages.header.clone(), case.pages.states.clone())
    reads = memory_step(
        rule,
        case.projections,
        case.bias,
        pages,
        batch,
        block_size=block_size,
        pages_are_initialised=False,
    )
    zero = torch.zeros(rule.state_shape)
    _, boundary = formula(rule, case.projections[8:16], case.bias, zero)
    expected, _ = formula(rule, case.projections[:8], case.bias, boundary)
    assert_close("reads", expected, reads[:8])


def test_malformed_rows_are_refused_before_anything_is_written() -> None:
    rule = DeltaRule(4, 1)
    case = Case(rule, [(0, 8)], 4, 1, (0, 0), False, 1)
    table = case.table.clone()
    table[0, 1] = 10_000
    case.batch = case.batch._replace(block_table=table)
    before = case.pages.states.clone()
    pages = StatePages(case.pages.header.clone(), before.clone())
    with pytest.raises(ValueError, match="row 0"):
        memory_step(
            rule,
            case.projections,
            case.bias,
            pages,
            case.batch,
            block_size=4,
            pages_are_initialised=False,
        )
    assert torch.equal(pages.states.isnan(), before.isnan())


def test_wrong_dtypes_and_shapes_are_named() -> None:
    rule = DeltaRule(4, 1)
    case = Case(rule, [(0, 8)], 4, 1, (0, 0), False, 1)
    options = {"block_size": 4, "pages_are_initialised": False}
    with pytest.raises(ValueError, match="projections"):
        memory_step(rule, case.projections.double(), case.bias, case.pages, case.batch, **options)
    with pytest.raises(ValueError, match="gate_bias"):
        memory_step(rule, case.projections, case.bias[:-1], case.pages, case.batch, **options)
