"""What CPUs do in one call with the step: projections, corrections, norms; alone, as a team."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from deltamem_vllm.ops import DeltaRule, bind_batch, bind_correction, bind_step, cpu
from deltamem_vllm.ops.cpu import compiler
from tests.ops.cases import (
    Case,
    Request,
    Result,
    assert_close,
    assert_same,
    cases,
    hitting_cases,
    kernel,
    span_cases,
)

DTYPES = [torch.float32, torch.bfloat16]
RULES = [DeltaRule(8), DeltaRule(8, 4), DeltaRule(5, 2), DeltaRule(33), DeltaRule(1)]
REQUESTS = [Request(5, 1), Request(0, 33), Request(64, 40), Request(7, 1), Request(9, 3)]

TWO_BLOCKS = 1040
"""A size of hidden states whose products are summed up in three parts, the last one short."""

CORRECTED = 48
"""Columns that are corrected, of 64."""


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every step is run by three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(cpu, "TEAM_TOKENS", 1)
    yield
    torch.set_num_threads(before)


class Fused:
    """A case whose projections are made of hidden states, and whose reads correct a base."""

    def __init__(self, rule: DeltaRule, dtype: torch.dtype, hidden: int = TWO_BLOCKS) -> None:
        self.case = Case(rule, REQUESTS, ring=2, seed=1)
        tokens = len(self.case.projections)
        # Rows lie apart, as those of a slice do.
        self.hidden = numbers(tokens, hidden + 16, seed=2, dtype=dtype)[:, :hidden]
        self.projection = 0.05 * numbers(rule.projection_dim, hidden, seed=3)
        self.delta = numbers(CORRECTED, rule.read_dim, seed=4)
        self.base = numbers(tokens, 64, seed=5, dtype=dtype)

    def run(self) -> tuple[Result, Tensor]:
        """What a step leaves behind, and the corrected base."""
        base = self.base.clone()

        def step(rule, _, bias, pages, batch, reads, **options) -> None:
            correction = bind_correction(self.delta, base.dtype)
            bound = bind_step(
                rule, bias, pages, projection=self.projection, correction=correction, **options
            )
            bound(self.hidden, bind_batch(batch), reads, base)

        return self.case.run(step), base

    def assert_right(self) -> None:
        result, base = self.run()
        exact = (self.hidden.double() @ self.projection.double().t()).float()
        expected = self.case.run(kernel, projections=exact)
        written = self.case.expected().written
        assert torch.equal(expected.raw[~written], result.raw[~written])
        assert_close("reads", expected.reads, result.reads, 2e-5)
        assert_close("states", expected.states[written], result.states[written], 2e-5)
        corrected = self.base[:, :CORRECTED].double()
        corrected = corrected + result.reads.double() @ self.delta.double().t()
        # Rounded once: to the nearest number, unless fp32 cannot tell which of two is nearer.
        nearest = (corrected.to(base.dtype).double() - corrected).abs()
        error = (base[:, :CORRECTED].double() - corrected).abs()
        assert (error <= nearest + 1e-5 * (1 + corrected.abs())).all()
        assert torch.equal(base[:, CORRECTED:], self.base[:, CORRECTED:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_hidden_states_are_projected_and_the_base_is_corrected(
    rule: DeltaRule, dtype: torch.dtype
) -> None:
    Fused(rule, dtype).assert_right()


@pytest.mark.parametrize("hidden", [16, 20, 512, 528])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_any_size_and_dtype_of_hidden_states_will_do(hidden: int, dtype: torch.dtype) -> None:
    fused = Fused(DeltaRule(8), dtype, hidden)
    if dtype is torch.float16:
        assert bind_correction(fused.delta, dtype) is None
        fused.base = fused.base.float()
    fused.assert_right()


def test_weights_that_bf16_holds_exactly_are_kept_in_it() -> None:
    fused = Fused(DeltaRule(8), torch.bfloat16)
    plain, plain_base = fused.run()
    fused.projection, fused.delta = (
        fused.projection.bfloat16().float(),
        fused.delta.bfloat16().float(),
    )
    fused.assert_right()
    halves, halves_base = fused.run()
    assert not torch.equal(plain.reads, halves.reads)
    assert not torch.equal(plain_base, halves_base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_bits_whoever_its_neighbours_are(dtype: torch.dtype) -> None:
    rule = DeltaRule(8)
    fused = Fused(rule, dtype)
    together, together_base = fused.run()
    correction = bind_correction(fused.delta, dtype)
    assert correction is not None
    starts = fused.case.batch.query_start_loc.tolist()
    for row, (start, stop) in enumerate(pairwise(starts)):
        raw = fused.case.raw.clone()
        batch = fused.case.batch._replace(
            block_table=fused.case.table[row : row + 1],
            query_start_loc=torch.tensor([0, stop - start], dtype=torch.int32),
            seq_lens=fused.case.batch.seq_lens[row : row + 1],
        )
        step = bind_step(
            rule,
            fused.case.gate_bias,
            fused.case.layout.views(raw),
            block_size=fused.case.block_size,
            pages_are_initialised=False,
            projection=fused.projection,
            correction=correction,
        )
        reads, base = torch.empty(stop - start, rule.read_dim), fused.base[start:stop].clone()
        step(fused.hidden[start:stop], bind_batch(batch), reads, base)
        assert torch.equal(reads, together.reads[start:stop])
        assert torch.equal(base, together_base[start:stop])


def test_nan_and_infinity_come_through_a_bf16_correction() -> None:
    base = torch.tensor([[torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 0.0] + [1.0] * 10])
    base = base.bfloat16()
    correction = bind_correction(torch.full((16, 8), 1e37), torch.bfloat16)
    assert correction is not None
    corrected = base.clone()
    correction(corrected, torch.ones(1, 8))
    expected = (base.float() + 8e37).bfloat16()
    assert torch.equal(corrected.isnan(), expected.isnan())
    assert torch.equal(corrected.nan_to_num(7), expected.nan_to_num(7))


def test_a_bf16_sum_half_way_between_two_numbers_becomes_the_even_one() -> None:
    correction = bind_correction(torch.full((16, 8), 2.0**-11), torch.bfloat16)
    assert correction is not None
    # Numbers near 1 are 2^-7 apart.
    base = torch.tensor([[1 + i * 2.0**-7 for i in range(16)]]).bfloat16()
    expected = (base.float() + 2.0**-8).bfloat16()
    assert not torch.equal(expected, base)
    correction(base, torch.ones(1, 8))
    assert torch.equal(base, expected)


def test_rounding_errors_do_not_grow_with_the_size_of_hidden_states() -> None:
    fused = Fused(DeltaRule(8), torch.float32, hidden=16384)
    fused.hidden, fused.projection = fused.hidden.abs(), fused.projection.abs() * 2.0**-10
    fused.assert_right()


def test_columns_before_the_first_corrected_one_stay_whatever_is_read() -> None:
    correction = bind_correction(torch.ones(16, 8), torch.float32, first=32)
    assert correction is not None
    base = numbers(2, 64, seed=1)
    expected = base.clone()
    expected[0, 32:48] = torch.inf
    expected[1, 32:48] += 8
    reads = torch.ones(2, 8)
    reads[0] = torch.inf
    correction(base, reads)
    assert_close("base", expected[1:], base[1:])
    assert torch.equal(expected[0], base[0])


def test_what_compiled_code_would_misread_is_refused() -> None:
    correction = bind_correction(torch.ones(16, 8), torch.bfloat16)
    assert correction is not None
    for base in (
        torch.ones(1, 16),
        torch.ones(1, 8).bfloat16(),
        torch.ones(16, 2).bfloat16().t(),
    ):
        with pytest.raises(TypeError, match=r"expected rows of torch.bfloat16, 16 at least, got"):
            correction(base, torch.ones(len(base), 8))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_and_device_of_torch_do_not_matter(default: torch.dtype) -> None:
    fused = Fused(DeltaRule(8), torch.float32)
    expected, expected_base = fused.run()
    delta, dtype = fused.delta, fused.base.dtype
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        assert cpu._Scratch().at(1000) and bind_correction(delta, dtype) is not None
        torch.set_default_device(None)
        scratch = cpu._Scratch()
        scratch.at(1000)
        assert scratch.words.numel() * scratch.words.element_size() >= 4000
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    result, base = fused.run()
    assert torch.equal(result.reads, expected.reads) and torch.equal(base, expected_base)


@pytest.mark.parametrize("column", [0, 8, 16, 24])
def test_nan_in_any_projection_is_seen_in_what_it_makes(column: int) -> None:
    case = Case(DeltaRule(8), [Request(5, 4)], seed=3)
    projections = case.projections.clone()
    projections[1, column] = torch.nan
    result = case.run(kernel, projections=projections)
    # A query's goes into its own read, a key's or a gate's into the state, and later reads.
    assert result.reads[1 if column == 0 else 2].isnan().any()
    assert not result.reads[0].isnan().any()


def test_a_page_outside_of_the_cache_is_seen_wherever_a_row_has_it() -> None:
    for block in range(1, 5):
        case = Case(DeltaRule(8), [Request(20, 60)])
        case.table[0, block] = len(case.raw)
        with pytest.raises(ValueError, match="row 0 of the batch"):
            case.run(kernel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_tokens_that_read_something(dtype: torch.dtype) -> None:
    delta, base = numbers(64, 32, seed=1), numbers(20, 80, seed=2, dtype=dtype)[:, :64]
    reads = numbers(20, 32, seed=3)
    reads[4:9] = 0
    base[5] = torch.nan
    correction = bind_correction(delta, dtype, measured=True)
    assert correction is not None
    sums, before = torch.tensor([1.0, 2.0]), base.clone()
    correction.add_norms(base, reads, sums)
    counted = [*range(4), *range(9, 20)]
    expected = [
        1 + (reads[counted].double() @ delta.double().t()).square().sum(),
        2 + base[counted].double().square().sum(),
    ]
    assert sums.tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)
    assert torch.equal(base.nan_to_num(7), before.nan_to_num(7))


def test_the_norm_of_a_correction_that_cancels_is_not_negative() -> None:
    row = numbers(1, 32, seed=1)
    correction = bind_correction(row.repeat(64, 1), torch.float32, measured=True)
    assert correction is not None
    sums = torch.zeros(2)
    for seed in range(20):
        reads = numbers(1, 32, seed=seed)
        reads -= row * (reads @ row.t()) / (row @ row.t())
        correction.add_norms(torch.zeros(1, 64), reads, sums)
        assert sums[0] >= 0


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_team_gives_the_same_bits(rule: DeltaRule, dtype: torch.dtype) -> None:
    fused = Fused(rule, dtype)
    fused.assert_right()
    together, together_base = fused.run()
    torch.set_num_threads(1)
    alone, alone_base = fused.run()
    assert torch.equal(together.reads, alone.reads)
    assert torch.equal(together.raw, alone.raw)
    assert torch.equal(together_base, alone_base)


def assert_team_is_right(case: Case) -> None:
    expected = case.expected()
    result = case.run(kernel)
    assert_same("team", expected, result)


examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.usefixtures("team")
@examples
@given(cases())
def test_steps_of_a_team_are_the_formula(case: Case) -> None:
    assert_team_is_right(case)


@pytest.mark.usefixtures("team")
@examples
@given(hitting_cases())
def test_a_team_runs_rows_that_hit_blocks_of_this_step_last(case: Case) -> None:
    assert_team_is_right(case)


@pytest.mark.usefixtures("team")
@examples
@given(span_cases())
def test_a_team_writes_span_by_span(case: Case) -> None:
    assert_team_is_right(case)


@pytest.mark.usefixtures("team")
def test_a_team_refuses_malformed_rows_before_anything_is_written() -> None:
    case = Case(DeltaRule(8), REQUESTS)
    case.table[2, 5] = len(case.raw)
    raw = case.raw.clone()
    with pytest.raises(ValueError, match="row 2 of the batch"):
        case.run(kernel, raw=raw)
    assert torch.equal(raw, case.raw)


def test_compiled_code_is_told_from_that_of_changed_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(compiler.__file__).parent
    copy = tmp_path / "ops" / "cpu"
    shutil.copytree(here, copy)
    for name in ("ops/rule.py", "ops/reference.py", "config.py"):
        shutil.copy(here.parents[1] / name, tmp_path / name)
    digest = compiler.digest_of_sources()
    monkeypatch.setattr(compiler, "__file__", str(copy / "compiler.py"))
    assert compiler.digest_of_sources() == digest
    for changed in (copy / "lanes.py", copy.parent / "rule.py", tmp_path / "config.py"):
        changed.write_text(changed.read_text() + "\n")
        assert compiler.digest_of_sources() != digest
        digest = compiler.digest_of_sources()
