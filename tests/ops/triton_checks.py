"""The Triton kernels against the definition, by Triton's interpreter.

`test_triton.py` runs this file in a process of its own: Triton decides when it is imported who runs
its functions, and other tests compile them.
"""

import pytest
import torch
from hypothesis import given, settings

from deltamem_vllm.config import StateUpdateMode
from deltamem_vllm.ops import UPDATE_MODES, Batch, DeltaRule
from deltamem_vllm.ops import triton as triton_ops
from tests.ops.cases import (
    Case,
    Request,
    Result,
    assert_close,
    assert_same,
    cases,
    definition,
    hitting_cases,
    span_cases,
)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True)


def run(case: Case, max_query_len: int | None = None, batch: Batch | None = None) -> Result:
    """The step by Triton, told how many tokens a row has at the most."""
    batch = (batch or case.batch)._replace(max_query_len=max_query_len)
    return case.run(triton_ops.memory_step, batch=batch)


def assert_step_is_right(case: Case) -> None:
    expected = case.run(definition)._replace(written=case.expected().written)
    longest = max((request.query for request in case.requests), default=0)
    for known in {None, longest}:
        assert_same(f"triton, {known}", expected, run(case, known))


@examples(10)
@given(cases())
def test_a_step_is_the_definition_and_touches_nothing_else(case: Case) -> None:
    assert_step_is_right(case)


@examples(12)
@given(hitting_cases())
def test_a_request_may_hit_a_block_that_another_fills_in_the_same_step(case: Case) -> None:
    assert_step_is_right(case)


@examples(10)
@given(span_cases())
def test_a_step_of_spans_is_the_definition_and_touches_nothing_else(case: Case) -> None:
    assert_step_is_right(case)


@pytest.mark.parametrize("ring", [2, 5])
def test_a_chain_of_hits_begins_where_the_step_found_a_state(ring: int) -> None:
    """The last of the chain also runs over a row that goes on in the midst of a block."""
    rows = [Request(24, 1, hits=1), Request(16, 9, hits=2), Request(5, 12)]
    case = Case(DeltaRule(4, 2), rows, block_size=8, ring=ring)
    assert_step_is_right(case)
    assert run(case).reads[0].abs().max() > 0


def test_decodes_take_one_launch_also_when_they_hit() -> None:
    """One row completes a block that another one, with a single token too, begins behind."""
    rows = [Request(8, 1, hits=1), Request(7, 1), Request(30, 1), Request(3, 1, padded=True)]
    case = Case(DeltaRule(8), rows, block_size=8, ring=2)
    expected = case.run(definition)._replace(written=case.expected().written)
    assert_same("one launch", expected, run(case, 1))


def test_a_long_prompt_keeps_its_accuracy() -> None:
    assert_step_is_right(Case(DeltaRule(8), [Request(0, 2000)], block_size=64, ring=2))


@pytest.mark.parametrize("rank", [1, 5, 16, 33, 64])
def test_every_rank_is_right(rank: int) -> None:
    rule = DeltaRule(rank, 2, couple_lambda=False, rankwise_gates=rank % 2 == 0)
    assert_step_is_right(Case(rule, [Request(3, 20), Request(0, 1)], ring=2))


@pytest.mark.parametrize("bias", [-1e30, -60.0, -15.0, 15.0, 60.0, 1e30])
@pytest.mark.parametrize("mode", UPDATE_MODES)
def test_saturated_gates_stay_exact(bias: float, mode: StateUpdateMode) -> None:
    rule = DeltaRule(8, couple_lambda=False, update_mode=mode)
    case = Case(rule, [Request(0, 40)])
    case.gate_bias.fill_(bias)
    case.gate_bias[rule.gate_dim :] = -bias
    assert_step_is_right(case)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-9, 1e-3, 1e4, 1e30])
def test_tiny_and_huge_projections_stay_exact(scale: float) -> None:
    case = Case(DeltaRule(8), [Request(3, 30)])
    case.projections *= scale
    assert_step_is_right(case)


def test_nan_stays_in_its_request() -> None:
    case = Case(DeltaRule(8), [Request(5, 9), Request(5, 9)])
    clean = run(case)
    case.projections[12, 9] = torch.nan
    result = run(case)
    assert torch.equal(result.reads[:9], clean.reads[:9])
    assert result.reads[13:18].isnan().any()
    pages = [case.page(0, count) for count in range(5, 15)]
    assert torch.equal(result.raw[pages], clean.raw[pages])


def test_rows_that_point_outside_are_skipped() -> None:
    case = Case(DeltaRule(4), [Request(0, 2), Request(4, 4)], block_size=4)
    good = run(case)
    for start, lengths, page in (
        ([0, 2, 6], [2, 8], 10_000),
        ([0, 2, 6], [2, 8], -1),
        ([0, 2, 6], [2, 100], 0),
        ([0, 2, 6], [2, 3], 0),
        ([0, 2, 60], [2, 58], 0),
    ):
        table = case.table.clone()
        table[1, 1] = page
        batch = Batch(
            table,
            torch.tensor(start, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
        )
        result = run(case, batch=batch)
        assert_close("reads of the other row", good.reads[:2], result.reads[:2])


@pytest.mark.parametrize("requests", [[], [Request(3, 4, padded=True)], [Request(9, 0)]])
def test_a_step_without_tokens_reads_zero(requests: list[Request]) -> None:
    case = Case(DeltaRule(8), requests)
    result = run(case)
    assert torch.equal(result.reads, torch.zeros_like(result.reads))
    assert torch.equal(result.raw, case.raw)
